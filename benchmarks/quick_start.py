"""The quick start on digits, of this version and of an earlier one, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.quick_start REVISION [--epochs 4] [--rounds 2] [--output FILE.json]

Trains with fewer epochs of each phase than the README's 30, then searches at 4 bits. Seconds of processor time, in which other
processes of the machine disturb less. The default settings of a version are part of what is compared: tables have the rows that it wants.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.tables import save, show

ROOT = Path(__file__).resolve().parent.parent


def check_out(revision: str, folder: Path) -> Path:
    """The files of a revision of this repository."""
    command = ["git", "-C", str(ROOT), "archive", revision]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def processor_s(checkout: Path, folder: Path, *command: str) -> float:
    """Processor seconds of a command of a checkout, run in `folder`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(checkout / command[0]), *command[1:], "tracking=none"],
        capture_output=True, text=True, cwd=folder, env=environment,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed in {checkout}:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Trains, searches, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of git, to compare with")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        other = check_out(arguments.revision, Path(temporary) / "other")
        for number in range(arguments.rounds):
            for name, checkout in {"this version": ROOT, arguments.revision: other}.items():
                folder = Path(temporary) / f"{checkout.name}-{number}"
                folder.mkdir()
                epochs = [f"pretrain.epochs={arguments.epochs}", f"train.epochs={arguments.epochs}"]
                found = seconds.setdefault(name, {"training": [], "search": []})
                found["training"].append(processor_s(checkout, folder, "train.py", *epochs, "output=run"))
                found["search"].append(processor_s(checkout, folder, "search.py", "--run", "run", "--budget", "4"))
    median = {name: {part: float(np.median(s)) for part, s in parts.items()} for name, parts in seconds.items()}
    rows: dict[str, Any] = {
        name: {f"{part}, s": value for part, value in found.items()} for name, found in median.items()
    }
    first, second = median.values()
    rows["this version / the other"] = {f"{part}, s": first[part] / second[part] for part in first}
    show(Console(width=120, highlight=False), "quick start, processor time", rows)
    if arguments.output is not None:
        save(arguments.output, rows, epochs=arguments.epochs, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
