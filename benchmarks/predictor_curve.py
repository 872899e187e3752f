"""How the predictor's rank quality grows with the accuracy table of a run.

    python benchmarks/predictor_curve.py --run runs/NAME [--sizes 100 200 500 1000] [--seeds 5] [--json FILE]

Uses the rows that `search.py` has measured. For each seed a fifth of all rows is held out; the predictor is fitted on the
first `size` of the other rows and compared with the held-out measurements. Prints the mean over seeds, for the default
recipe and for the paper's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eqnet.checkpoint import read_json, write_json
from eqnet.scoring.evaluation import read_rows, table_genomes
from eqnet.scoring.predictor import PAPER_RECIPE, PredictorRecipe, table_size_curve
from eqnet.space import QuantSpace


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
    results: dict[str, list[dict[str, float]]] = {}
    low, middle, high = np.percentile(measured, [5, 50, 95])
    title = (
        f"{rows} rows, accuracy 5th/50th/95th percentile {low:.1f}/{middle:.1f}/{high:.1f} %; {arguments.seeds} seeds"
    )
    table = Table("recipe", "rows fitted", "Kendall", "Spearman", "Pearson", "RMSE", title=title, title_justify="left")
    for name, recipe in recipes.items():
        curves = [
            table_size_curve(space, genomes, measured, sizes, seed=seed, recipe=recipe)
            for seed in range(arguments.seeds)
        ]
        results[name] = []
        for points in zip(*curves, strict=True):
            mean = {key: float(np.mean([p[key] for p in points])) for key in points[0]}
            results[name].append(mean)
            figures = (f"{mean[key]:.3f}" for key in ("kendall", "spearman", "pearson", "rmse"))
            table.add_row(name, f"{mean['rows']:.0f}", *figures)
    Console(width=110, highlight=False).print(table)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "seeds": arguments.seeds, "curves": results})


if __name__ == "__main__":
    main()
