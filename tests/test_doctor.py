"""Looking at an installation, and ahead at a run: `eqnet doctor`, shell completion, `train.py --estimate`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import Eqnet

from eqnet import doctor
from eqnet.checkpoint import write_json
from eqnet.usage import Usage, Used

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "tracking=none", "pretrain.epochs=1", "train.epochs=1", "train.evaluate_epochs=0", "train.calibration_images=32",
    "data.max_images=300", "data.batch_size=32", "model.arguments={width: 4}", "space.bits=[4, 8]", "search.bn_images=32",
]  # fmt: skip


@pytest.mark.slow
def test_doctor_lists_what_is_there_and_exits_with_0(eqnet: Eqnet) -> None:
    code, out, _ = eqnet("doctor")
    assert code == 0
    for topic in ("system", "CPU", "instruction sets", "integer kernels", "compiler", "ONNX Runtime", "wandb", "extra"):
        assert re.search(rf"^│ {topic}", out, re.MULTILINE), topic
    assert f"torch {torch.__version__.partition('+')[0]}" in out


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "onnxscript":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "onnx" else installed(name)

    needed = ['onnx>=1.20; extra == "export"', 'onnxscript; extra == "export"', "numpy>=2.0"]
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda _: needed)
    monkeypatch.setattr(doctor, "metadata", lambda _: Extras())
    (extra,) = doctor.extras()
    assert extra.found == "onnx (0.1 is installed, >=1.20 is needed), onnxscript (missing)"
    assert extra.advice == 'pip install "eqnet[export]"'


class Extras:
    """Metadata of a package with one extra."""

    def get_all(self, name: str) -> list[str]:
        return ["export"]


@pytest.mark.parametrize(
    ("words", "completed"), [("eqnet doc", "doctor"), ("eqnet targets ", "show"), ("eqnet export --tar", "--target")]
)
def test_the_shell_completes_commands_and_options(words: str, completed: str) -> None:
    position = str(words.count(" "))
    environment = {**os.environ, "_EQNET_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
    command = [sys.executable, "-m", "eqnet.cli"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    assert completed in done.stdout.split()


def test_an_estimate_writes_nothing(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = call("train", *TINY, "--estimate")
    assert (code, err) == (0, "")
    assert re.search(r"pretrain 0:00:\d\d \(9 steps\)", out)
    assert re.search(r"estimated peak memory [\d.]+ GiB of each process, checkpoints [\d.]+ MiB on disk", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_accounts_for_what_it_used_and_an_estimate_stands_beside_it(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def train(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "train.py"), *TINY, "output=run", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True).stdout

    out = train()
    used = json.loads((tmp_path / "run" / "used.json").read_text())
    assert set(used["seconds"]) == {"start", "pretrain", "supernet", "evaluation", "report"}
    assert all(seconds > 0 for seconds in used["seconds"].values())
    assert used["processes"] == 1
    assert f"peak memory {used['memory'] / 2**30:.2f} GiB" in out
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    rows = {line[:12].strip(): line[12:].split() for line in train("--estimate").splitlines()}
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert {"start", "pretrain", "supernet", "evaluation", "time", "peak memory"} <= set(rows)
    estimated, _, memory, _ = rows["peak memory"]
    assert float(memory) / 1.5 < float(estimated) < 1.5 * float(memory)


def test_what_a_run_used_adds_up_over_its_parts_and_processes(tmp_path: Path) -> None:
    write_json(tmp_path / "used.json", {"seconds": {"start": 5.0, "supernet": 100.0}, "memory": 2**50, "processes": 2})
    usage, accelerator = Usage(tmp_path), Accelerator()
    with usage.part("supernet"):
        time.sleep(0.05)
        with usage.part("evaluation"):
            time.sleep(0.1)
    first = usage.store(accelerator)
    assert first.memory == 2**50
    assert 100.05 <= first.seconds["supernet"] < 100.1 + first.seconds["evaluation"]
    assert first.seconds["evaluation"] >= 0.1
    assert first.seconds["start"] >= 5
    assert Used.read(tmp_path) == first
    second = usage.store(accelerator)  # counts what was stored before this process once
    assert second.seconds["supernet"] == first.seconds["supernet"]
    (tmp_path / "used.json").write_text("{")
    assert sum(Usage(tmp_path).store(accelerator).seconds.values()) < 100
