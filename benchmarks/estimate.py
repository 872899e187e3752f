"""`train.py --estimate` beside what the run then used: alone on the machine, and while other processes keep all cores busy,
which takes minutes and is left to `--full`.

python -m benchmarks estimate [--full | --short] [--output folder]
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Size
from eqnet.usage import Used

ROOT = Path(__file__).resolve().parent.parent
# the digits run of the README with fewer epochs of each phase instead of 30
EPOCHS = {"short": 1, "usual": 1, "full": 4}
RUN = ["tracking=none", "train.evaluate_epochs=0"]
TINY = ["data.max_images=200", "model.arguments={width: 4}"]


def train(folder: Path, *arguments: str) -> str:
    """What `train.py` prints."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def _spin() -> None:
    while True:
        np.ones((256, 256)) @ np.ones((256, 256))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that compute all the time."""
    others = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(processes)]
    try:
        for other in others:
            other.start()
        yield
    finally:
        for other in others:
            other.kill()


def estimated(folder: Path, settings: list[str]) -> dict[str, float]:
    """Seconds by part and the memory in MiB of one estimate."""
    out = train(folder, *settings, "output=new", "--estimate")
    parts = re.findall(r"(\w+) (\d+):(\d\d):(\d\d)", out.split(": ", 1)[1])
    seconds = {name: 3600.0 * int(h) + 60 * int(m) + int(s) for name, h, m, s in parts}
    memory, unit = re.findall(r"peak memory ([\d.]+) (\w)iB", out)[0]
    return {**seconds, "memory": float(memory) * (1024 if unit == "G" else 1)}


def run(size: Size) -> dict[str, Any]:
    """A run, then estimates of it."""
    epochs, repeats = EPOCHS[size], 2 if size == "full" else 1
    settings = [*RUN, f"pretrain.epochs={epochs}", f"train.epochs={epochs}", *(TINY if size == "short" else [])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train(folder, *settings, "output=run")
        used = Used.read(folder / "run")
        found: dict[str, list[dict[str, float]]] = {}
        crowds = {"estimated, alone": 0, "estimated, all cores busy": os.cpu_count() or 1}
        if size == "usual":
            del crowds["estimated, all cores busy"]
        for name, others in crowds.items():
            with ExitStack() as stack:
                stack.enter_context(busy(others))
                found[name] = [estimated(folder, settings) for _ in range(repeats)]
    truth = {"time, s": sum(used.seconds.values()) - used.seconds["report"], "peak memory, MiB": used.memory / 2**20}
    truth |= {f"{part}, s": value for part, value in used.seconds.items() if part != "report"}
    rows: dict[str, Any] = {name: {"used": value} for name, value in truth.items()}
    for name, estimates in found.items():
        for row in rows:
            part = row.split(", ")[0]
            values = {"time": [sum(v for k, v in e.items() if k != "memory") for e in estimates]}
            values["peak memory"] = [e["memory"] for e in estimates]
            chosen = values.get(part) or [e[part] for e in estimates]
            rows[row][name] = float(np.median(chosen))
            rows[row][f"{name} / used"] = float(np.median(chosen)) / max(rows[row]["used"], 1e-9)
    return {f"estimate of the digits run, {epochs} + {epochs} epochs": rows}
