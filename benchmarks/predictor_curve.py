"""How the predictor's rank quality grows with the accuracy table of a run.

    python -m benchmarks.predictor_curve --run runs/NAME [--sizes 100 200 500 1000] [--seeds 5] [--json FILE]

Uses the rows that `search.py` has measured. For each seed a fifth of all rows is held out; the predictor is fitted on the
first `size` of the other rows and compared with the held-out measurements. Prints the mean over seeds, for the default
recipe and for the paper's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.tables import save, show
from eqnet.checkpoint import read_json
from eqnet.scoring.evaluation import read_rows, table_genomes
from eqnet.scoring.predictor import PAPER_RECIPE, PredictorRecipe, table_size_curve
from eqnet.space import QuantSpace

COLUMNS = {"kendall": "Kendall", "spearman": "Spearman", "pearson": "Pearson", "rmse": "RMSE, points"}


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 500, 1000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    space = QuantSpace.from_json(read_json(arguments.run / "supernet.json")["space"])
    known = dict(read_rows(arguments.run / "table"))
    rows = next(i for i in range(len(known) + 1) if i not in known)  # complete from the first row on
    genomes = table_genomes(space, rows, read_json(arguments.run / "table" / "header.json")["seed"])
    measured = np.array([known[i] for i in range(rows)])
    largest = rows - rows // 5
    sizes = sorted({*(s for s in arguments.sizes if s < largest), largest})
    recipes = {"default": PredictorRecipe(), "paper": PAPER_RECIPE}
    curves: dict[str, dict[str, float]] = {}
    for name, recipe in recipes.items():
        found = [
            table_size_curve(space, genomes, measured, sizes, seed=seed, recipe=recipe)
            for seed in range(arguments.seeds)
        ]
        for points in zip(*found, strict=True):
            mean = {column: float(np.mean([p[key] for p in points])) for key, column in COLUMNS.items()}
            curves[f"{name}, {points[0]['rows']:.0f} rows"] = mean
    low, middle, high = np.percentile(measured, [5, 50, 95])
    spread = f"accuracy 5th/50th/95th percentile {low:.1f}/{middle:.1f}/{high:.1f} %"
    show(Console(width=110, highlight=False), f"{rows} rows, {spread}; {arguments.seeds} seeds", curves)
    if arguments.json:
        save(arguments.json, curves, configs=rows, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
