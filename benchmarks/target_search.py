"""One trained supernet, many devices: the best subnet for each target and budget, and how long it takes to find.

    python benchmarks/target_search.py RUN [--targets NAME ...] [--budgets BUDGET ...] [--json FILE] [--set key=value ...]

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
from rich.table import Table

from eqnet.checkpoint import read_json, write_json

SEARCH = Path(__file__).resolve().parent.parent / "search.py"
TARGETS = ["onnxruntime-x86", "openvino-cpu", "tensorrt", "vitis-ai", "qualcomm-dsp"]


def search(run: Path, budget: str, target: str | None, overrides: list[str]) -> tuple[dict[str, Any], float]:
    """The subnet that a search saved, and its seconds."""
    before = set((run / "search").glob("*"))
    command = [sys.executable, str(SEARCH), "--budget", budget, "--run", str(run), "tracking=none", *overrides]
    start = time.perf_counter()
    done = subprocess.run(command + (["--target", target] if target else []), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    (folder,) = set((run / "search").glob("*")) - before
    return read_json(folder / "subnet.json"), seconds


def main() -> None:
    """Searches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--budgets", nargs="+", default=["w=4", "w=3"])
    parser.add_argument("--json", type=Path, help="default: target_search.json in the run's folder")
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the search")
    arguments = parser.parse_args()
    search(arguments.run, arguments.budgets[0], None, arguments.set)
    table = Table("target", "budget", "seconds", title="accuracy [%]", title_justify="left")
    for name in ("validation", "test", "uniform validation", "uniform test"):
        table.add_column(name, justify="right")
    rows = []
    for target in arguments.targets:
        for budget in arguments.budgets:
            subnet, seconds = search(arguments.run, budget, target, arguments.set)
            uniform = None if subnet["best_uniform"] is None else subnet["best_uniform"]["accuracy"]
            best = subnet["accuracy"]
            row = {"target": target, "budget": budget, "seconds": seconds, "best": best, "uniform": uniform}
            rows.append(row | {"cost": subnet["cost"], "form": subnet["form"]})
            cells = [
                f"{side[split]:.2f}" if side else "none" for side in (best, uniform) for split in ("validation", "test")
            ]
            table.add_row(target, budget, f"{seconds:.1f}", *cells)
    Console(width=110, highlight=False).print(table)
    write_json(arguments.json or arguments.run / "target_search.json", {"run": arguments.run.name, "rows": rows})


if __name__ == "__main__":
    main()
