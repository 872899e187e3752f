"""How well short runs rank hyper-parameters: every candidate of a tuning is also trained fully.

    python -m benchmarks.proxy_rank [configs/tune/digits.yaml] [--json FILE]

Prints validation accuracies, Spearman's rank correlation between the order of the rungs and that of full training (with a
bootstrap interval), how far the chosen candidate is from the best and from the unchanged settings, and what it cost. Finished
runs are kept, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from benchmarks.tables import save
from eqnet.command import run_command
from eqnet.tune import Tuned, TuneSettings, show, tune

RESAMPLES = 2000


def correlation(proxy: list[float], full: list[float]) -> tuple[float, float, float]:
    """Spearman's rho and the 90 % interval of a bootstrap over candidates."""
    rng, pairs = np.random.default_rng(0), np.array([proxy, full])
    draws = [pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])] for _ in range(RESAMPLES)]
    rhos = [float(spearmanr(*d).statistic) for d in draws if np.ptp(d, axis=1).all()]
    return (float(spearmanr(*pairs).statistic), *np.quantile(rhos, [0.05, 0.95]).tolist())


def summary(result: Tuned) -> dict[str, float | list[float]]:
    """The figures: correlations, distances in percent of accuracy, share of the cost of training all fully."""
    trained = [i for i in result.order if result.full[i] is not None and result.rungs[0][i] is not None]
    full = [result.full[i] or 0.0 for i in trained]
    first = correlation([result.rungs[0][i] or 0.0 for i in trained], full)
    rungs = correlation([-float(result.order.index(i)) for i in trained], full)
    chosen = result.full[result.order[0]] or 0.0
    return {
        "candidates": len(result.candidates),
        "spearman, first rung": list(first),
        "spearman, order of the rungs": list(rungs),
        "chosen - best [%]": chosen - max(full),
        "chosen - unchanged settings [%]": chosen - (result.full[0] or 0.0),
        "steps of the rungs / of all full trainings": result.steps[0] / (len(result.candidates) * result.steps[1]),
        "with the full training of the chosen": result.cost_ratio,
    }


def main() -> None:
    """Tunes, trains the rest and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", type=Path, default=Path("configs/tune/digits.yaml"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=110, highlight=False)
    result = tune(TuneSettings.load(arguments.job), console, all_fully=True)
    show(result, console)
    figures = summary(result)
    for name, value in figures.items():
        numbers = value if isinstance(value, list) else [value]
        text = f"{numbers[0]:.3g}" + (f" (90 % interval {numbers[1]:.2f} to {numbers[2]:.2f})" if numbers[1:] else "")
        console.print(f"{name}: {text}")
    if arguments.json:
        save(arguments.json, {"rungs": figures})


if __name__ == "__main__":
    run_command(main)
