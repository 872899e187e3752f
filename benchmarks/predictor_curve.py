"""How the predictor's rank quality grows with the accuracy table of a run.

    python -m benchmarks.predictor_curve --run runs/NAME [--sizes 100 200 500 1000] [--seeds 5] [--json FILE]

Uses the rows that `search.py` has measured. For each seed a fifth of all rows is held out; the predictor is fitted on the
first `size` of the other rows and compared with the held-out measurements: ranks and error by accuracy, ranks by divergence. Prints
the mean over seeds, for predictors that learn from divergences, as searches do, or from accuracies, the latter also with the
paper's recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.tables import save, show
from eqnet.checkpoint import read_json
from eqnet.scoring.evaluation import DIVERGENCE, VALIDATION
from eqnet.scoring.predictor import PAPER_RECIPE, PredictorRecipe, table_size_curve
from eqnet.scoring.table import AccuracyTable, read_rows, table_genomes
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
    known = dict(read_rows(arguments.run / "table", (VALIDATION, DIVERGENCE)))
    rows = next(i for i in range(len(known) + 1) if i not in known)  # complete from the first row on
    genomes = table_genomes(space, rows, read_json(arguments.run / "table" / "header.json")["seed"])
    table = AccuracyTable(genomes, *np.array([known[i] for i in range(rows)]).T)
    largest = rows - rows // 5
    sizes = sorted({*(s for s in arguments.sizes if s < largest), largest})
    learned = {
        "from divergence": (table.labels("divergence"), PredictorRecipe()),
        "from accuracy": (table.accuracy, PredictorRecipe()),
        "from accuracy, paper's recipe": (table.accuracy, PAPER_RECIPE),
    }
    curves: dict[str, dict[str, float]] = {}
    for name, (labels, recipe) in learned.items():
        by_accuracy, by_divergence = (
            [
                table_size_curve(space, genomes, labels, sizes, seed=seed, recipe=recipe, measured=truth)
                for seed in range(arguments.seeds)
            ]
            for truth in (table.accuracy, -table.divergence)
        )
        for i, size in enumerate(sizes):
            mean = {column: float(np.mean([curve[i][key] for curve in by_accuracy])) for key, column in COLUMNS.items()}
            mean["Kendall by divergence"] = float(np.mean([curve[i]["kendall"] for curve in by_divergence]))
            curves[f"{name}, {size} rows"] = mean
    low, middle, high = np.percentile(table.accuracy, [5, 50, 95])
    spread = f"accuracy 5th/50th/95th percentile {low:.1f}/{middle:.1f}/{high:.1f} %"
    show(Console(width=110, highlight=False), f"{rows} rows, {spread}; {arguments.seeds} seeds", curves)
    if arguments.json:
        save(arguments.json, curves, configs=rows, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
