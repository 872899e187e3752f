"""Looking at an installation, and ahead at a run: `eqnet doctor`, shell completion, `train.py --estimate`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import Eqnet

from eqnet import doctor

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
def test_the_estimated_memory_is_that_of_the_run(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = []
    for argument in ("--estimate", "output=run"):
        command = [sys.executable, str(ROOT / "train.py"), *TINY, argument]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
        (value,) = re.findall(r"peak memory ([\d.]+) GiB", done.stdout)
        found.append(float(value))
    estimated, used = found
    assert used / 1.5 < estimated < 1.5 * used
