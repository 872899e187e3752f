"""The training step and loop: order and guidance of subnets, summed gradients, exact resume, two processes against one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from commands import ROOT, TINY, environment, launch, one_sentence, train
from safetensors.torch import load_file
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401
from eqnet.nn.supernet import Supernet
from eqnet.run import target_spaces, training_space
from eqnet.settings import SpaceSettings, TrainSettings, load_settings
from eqnet.space import QuantConfig, QuantSpace, SandwichSampler
from eqnet.space.hardware import load_target
from eqnet.training.losses import weight_distribution_loss
from eqnet.training.step import regularised_weights, subnet_roles, supernet_step
from eqnet.training.trainer import step_configs


def make_supernet(norm: bool = False) -> Supernet:
    """A small calibrated supernet; without BN unless `norm`."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(6))
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    supernet = Supernet.from_model(model, (1, 8, 8))
    supernet.calibrate(torch.randn(32, 1, 8, 8))
    return supernet


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def gradients(supernet: Supernet, **changes: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and loss parts of one step."""
    supernet.train().zero_grad()
    images, labels = make_batch()
    configs = SandwichSampler(supernet.space).sample(np.random.default_rng(3))
    settings = TrainSettings(**changes)  # type: ignore[arg-type]
    criterion = nn.CrossEntropyLoss()
    parts = supernet_step(Accelerator(cpu=True), supernet, supernet, images, labels, configs, criterion, settings)
    return {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}, parts


class Recorder(nn.Module):
    """Notes the config and the logits of every forward pass."""

    def __init__(self, supernet: Supernet) -> None:
        super().__init__()
        self.supernet = supernet
        self.seen: list[tuple[QuantConfig, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.supernet(x)
        assert self.supernet.config is not None
        self.seen.append((self.supernet.config, logits.detach()))
        return logits


@pytest.mark.parametrize("guided_by", ["previous", "largest"])
def test_three_forwards_in_order_taught_by_the_one_before_or_the_largest(guided_by: str) -> None:
    supernet = make_supernet().train()
    images, labels = make_batch()
    configs = SandwichSampler(supernet.space).sample(np.random.default_rng(0))
    recorder = Recorder(supernet)
    settings = TrainSettings(guided_by=guided_by)  # type: ignore[arg-type]
    parts = supernet_step(
        Accelerator(cpu=True), recorder, supernet, images, labels, configs, nn.CrossEntropyLoss(), settings
    )
    assert [c for c, _ in recorder.seen] == configs
    (_, high), (_, middle), (_, low) = recorder.seen

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    assert torch.allclose(parts["guidance/random_1"], kl(middle, high), atol=1e-6)
    teacher_of_low = middle if guided_by == "previous" else high
    assert torch.allclose(parts["guidance/smallest"], kl(low, teacher_of_low), atol=1e-6)
    assert "guidance/largest" not in parts
    assert torch.allclose(parts["task/smallest"], F.cross_entropy(low, labels), atol=1e-6)


def test_the_largest_subnet_is_guided_by_the_float_teacher_if_there_is_one() -> None:
    supernet = make_supernet().train()
    images, labels = make_batch()
    configs = SandwichSampler(supernet.space).sample(np.random.default_rng(0))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    parts = supernet_step(
        Accelerator(cpu=True),
        supernet,
        supernet,
        images,
        labels,
        configs,
        nn.CrossEntropyLoss(),
        TrainSettings(),
        teacher,
    )
    assert parts["guidance/largest"] > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_are_those_of_the_sum_of_all_parts() -> None:
    supernet = make_supernet()
    found, parts = gradients(supernet)
    supernet.zero_grad()
    images, labels = make_batch()
    configs = SandwichSampler(supernet.space).sample(np.random.default_rng(3))
    settings = TrainSettings()
    wdr = weight_distribution_loss(regularised_weights(supernet, settings))
    total = 0.015 * wdr["kurtosis"] + 1.0 * wdr["skewness"]
    previous = None
    for config in configs:
        supernet.set_config(config)
        logits = supernet(images)
        task = F.cross_entropy(logits, labels)
        if previous is None:
            total = total + task
        else:
            guidance = F.kl_div(logits.log_softmax(1), previous.softmax(1), reduction="batchmean")
            total = total + 0.5 * guidance + 0.5 * task
        previous = logits.detach()
        total.backward()  # configs switch buffers in place, so the graph of one must be used before the next
        total = torch.zeros(())
    for name, parameter in supernet.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(found[name], parameter.grad, atol=1e-5), name
    assert torch.isclose(parts["total"], sum(v for k, v in parts.items() if k.startswith("task/largest")) + 0.015 * parts["kurtosis"] + parts["skewness"] + 0.5 * sum(v for k, v in parts.items() if k.endswith(("random_1", "smallest"))))  # fmt: skip


def test_a_step_on_rows_is_the_step_on_their_configs() -> None:
    supernet = make_supernet()
    configs = SandwichSampler(supernet.space).sample(np.random.default_rng(3))
    expected, expected_parts = gradients(supernet)
    supernet.zero_grad()
    images, labels = make_batch()
    rows = [torch.tensor(supernet.rows(config)) for config in configs]
    parts = supernet_step(
        Accelerator(cpu=True), supernet, supernet, images, labels, rows, nn.CrossEntropyLoss(), TrainSettings()
    )
    assert all(torch.equal(parts[name], value) for name, value in expected_parts.items())
    assert all(torch.equal(p.grad, expected[n]) for n, p in supernet.named_parameters() if p.grad is not None)


def test_every_parameter_takes_part_in_every_backward() -> None:
    supernet = make_supernet(norm=True)
    found, _ = gradients(supernet)
    missing = [n for n, p in supernet.named_parameters() if p.requires_grad and n not in found]
    assert not missing


def test_micro_batches_give_the_gradients_of_the_whole_batch() -> None:
    supernet = make_supernet()
    whole, _ = gradients(supernet)
    pieces, _ = gradients(supernet, accumulation=3)
    for name, gradient in whole.items():
        assert torch.allclose(gradient, pieces[name], atol=1e-5), name


def test_wdr_leaves_the_first_layer_out_unless_asked() -> None:
    supernet = make_supernet()
    names = list(supernet.latent_weights())
    assert list(regularised_weights(supernet, TrainSettings())) == names[1:]
    assert list(regularised_weights(supernet, TrainSettings(wdr_first_layer=True))) == names


def test_a_space_with_one_choice_trains_statically() -> None:
    space = make_supernet().space
    static = QuantSpace.from_layers(space.layers, bits=[4], symmetric=[True], granularity=["tensor"])
    assert len(step_configs(SandwichSampler(static), 0, 0)) == 1
    assert len(step_configs(SandwichSampler(space), 0, 0)) == 3
    assert subnet_roles(4) == ["largest", "random_1", "random_2", "smallest"]


def test_configs_depend_on_seed_and_step_only() -> None:
    sampler = SandwichSampler(make_supernet().space)
    assert step_configs(sampler, 5, 17) == step_configs(sampler, 5, 17)
    assert step_configs(sampler, 5, 17) != step_configs(sampler, 5, 18)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGKILL, "supernet-00000003"),
        pytest.param(signal.SIGTERM, "pretrain-00000003", marks=pytest.mark.slow),
    ],
    ids=["kill-9", "term"],
)
def test_a_killed_run_resumes_bit_for_bit(finished: Path, tmp_path: Path, number: signal.Signals, after: str) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), f"output={folder}", *TINY]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoint = folder / "checkpoints" / after
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode in (-number, 130)
    if number == signal.SIGTERM:
        assert "resume" in errors
        assert "Traceback" not in errors
    assert not (folder / "supernet.json").exists()
    resumed = train(folder, *TINY, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    for name in ("float.safetensors", "supernet.safetensors"):
        whole, continued = load_file(finished / name), load_file(folder / name)
        assert whole.keys() == continued.keys()
        assert all(torch.equal(whole[k], continued[k]) for k in whole), name
    for name in ("metrics.jsonl", "evaluation.json", "split.json"):
        assert (finished / name).read_text() == (folder / name).read_text(), name


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(finished: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    for name in ("supernet.json", "supernet.safetensors", "evaluation.json"):
        (folder / name).unlink()
    newest, older = sorted((folder / "checkpoints").glob("supernet-*"), reverse=True)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    resumed = train(folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "damaged" in resumed.stdout
    assert f"after step {int(older.name.split('-')[1])}" in resumed.stdout
    whole, continued = load_file(finished / "supernet.safetensors"), load_file(folder / "supernet.safetensors")
    assert all(torch.equal(whole[k], continued[k]) for k in whole)


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    done = train(finished, "--resume")
    assert done.returncode == 0
    assert "is finished" in done.stdout
    assert {p: p.read_bytes() for p in finished.iterdir() if p.is_file()} == before


def test_a_finished_run_logs_every_part(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    last = [r for r in rows if "supernet/total" in r][-1]
    wanted = {
        "task/largest",
        "task/random_1",
        "task/smallest",
        "guidance/random_1",
        "guidance/smallest",
        "kurtosis",
        "skewness",
    }
    assert {f"supernet/{w}" for w in wanted} <= set(last)
    assert any("validation/mean" in r for r in rows)  # what configs/sweep/digits.yaml optimises
    assert last["supernet/lr"] < 1e-4
    assert "test/mean/2bit" in rows[-1]


@pytest.mark.slow
def test_compiled_quantizers_give_the_same_training_curve(finished: Path, tmp_path: Path) -> None:
    """Until a rounding flips, after sums in another order, losses are equal; another seed is further away by far."""

    def curve(folder: Path, *overrides: str) -> np.ndarray:
        if not folder.exists():
            done = train(folder, *TINY, *overrides)
            assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return np.array([r["supernet/total"] for r in rows if "supernet/total" in r])

    eager, compiled = curve(finished), curve(tmp_path / "compiled", "train.compile=on")
    noise = np.abs(curve(tmp_path / "seed", "seed=1") - eager).mean()
    assert eager.shape == compiled.shape == (12,)
    assert np.abs(compiled - eager)[:4].max() < 1e-5
    assert np.abs(compiled - eager).mean() < 0.1 * noise


DDP_SCRIPT = """
import sys, torch
from eqnet.command import start_cpu_processes
start_cpu_processes()
from eqnet.training.loop import make_accelerator
from eqnet.training.trainer import step_configs
from eqnet.settings import Settings, TrainSettings
from eqnet.space import SandwichSampler
from eqnet.training.step import supernet_step
sys.path.insert(0, sys.argv[2])
from test_training import make_supernet, make_batch
accelerator = make_accelerator(Settings())
supernet = make_supernet().train()
model = accelerator.prepare(supernet)
images, labels = make_batch()
rank, world = accelerator.process_index, accelerator.num_processes
size = len(images) // world
mine = slice(rank * size, (rank + 1) * size)
configs = step_configs(SandwichSampler(supernet.space), 0, 5)
supernet_step(accelerator, model, supernet, images[mine], labels[mine], configs, torch.nn.CrossEntropyLoss(), TrainSettings(accumulation=2))
torch.save({n: p.grad for n, p in supernet.named_parameters()}, f"{sys.argv[1]}/gradients-{world}-{rank}.pt")
torch.save([c.to_json() for c in configs], f"{sys.argv[1]}/configs-{world}-{rank}.pt")
"""


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    script = tmp_path / "gradients.py"
    script.write_text(DDP_SCRIPT)
    for processes in (1, 2):
        launch(processes, str(script), str(tmp_path), str(ROOT / "tests"), cwd=tmp_path)
    one = torch.load(tmp_path / "gradients-1-0.pt", weights_only=True)
    two = [torch.load(tmp_path / f"gradients-2-{r}.pt", weights_only=True) for r in range(2)]
    for name, gradient in one.items():
        if gradient is None:
            continue
        assert torch.equal(two[0][name], two[1][name]), name
        assert torch.allclose(two[0][name], gradient, atol=1e-5), name
    configs = [torch.load(tmp_path / f"configs-2-{r}.pt", weights_only=True) for r in range(2)]
    assert configs[0] == configs[1] == torch.load(tmp_path / "configs-1-0.pt", weights_only=True)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision per process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_cifar_resnets_train_in_bfloat16() -> None:
    model = timm.create_model("cifar_resnet20", in_chans=1, width=4)
    supernet = Supernet.from_model(model, (1, 8, 8), bits=[2, 8])
    supernet.calibrate(torch.randn(16, 1, 8, 8))
    images, labels = make_batch()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    configs = SandwichSampler(supernet.space).sample(np.random.default_rng(0))
    parts = supernet_step(
        accelerator, supernet, supernet, images, labels, configs, nn.CrossEntropyLoss(), TrainSettings()
    )
    assert all(torch.isfinite(v) for v in parts.values())
    assert all(torch.isfinite(p.grad).all() for p in supernet.parameters() if p.grad is not None)


# -- targets ----------------------------------------------------------------------------------------------------------


def test_with_targets_the_space_is_their_union_and_every_subnet_runs_on_one() -> None:
    layers = make_supernet().space.layers
    names = ["tensorrt", "openvino-cpu"]
    settings = load_settings([f"space.targets=[{', '.join(names)}]"]).space
    space = training_space(settings, layers, 0)
    parts = target_spaces(space, names)
    targets = [load_target(name) for name in names]
    for gene in space.genes:
        info = space.info(gene.layers[0])
        assert all(any(t.allows(info, gene.slot, fmt) is None for t in targets) for fmt in gene.formats)
    assert parts == [target.restrict(training_space(SpaceSettings(), layers, 0)) for target in targets]
    sampler = SandwichSampler(space, 2, within=parts)
    for step in range(10):
        configs = step_configs(sampler, 7, step)
        assert configs == step_configs(SandwichSampler(space, 2, within=parts), 7, step), "a resumed run draws the same"
        assert all(any(target.check(config, layers) == [] for target in targets) for config in configs)


@pytest.mark.parametrize("switch", ["train.cuda_graph=on", "train.integer=on"])
def test_what_this_machine_cannot_do_is_refused_before_anything_is_written(tmp_path: Path, switch: str) -> None:
    failed = train(tmp_path / "run", *TINY, switch, "train.precision=fp16")
    assert failed.returncode == 2
    assert switch.replace("=on", "=off") in one_sentence(failed.stderr)
    assert not (tmp_path / "run").exists()


def test_an_unknown_target_is_one_sentence_with_the_nearest_name(tmp_path: Path) -> None:
    done = train(tmp_path / "run", *TINY, "space.targets=[tensort]")
    assert done.returncode == 2
    assert "space.targets: unknown target 'tensort'; did you mean 'tensorrt'?" in done.stderr
    assert not (tmp_path / "run").exists()
