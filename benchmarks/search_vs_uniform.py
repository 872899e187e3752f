"""Searched subnets against the best uniform config within the same budget, over several runs.

    python benchmarks/search_vs_uniform.py --runs runs/a runs/b --budgets 3 4 [--json FILE] [key=value ...]

Runs `search.py` where a run has no result for a budget yet. Prints validation accuracy (which chose both) and test accuracy
in percent, mean over runs, and in how many runs the searched config was measured better on validation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eqnet.checkpoint import read_json, write_json
from eqnet.space import Budget

SEARCH = Path(__file__).resolve().parent.parent / "search.py"


def result(run: Path, budget: str, overrides: list[str]) -> dict:
    """`subnet.json` of the run's first search for the budget."""
    path = run / "search" / str(Budget.parse(budget)).replace("=", "").replace(",", "-") / "subnet.json"
    if not path.exists():
        command = [sys.executable, str(SEARCH), "--budget", budget, "--run", str(run), "tracking=none", *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return read_json(path)


def main() -> None:
    """Searches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", nargs="+", default=["3", "4"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the search")
    arguments = parser.parse_args()
    table = Table(
        "budget", "", "validation", "test", "MBitOps", title=f"{len(arguments.runs)} runs", title_justify="left"
    )
    results: dict[str, list[dict]] = {}
    for budget in arguments.budgets:
        documents = [result(run, budget, arguments.set) for run in arguments.runs]
        pairs = [(d["best_searched"], d["best_uniform"]) for d in documents]
        results[budget] = [{"searched": a, "uniform": b} for a, b in pairs]
        for name, entries in zip(("searched", "uniform"), zip(*pairs, strict=True), strict=True):
            means = [f"{np.mean([e['accuracy'][split] for e in entries]):.2f}" for split in ("validation", "test")]
            table.add_row(budget, name, *means, f"{np.mean([e['cost']['bitops'] for e in entries]) / 1e6:.1f}")
        gaps = [[a["accuracy"][s] - b["accuracy"][s] for a, b in pairs] for s in ("validation", "test")]
        wins = sum(gap > 0 for gap in gaps[0])
        table.add_row(budget, f"difference ({wins} better)", *(f"{np.mean(gap):+.2f}" for gap in gaps), "")
    Console(width=110, highlight=False).print(table)
    if arguments.json:
        for entries in results.values():
            for pair in entries:
                for entry in pair.values():
                    entry.pop("layers")
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
