"""Searched subnets against the best uniform config within the same budget, over several runs.

    python -m benchmarks.search_vs_uniform --runs runs/a runs/b --budgets 3 4 bitops=30M [--json FILE] [--set key=value ...]

Runs `search.py` where a run has no result for a budget and `search.measure` yet. Prints validation and test accuracy in percent and
the divergence from the largest subnet, mean over runs, and in how many runs the searched config was better on the test split.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.tables import save, show, statistics
from eqnet.checkpoint import read_json
from eqnet.settings import load_settings
from eqnet.space import Budget

SEARCH = Path(__file__).resolve().parent.parent / "search.py"
SPLITS = ("validation", "test")


def result(run: Path, budget: str, overrides: list[str]) -> Any:
    """`subnet.json` of the run's first search for the budget by the measure that the overrides ask for."""
    stem, measure = (
        str(Budget.parse(budget)).replace("=", "").replace(",", "-"),
        load_settings(overrides).search.measure,
    )

    def found() -> list[Any]:
        paths = [run / "search" / stem / "subnet.json", *sorted((run / "search").glob(f"{stem}-[0-9]/subnet.json"))]
        return [d for d in (read_json(path) for path in paths if path.exists()) if d.get("measure") == measure]

    if not found():
        command = [sys.executable, str(SEARCH), "--budget", budget, "--run", str(run), "tracking=none", *overrides]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return found()[0]


def compare(documents: list[Any]) -> dict[str, dict[str, str]]:
    """The best searched and the best uniform config of each run within one budget: accuracies, what they cost, differences."""
    pairs = [(d["best_searched"], d["best_uniform"]) for d in documents]
    rows = {}
    for name, entries in zip(("searched", "uniform"), zip(*pairs, strict=True), strict=True):
        accuracies = {f"{s} %": statistics([e["accuracy"][s] for e in entries]) for s in SPLITS}
        costs = {key: np.mean([e["cost"][key] for e in entries]) for key in ("w", "a", "bitops")}
        bits = {"mean bits": f"{costs['w']:.2f} / {costs['a']:.2f}", "MBitOps": f"{costs['bitops'] / 1e6:.1f}"}
        divergences = {"divergence": statistics([e["divergence"] for e in entries], ".4f")}
        rows[name] = accuracies | divergences | bits
    gaps = {s: [a["accuracy"][s] - b["accuracy"][s] for a, b in pairs] for s in SPLITS}
    wins = sum(gap > 0 for gap in gaps["test"])
    better = f"difference ({wins} of {len(pairs)} better)"
    return rows | {better: {f"{s} %": f"{np.mean(gap):+.2f}" for s, gap in gaps.items()}}


def main() -> None:
    """Searches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", nargs="+", default=["3", "4"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the search")
    arguments = parser.parse_args()
    rows = {
        f"budget {budget}": compare([result(run, budget, arguments.set) for run in arguments.runs])
        for budget in arguments.budgets
    }
    show(Console(width=110, highlight=False), f"{len(arguments.runs)} runs", rows)
    if arguments.json:
        save(arguments.json, rows, runs=len(arguments.runs))


if __name__ == "__main__":
    main()
