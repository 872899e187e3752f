"""One trained supernet, many devices: the best subnet for each target and budget, and how long it takes to find.

    python -m benchmarks.target_search RUN [--targets NAME ...] [--budgets BUDGET ...] [--json FILE] [--set key=value ...]

Runs `search.py --target` for each target and budget, once before that without a target, so that the accuracy table and the
predictor exist. Prints accuracy in percent of the result and of the best uniform config within the budget, and the seconds from
the start of the command to the saved subnet.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.tables import save, show
from eqnet.checkpoint import read_json

SEARCH = Path(__file__).resolve().parent.parent / "search.py"
TARGETS = ["onnxruntime-x86", "openvino-cpu", "tensorrt", "vitis-ai", "qualcomm-dsp"]


def search(run: Path, budget: str, target: str | None, overrides: list[str]) -> tuple[dict[str, Any], float]:
    """The subnet that a search saved, and its seconds."""
    before = set((run / "search").glob("*/subnet.json"))
    command = [sys.executable, str(SEARCH), "--budget", budget, "--run", str(run), "tracking=none", *overrides]
    start = time.perf_counter()
    done = subprocess.run(command + (["--target", target] if target else []), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    (subnet,) = set((run / "search").glob("*/subnet.json")) - before
    return read_json(subnet), seconds


def main() -> None:
    """Searches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--budgets", nargs="+", default=["w=4", "w=3"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the search")
    arguments = parser.parse_args()
    search(arguments.run, arguments.budgets[0], None, arguments.set)
    rows: dict[str, Any] = {}
    for target in arguments.targets:
        for budget in arguments.budgets:
            subnet, seconds = search(arguments.run, budget, target, arguments.set)
            row = rows[f"{target}, {budget}"] = {"form": subnet["form"], "seconds": seconds}
            for name, side in (("searched", subnet), ("uniform", subnet["best_uniform"])):
                for split in ("validation", "test"):
                    row[f"{name}, {split} %"] = None if side is None else f"{side['accuracy'][split]:.2f}"
    show(Console(width=130, highlight=False), "target and budget", rows)
    if arguments.json:
        save(arguments.json, rows)


if __name__ == "__main__":
    main()
