"""Several processes: work goes to whichever is free, four processes and two simulated machines end as one does."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from commands import FAST, ROOT, TINY, environment, launch, one_sentence

from eqnet.scoring.work import shared

# -- taking work ------------------------------------------------------------------------------------------------------

SLOW_PROCESS = """
import json, sys, time
from pathlib import Path
import numpy as np
import torch
from eqnet.command import start_cpu_processes
start_cpu_processes()
from accelerate import Accelerator
from eqnet.scoring.evaluation import Evaluator
from eqnet.scoring.table import build_table, table_genomes
sys.path.insert(0, sys.argv[2])
from conftest import small_cnn
from eqnet.nn.supernet import Supernet

torch.manual_seed(0)
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
folder = Path(sys.argv[1])
images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))
net = Supernet.from_model(small_cnn(), (3, 8, 8), bits=[2, 4], fixed={})
net.calibrate(images)

class Slow(Evaluator):
    taken = []
    def measure(self, config, *splits):
        if rank == 1:
            time.sleep(0.3)
        self.taken.append(net.space.encode(config).tolist())
        return super().measure(config, *splits)

evaluator = Slow(net, [images], {"validation": [(images, labels)]}, "off")
genomes = table_genomes(net.space, 24, 0)
found = evaluator.measure_all([net.space.decode(g) for g in genomes], ["validation"], accelerator)
taken = [genomes.tolist().index(g) for g in evaluator.taken]
table = build_table(evaluator, folder / f"table-{world}", 24, 0, accelerator)
again = build_table(evaluator, folder / f"table-{world}", 24, 0, accelerator)
assert (again.accuracy == table.accuracy).all()
result = {"accuracy": found.tolist(), "taken": taken, "table": table.accuracy.tolist()}
(folder / f"found-{world}-{rank}.json").write_text(json.dumps(result))
accelerator.end_training()
"""


def test_a_slow_process_takes_fewer_configs_and_nothing_else_changes(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_PROCESS)
    for processes in (1, 2):
        launch(processes, str(script), str(tmp_path), str(ROOT / "tests"), cwd=tmp_path)
    one, fast, slow = (json.loads((tmp_path / f"found-{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert len(fast["taken"]) > len(slow["taken"]) > 0
    assert sorted(fast["taken"] + slow["taken"]) == list(range(24))
    for name in ("accuracy", "table"):
        assert one[name] == fast[name] == slow[name]
    rows = [_indices(tmp_path / "table-2" / f"rows-{r}.jsonl") for r in (0, 1)]
    assert sorted(rows[0] + rows[1]) == list(range(24))
    assert len(rows[0]) > len(rows[1]) > 0


def _indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines() if line]


def test_one_process_takes_everything_in_order() -> None:
    steps: list[int] = []
    seen = list(shared(3, Accelerator(), lambda: steps.append(1)))
    assert seen == [0, 1, 2]
    assert len(steps) == 3
    assert list(shared(0, Accelerator())) == []


# -- whole runs -------------------------------------------------------------------------------------------------------

FEW = [*TINY, "pretrain.epochs=1", "train.epochs=1", "train.evaluate_epochs=0", "search.bn_images=64"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def machines(*command: str, cwd: Path) -> None:
    """Runs a command on two machines of two processes each, both of them this one."""
    port = str(free_port())
    started = []
    for rank in ("0", "1"):
        base = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "4"]
        base += ["--num_machines", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        base += ["--main_process_port", port]
        started.append(
            subprocess.Popen(
                [*base, *command],
                env=environment(),
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in started:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output


def table_rows(run: Path) -> list[tuple[int, float]]:
    lines = [line for p in run.glob("table/rows-*.jsonl") for line in p.read_text().splitlines() if line]
    return sorted((r["index"], r["accuracy"]) for r in map(json.loads, lines))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["processes", "machines"])
def test_four_processes_train_search_and_measure_as_one(launcher: str, tmp_path: Path) -> None:
    """One supernet, trained by four; then the same table, the same search and the same subnet by four and by one."""

    def four(*command: str) -> None:
        if launcher == "machines":
            machines(*command, cwd=tmp_path)
        else:
            launch(4, *command, cwd=tmp_path)

    run, alone = tmp_path / "run", tmp_path / "alone"
    four(str(ROOT / "train.py"), f"output={run}", *FEW)
    evaluation = json.loads((run / "evaluation.json").read_text())
    forms = [(row["bits"], row["form"]) for row in evaluation["uniform"]]
    assert len(set(forms)) == len(forms) == 24
    shutil.copytree(run, alone)
    four(str(ROOT / "search.py"), "--budget", "5", "--run", str(run), *FAST)
    command = [sys.executable, str(ROOT / "search.py"), "--budget", "5", "--run", str(alone), *FAST]
    subprocess.run(command, env=environment(), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert len(list(run.glob("table/rows-*.jsonl"))) == 4
    assert [i for i, _ in table_rows(run)] == list(range(20))
    assert table_rows(run) == table_rows(alone)
    for name in ("subnet.json", "subnet.safetensors"):
        assert (run / "search/w5-a5" / name).read_bytes() == (alone / "search/w5-a5" / name).read_bytes()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("ACCELERATE_USE_FSDP", "true", "asked for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asked for DEEPSPEED"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "train.accumulation"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
    ],
)
def test_launch_options_that_would_train_something_else_are_refused(
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
    value: str,
    wanted: str,
) -> None:
    monkeypatch.setenv(variable, value)
    code, _, err = call("train", "output=run", *TINY)
    assert code == 2
    assert wanted in one_sentence(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_launch_with_fsdp_ends_in_a_sentence(tmp_path: Path) -> None:
    base = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--use_fsdp", "--fsdp_version", "2"]
    command = [*base, "--num_processes", "2", str(ROOT / "train.py"), "output=run", *TINY]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: accelerate was asked for FSDP" in done.stderr
    assert not (tmp_path / "run").exists()
