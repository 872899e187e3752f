"""The tiny run that several test files look at, and commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "tracking=none",
    "pretrain.epochs=1",
    "train.epochs=3",
    "train.checkpoint_steps=3",
    "train.evaluate_epochs=1",
    "train.evaluate_bits=[2]",
    "train.log_steps=1",
    "train.calibration_images=64",
    "data.max_images=300",
    "data.batch_size=64",
    "model.arguments={width: 4}",
    "space.bits=[2, 4, 8]",
]
FAST = ["tracking=none", "search.table_size=20", "search.bn_images=64", "search.generations=10", "search.population=20"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), f"output={folder}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder.parent)


def launch(processes: int, *command: str, cwd: Path) -> None:
    base = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    done = subprocess.run([*base, *command], capture_output=True, text=True, env=environment(), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def one_sentence(stderr: str) -> str:
    """The error; fails if there is more than one line or a traceback."""
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]
