"""MetaMix: bit-meta gradients, frozen search steps, hard selections, costs, budgets, whole runs and their resumption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from commands import ROOT, environment, launch, one_sentence, train
from safetensors.torch import load_file
from torch import Tensor, nn

from eqnet.checkpoint import load_tensors
from eqnet.nn.supernet import Supernet, frozen_batch_norm
from eqnet.run import Run
from eqnet.settings import TrainSettings, load_settings
from eqnet.space import COSTS, Budget, QuantConfig, QuantSpace
from eqnet.space.latency import LatencyTable, LayerShape
from eqnet.training.metamix import (
    BitSelection,
    bind_budget,
    bit_meta_step,
    bit_search_step,
    branch_configs,
    logit_optimizer,
    selected_by,
    within_budget,
)
from eqnet.training.stability import Stability, measure_stability

BITS = [2, 4, 8]
SETTINGS = TrainSettings(guidance=0.0)
CRITERION = nn.CrossEntropyLoss()


@pytest.fixture
def batch(images) -> tuple[Tensor, Tensor]:
    return images(16), torch.arange(16) % 5


def elastic(cnn: nn.Module, images, *, bits=(4,), act_bits=tuple(BITS), fixed="none") -> Supernet:
    """A calibrated supernet in train mode with one form."""
    choices = {"symmetric": [True], "granularity": ["channel"], "fixed": fixed}
    supernet = Supernet.from_model(cnn, (3, 8, 8), bits=bits, act_bits=act_bits, **choices)
    supernet.calibrate(images(32))
    return supernet.train()


def selection_of(supernet: Supernet, budget: str) -> BitSelection:
    return BitSelection(supernet.space, Budget.parse(budget).bind(supernet.space), seed=0)


def middle(space: QuantSpace, share: float = 0.5) -> str:
    """A BitOps budget between the smallest and the largest config."""
    cost = COSTS["bitops"](space)
    ends = cost.of(space.smallest()), cost.of(space.largest())
    return f"bitops={ends[0] + share * (ends[1] - ends[0])}"


def gradients(supernet: Supernet) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in supernet.named_parameters()}


def everything(supernet: Supernet) -> dict[str, Tensor]:
    """Every parameter and buffer but the active rows."""
    found = {**dict(supernet.named_parameters()), **dict(supernet.named_buffers())}
    return {n: t.detach().clone() for n, t in found.items() if not n.endswith(".row")}


def meta(supernet: Supernet, batch: tuple[Tensor, Tensor], branches: dict[int, QuantConfig], **changes: object):
    supernet.zero_grad()
    settings = TrainSettings(**{"guidance": 0.0, **changes})  # type: ignore[arg-type]
    parts = bit_meta_step(Accelerator(cpu=True), supernet, supernet, *batch, branches, CRITERION, settings)
    return gradients(supernet), parts


# -- bit-meta ---------------------------------------------------------------------------------------------------------


def test_a_branch_takes_its_bits_or_the_nearest(make_cnn, images) -> None:
    both = elastic(make_cnn(), images, bits=[3, 8], act_bits=BITS, fixed="first_last_8bit").space
    branches = branch_configs(both)
    assert list(branches) == [2, 3, 4, 8]
    inner = branches[2]["3"], branches[4]["3"], branches[8]["3"]
    assert [(c.weight.bits, c.act.bits) for c in inner] == [(3, 2), (3, 4), (8, 8)]
    assert all(branches[b]["0"].weight.bits == 8 for b in branches)
    activations = branch_configs(elastic(make_cnn(), images).space)
    assert list(activations) == BITS
    assert {c.weight.bits for config in activations.values() for c in config.values()} == {4}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_is_the_mean_of_those_of_the_branches(cnn, images, batch, accumulation: int) -> None:
    """Fails where only the last branch propagates, as in the released code."""
    supernet = elastic(cnn, images, bits=BITS)
    supernet.eval()  # batches of accumulation would be normalised apart
    branches = branch_configs(supernet.space)
    found, parts = meta(supernet, batch, branches, accumulation=accumulation)
    single = [meta(supernet, batch, {b: config}) for b, config in branches.items()]
    for name, gradient in found.items():
        mean = torch.stack([g[name] for g, _ in single]).mean(0)
        assert torch.allclose(gradient, mean, rtol=1e-4, atol=1e-6), name
    losses = [float(p["total"]) for _, p in single]
    assert float(parts["total"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert [float(parts[f"task/{b}bit"]) for b in branches] == pytest.approx(losses, rel=1e-5)


def test_every_step_size_of_every_branch_learns(cnn, images, batch) -> None:
    found, _ = meta(supernet := elastic(cnn, images, bits=BITS), batch, branch_configs(supernet.space))
    for name, quantizer in supernet.quantizers():
        if not quantizer.scale.requires_grad:
            continue  # of the image
        gradient = found[f"model.{name.rpartition('.')[0]}.{name.rpartition('.')[2]}_quantizer.scale"]
        for row in range(len(quantizer.formats)):
            assert gradient[quantizer.index[row]].abs().sum() > 0, (name, row)


def test_weights_stay_float_where_they_have_one_bit_width(cnn, images, batch) -> None:
    supernet = elastic(cnn, images)
    branches = branch_configs(supernet.space)
    with supernet.float_weights():
        found, _ = meta(supernet, batch, branches)
        for layer in supernet.layers.values():
            assert torch.equal(layer.weight, layer.latent_weight)
    assert all(g.abs().sum() == 0 for n, g in found.items() if n.endswith("weight_quantizer.scale"))
    assert all(found[f"model.{n}.weight"].abs().sum() > 0 for n in supernet.layers)
    supernet.set_config(branches[2])
    assert not torch.equal(supernet.layers["3"].weight, supernet.layers["3"].latent_weight)


def test_a_teacher_guides_every_branch(cnn, images, batch) -> None:
    supernet = elastic(cnn, images)
    branches = branch_configs(supernet.space)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    step = bit_meta_step(
        Accelerator(cpu=True), supernet, supernet, *batch, branches, CRITERION, TrainSettings(guidance=1.0), teacher
    )
    target = teacher(batch[0]).softmax(1)
    supernet.set_config(branches[8])
    expected = nn.functional.kl_div(supernet(batch[0]).log_softmax(1), target, reduction="batchmean")
    assert float(step["guidance/8bit"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(step["total"]) == pytest.approx(np.mean([float(step[f"guidance/{b}bit"]) for b in BITS]), rel=1e-5)


# -- bit-search -------------------------------------------------------------------------------------------------------


def test_a_search_step_changes_the_logits_alone(cnn, images, batch) -> None:
    supernet = elastic(cnn, images, bits=BITS)
    selection = selection_of(supernet, middle(supernet.space))
    before, logits = everything(supernet), selection.logits.detach().clone()
    for _ in range(3):
        bit_search_step(
            Accelerator(cpu=True), supernet, selection, logit_optimizer(selection, 0.1), *batch, CRITERION, SETTINGS
        )
    after = everything(supernet)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.grad is None for p in supernet.parameters())
    searched = torch.tensor(supernet.space.num_formats > 1)
    assert not torch.isclose(selection.logits, logits)[searched].all(1).any()
    assert all(m.training and m.track_running_stats for m in supernet.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_selection_is_one_hot_with_the_gradient_of_the_softmax(cnn, images) -> None:
    supernet = elastic(cnn, images, bits=[2, 8], act_bits=BITS)
    selection = selection_of(supernet, middle(supernet.space))
    with torch.no_grad():
        selection.logits.normal_(generator=torch.Generator().manual_seed(0))
    hard = selection()
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.sum(1), torch.ones(len(hard)))
    assert not hard[~selection.valid].any()
    assert np.array_equal(hard.detach().argmax(1).numpy(), selection.genome)
    weights = torch.randn(hard.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((hard * weights).sum(), selection.logits)
    soft = selection.logits.masked_fill(~selection.valid, -torch.inf).softmax(1)
    (expected,) = torch.autograd.grad((soft * weights).sum(), selection.logits)
    assert torch.equal(found, expected)


def test_the_searched_network_is_the_selected_one_and_its_slope_is_exact(cnn, images, batch) -> None:
    """d loss / d h_b = <u, Q_b(x)>: that of the network in which a quantizer gives sum h_b Q_b(x)."""
    supernet = elastic(cnn, images, bits=BITS)
    space = supernet.space
    genome = space.random_genomes(np.random.default_rng(1), 1)[0]
    supernet.set_config(space.decode(genome))
    choice = (
        nn.functional.one_hot(torch.tensor(genome, dtype=torch.int64), space.bits.shape[1]).float().requires_grad_()
    )
    with frozen_batch_norm(supernet):
        plain = supernet(batch[0])
        with selected_by(supernet, choice):
            logits = supernet(batch[0])
        assert torch.equal(logits, plain)
        (found,) = torch.autograd.grad(CRITERION(logits, batch[1]), choice)
        for name, slot in (("3", "act"), ("5", "weight")):
            gene = space.gene_of[name, slot]
            quantizer = dict(supernet.quantizers())[f"{name}.{slot}"]
            free = choice[gene].detach().clone().requires_grad_()

            def mixture(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, free: Tensor = free) -> Tensor:
                rows = [module.quantized(args[0], r) for r in range(len(module.formats))]
                return sum(h * q for h, q in zip(free, rows, strict=True))  # type: ignore[return-value]

            handle = quantizer.register_forward_hook(mixture)
            (expected,) = torch.autograd.grad(CRITERION(supernet(batch[0]), batch[1]), free)
            handle.remove()
            assert torch.allclose(found[gene], expected, rtol=1e-3, atol=1e-6), name


# -- costs and budget -------------------------------------------------------------------------------------------------


def test_costs_of_a_hard_choice_are_those_of_the_config(cnn, images) -> None:
    space = elastic(cnn, images, bits=BITS, fixed="first_last_8bit").space
    bound = Budget.parse("w=5,a=6,size=2KiB,bitops=1M").bind(space)
    selection = BitSelection(space, bound, seed=0)
    genomes = space.random_genomes(np.random.default_rng(0), 20)
    for genome, values in zip(genomes, bound.values(genomes), strict=True):
        choice = nn.functional.one_hot(torch.tensor(genome, dtype=torch.int64), space.bits.shape[1]).float()
        assert (selection.costs(choice).numpy() * bound.limits).tolist() == pytest.approx(values, rel=1e-12)
        assert float(selection.excess(choice)) == pytest.approx((values / bound.limits).max() - 1, rel=1e-9)


def test_costs_of_a_soft_choice_have_the_gradient_of_finite_differences(cnn, images) -> None:
    space = elastic(cnn, images, bits=BITS).space
    selection = BitSelection(space, Budget.parse("w=5,bitops=1M").bind(space), seed=0)
    soft = torch.rand(space.bits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert torch.autograd.gradcheck(selection.costs, (soft.requires_grad_(),))


@pytest.mark.parametrize("side", ["above", "below"])
def test_the_excess_pushes_to_the_budget_from_both_sides(cnn, images, batch, side: str) -> None:
    supernet = elastic(cnn, images)
    bound = Budget.parse(middle(supernet.space)).bind(supernet.space)
    selection = BitSelection(supernet.space, bound, seed=0)
    start = supernet.space.largest() if side == "above" else supernet.space.smallest()
    with torch.no_grad():
        chosen = torch.tensor(supernet.space.encode(start), dtype=torch.int64)
        selection.logits.zero_().scatter_(1, chosen[:, None], 1.0)
    optimizer, excess = logit_optimizer(selection, 0.05), []
    for _ in range(150):
        parts = bit_search_step(Accelerator(cpu=True), supernet, selection, optimizer, *batch, CRITERION, SETTINGS)
        excess.append(float(parts["search/excess"]))
    assert (excess[0] > 0) == (side == "above")
    assert abs(np.mean(excess[-50:])) < 0.25 * abs(excess[0])


def test_what_is_selected_is_within_the_budget_and_uses_it(cnn, images) -> None:
    space = elastic(cnn, images, bits=BITS).space
    rng = np.random.default_rng(0)
    cost = COSTS["bitops"](space)
    for share in (0.0, 0.2, 0.5, 0.9):
        for text in (middle(space, share), f"{middle(space, share)},w=5"):
            bound = Budget.parse(text).bind(space)
            for seed in range(5):
                draws = np.random.default_rng(seed).random(space.bits.shape) * space.formats_in(None)
                genome = within_budget(draws / draws.sum(1, keepdims=True), bound, rng)
                assert bound.feasible(genome[None])[0]
                up = [g for g in range(space.num_genes) if space.step_up[g, genome[g]] >= 0]
                for gene in up:
                    more = genome.copy()
                    more[gene] = space.step_up[gene, genome[gene]]
                    assert not bound.feasible(more[None])[0] or cost(more[None]) == cost(genome[None])


def test_a_probable_genome_within_the_budget_stays(cnn, images) -> None:
    space = elastic(cnn, images, bits=BITS).space
    genome = space.random_genomes(np.random.default_rng(3), 1)[0]
    bound = Budget.parse(f"bitops={COSTS['bitops'](space)(genome[None])[0]}").bind(space)
    probabilities = np.full(space.bits.shape, 0.1)
    probabilities[np.arange(space.num_genes), genome] = 0.8
    assert np.array_equal(within_budget(probabilities, bound, np.random.default_rng(0)), genome)


# -- stability --------------------------------------------------------------------------------------------------------


def test_instability_is_the_relative_spread_of_the_variance_over_bits() -> None:
    variance = np.array([[1.0, 2.0], [3.0, 2.0]])
    found = Stability([2, 8], ["a", "b"], variance * 0, variance)
    assert found.instability == pytest.approx((1 / 2 + 0) / 2)
    assert Stability.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()


def test_statistics_of_bn_inputs_are_those_of_the_network(cnn, images) -> None:
    supernet = elastic(cnn, images).eval()
    branches, x = branch_configs(supernet.space), images(32, seed=4)
    before = everything(supernet)
    found = measure_stability(supernet, branches, x)
    assert found.bits == BITS
    assert found.layers == ["1", "4", "6"]
    supernet.set_config(branches[2])
    first = supernet.model[0](x)
    channels = first.transpose(0, 1).flatten(1)
    assert found.mean[0, 0] == pytest.approx(float(channels.mean()), abs=1e-6)
    assert found.variance[0, 0] == pytest.approx(float(channels.var(1, correction=0).mean()), rel=1e-5)
    assert found.instability > 0
    assert all(torch.equal(t, before[n]) for n, t in everything(supernet).items())


def test_a_limit_on_latency_takes_times_from_a_table(cnn: nn.Module, images, tmp_path: Path) -> None:
    space = elastic(cnn, images).space
    settings = load_settings(["metamix.budget=latency=11ms"])
    with pytest.raises(ValueError, match=r"metamix\.latency_table=FILE"):
        bind_budget(Run.unsaved(settings), space)
    entries = {}
    for info in space.layers:
        for weight in space.choices(info.name, "weight"):
            for act in space.choices(info.name, "act"):
                entries[LayerShape.of(info), weight, act] = float(act.bits)  # ms
    table = tmp_path / "times.json"
    table.write_text(json.dumps(LatencyTable(entries, 1.0).to_json()))
    fastest = bind_budget(
        Run.unsaved(load_settings(["metamix.budget=latency=1s", f"metamix.latency_table={table}"])), space
    )
    cost = fastest.costs[0]
    assert cost.of(space.smallest()) == 1 + sum(c.act.bits for _, c in space.smallest().items() if c.act is not None)
    limit = (cost.minimum + cost.of(space.largest())) / 2
    bound = bind_budget(
        Run.unsaved(load_settings([f"metamix.budget=latency={limit}ms", f"metamix.latency_table={table}"])), space
    )
    largest = space.encode_all([space.largest()])
    assert not bound.feasible(largest).any()
    assert bound.feasible(bound.repair(largest, np.random.default_rng(0))).all()


# -- whole runs -------------------------------------------------------------------------------------------------------

TINY = [
    "tracking=none",
    "pretrain.epochs=2",
    "metamix.budget=bitops=1.7M",
    "metamix.select_epochs=3",
    "metamix.warmup_epochs=1",
    "metamix.act_epochs=1",
    "train.epochs=2",
    "train.checkpoint_steps=3",
    "train.evaluate_epochs=1",
    "train.log_steps=1",
    "train.calibration_images=64",
    "data.max_images=300",
    "data.batch_size=64",
    "search.bn_images=64",
    "model.arguments={width: 4}",
    "space.bits=[4]",
    "space.act_bits=[2, 4, 8]",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted tiny run that selects activation bits."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = train(folder, *TINY)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_ends_with_a_subnet_within_the_budget(call, finished: Path) -> None:
    document = json.loads((finished / "subnet.json").read_text())
    selected = json.loads((finished / "selection.json").read_text())
    assert document["method"] == "metamix"
    assert document["budget"] == "bitops=1.7M"
    assert 0.95 * 1.7e6 < document["cost"]["bitops"] <= 1.7e6
    assert selected["cost"]["bitops"]["selected"] == document["cost"]["bitops"]
    supernet, _ = Run.open(finished).load_supernet()
    config = QuantConfig.from_json(document["layers"])
    assert supernet.space.largest() == supernet.space.smallest() == config
    assert {c.weight.bits for n, c in config.items() if n not in supernet.space.fixed} == {4}
    for gene in selected["genes"]:
        assert all(config[layer].act.bits == gene["selected"] for layer in gene["layers"])
    supernet.extract(config).load_state_dict(load_tensors(finished / "subnet.safetensors"))
    assert json.loads((finished / "evaluation.json").read_text())["subnet"] == document["accuracy"]
    assert {"validation_before", "validation", "test"} == set(document["accuracy"])
    code, out, err = call("search", "--run", finished, "--subnet", finished / "subnet.json")
    assert code == 0, err
    assert "MBitOps" in out


def test_a_selected_subnet_is_exported_and_verified(eqnet, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "selected.onnx"
    code, _, err = eqnet("export", finished / "subnet.json", "--target", "onnxruntime-x86", "--output", file)
    assert code == 0, err
    code, out, err = eqnet("verify", file, "--run", finished, "--rounds", "0", "--images", "32")
    assert code == 0, err
    assert "verified" in out
    assert json.loads(Path(f"{file}.certificate.json").read_text())["verdict"] == "pass"


def test_figures_of_every_phase_are_logged(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    selecting = [r for r in rows if "select/total" in r]
    assert {"select/task/2bit", "select/task/4bit", "select/task/8bit", "select/guidance/8bit"} <= set(selecting[0])
    searching = [r for r in selecting if "select/search/excess" in r]
    assert 0 < len(searching) < len(selecting)
    assert "act/task/largest" in next(r for r in rows if "act/total" in r)
    assert "supernet/task/largest" in next(r for r in rows if "supernet/total" in r)
    stability = json.loads((finished / "stability.json").read_text())
    assert rows[-2]["stability/after"] == pytest.approx(stability["after"]["instability"])
    assert (finished / "stability.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_bit_for_bit_alike(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), f"output={folder}"]
    arguments = TINY
    for after in ("select-00000006", "act-00000003", "supernet-00000003"):
        process = subprocess.Popen(
            [*command, *arguments], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while not (folder / "checkpoints" / after).exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "supernet.json").exists()
        arguments = ["--resume"]
    resumed = train(folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming the supernet phase after step 3" in resumed.stdout
    for name in ("supernet.safetensors", "subnet.safetensors"):
        whole, continued = load_file(finished / name), load_file(folder / name)
        assert whole.keys() == continued.keys()
        assert all(torch.equal(whole[k], continued[k]) for k in whole), name
    for name in ("metrics.jsonl", "evaluation.json", "subnet.json", "selection.json", "stability.json"):
        assert (finished / name).read_text() == (folder / name).read_text(), name


def test_weights_and_activations_are_selected_together(call, finished: Path, tmp_path: Path) -> None:
    short = [a for a in TINY if not a.startswith(("space.", "pretrain", "metamix.budget"))]
    arguments = ["output=both", f"model.weights={finished}", "space.bits=[2, 8]", "metamix.budget=w=4,bitops=2M"]
    code, _, err = call("train", *short, *arguments)
    assert code == 0, err
    document = json.loads((tmp_path / "both" / "subnet.json").read_text())
    assert document["cost"]["w"] <= 4
    assert document["cost"]["bitops"] <= 2e6
    genes = json.loads((tmp_path / "both" / "selection.json").read_text())["genes"]
    assert {gene["slot"] for gene in genes} == {"weight", "act"}


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["metamix.budget=bitops=1K"], "smallest reachable is bitops="),
        (["metamix.budget=bitsops=1M"], "did you mean 'bitops'"),
        (["metamix.budget=4", "space.symmetric=[true, false]"], "space.symmetric"),
        (["metamix.budget=8", "space.bits=[4]"], "nothing to select"),
        (["metamix.budget=4", "metamix.warmup_epochs=10"], "metamix.warmup_epochs"),
        (["metamix.budget=4", "subnet=a.json"], "one of the two"),
        (["metamix.epochs=4"], "did you mean"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence_and_writes_nothing(call, tmp_path: Path, arguments: list[str], wanted: str) -> None:
    code, _, err = call("train", "model.arguments={width: 4}", *arguments)
    assert code == 2
    assert wanted in one_sentence(err)
    assert not (tmp_path / "runs").exists()


def test_search_explains_that_bits_were_selected_in_training(call, finished: Path) -> None:
    code, _, err = call("search", "--run", finished, "--budget", "4")
    assert code == 2
    assert f"its subnet is {finished / 'subnet.json'}" in one_sentence(err)
    other = finished.parent / "other"
    other.mkdir()
    (other / "settings.yaml").write_text("tracking: none\n")
    code, _, err = call("search", "--run", other, "--budget", "4", "--method", "metamix")
    assert code == 2
    assert f"train.py metamix.budget=4 model.weights={other}" in one_sentence(err)


DDP_SCRIPT = """
import sys, torch
from eqnet.command import start_cpu_processes
start_cpu_processes()
from eqnet.settings import Settings, TrainSettings
from eqnet.space import Budget
from eqnet.training.loop import make_accelerator
from eqnet.training.metamix import BitSelection, bit_search_step, logit_optimizer
sys.path.insert(0, sys.argv[2])
from test_training import make_batch, make_supernet
accelerator = make_accelerator(Settings())
supernet = make_supernet().train()
selection = BitSelection(supernet.space, Budget.parse("w=4,a=4").bind(supernet.space), seed=0)
images, labels = make_batch()
rank, world = accelerator.process_index, accelerator.num_processes
mine = slice(rank * len(images) // world, (rank + 1) * len(images) // world)
optimizer = logit_optimizer(selection, 0.1)
for _ in range(3):
    bit_search_step(
        accelerator, supernet, selection, optimizer, images[mine], labels[mine], torch.nn.CrossEntropyLoss(), TrainSettings()
    )
torch.save(selection.logits.detach(), f"{sys.argv[1]}/logits-{world}-{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_search_as_one(tmp_path: Path) -> None:
    script = tmp_path / "logits.py"
    script.write_text(DDP_SCRIPT)
    for processes in (1, 2):
        launch(processes, str(script), str(tmp_path), str(ROOT / "tests"), cwd=tmp_path)
    one, first, second = (
        torch.load(tmp_path / f"logits-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(first, second)
    assert torch.allclose(one, first, atol=1e-3)
