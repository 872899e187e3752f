"""What the parts of the evolution of proxies are worth: several seeds with and without each, on one table.

    python -m benchmarks.emq_ablation TABLE.csv [--seeds 5] [--evaluations 1000] [--json FILE]

Prints, for each variant, Spearman's correlation of the best proxy on the search half and on the held-out half (mean and standard
deviation over seeds), the share of evaluations wasted on trees that are invalid or order configs like another, and seconds for
each seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.tables import save, show
from eqnet.command import run_command
from eqnet.proxy_commands import open_benchmark
from eqnet.scoring.emq import EvolutionSettings, evolve
from eqnet.scoring.predictor import rank_metrics

VARIANTS: dict[str, dict[str, bool]] = {
    "all parts": {},
    "without screening": {"screening": False},
    "without diversity selection": {"diversity": False},
    "without prioritisation": {"priority": False},
    "without additive scores": {"scores": False},
}


def measure(table: Path, seeds: int, evaluations: int) -> dict[str, dict[str, list[float]]]:
    """Variant -> figure -> its values by seed."""
    benchmark, statistics = open_benchmark(table)
    genomes, accuracy = benchmark.half(search=False)
    figures: dict[str, dict[str, list[float]]] = {}
    for name, changes in VARIANTS.items():
        rows = figures[name] = {"search half": [], "held-out half": [], "wasted": [], "seconds": []}
        for seed in range(seeds):
            start = time.perf_counter()
            found = evolve(benchmark, statistics, EvolutionSettings(evaluations=evaluations, **changes), seed)
            rows["seconds"].append(time.perf_counter() - start)
            rows["search half"].append(abs(found.best.spearman))
            rows["held-out half"].append(rank_metrics(found.proxy().scores(statistics, genomes), accuracy)["spearman"])
            rows["wasted"].append(found.wasted / found.evaluations)
    return figures


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.table, arguments.seeds, arguments.evaluations)
    rows: dict[str, Any] = {}
    for name, values in figures.items():
        row = rows[name] = {}
        for half in ("search half", "held-out half"):
            row[f"Spearman, {half}"] = f"{np.mean(values[half]):.3f} ± {np.std(values[half], ddof=1):.3f}"
        row |= {"wasted %": f"{100 * np.mean(values['wasted']):.1f}", "seconds": f"{np.mean(values['seconds']):.0f}"}
    show(Console(width=110, highlight=False), "evolution", rows)
    if arguments.json:
        save(arguments.json, rows, seeds=arguments.seeds, evaluations=arguments.evaluations)


if __name__ == "__main__":
    run_command(main)
