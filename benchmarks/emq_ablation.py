"""What the parts of the evolution of proxies are worth: several seeds with and without each, on one table.

    python benchmarks/emq_ablation.py TABLE.csv [--seeds 5] [--evaluations 1000] [--json FILE]

Prints, for each variant, Spearman's correlation of the best proxy on the search half and on the held-out half (mean and standard
deviation over seeds), the share of evaluations wasted on trees that are invalid or order configs like another, and seconds for
each seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eqnet.checkpoint import write_json
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
    table = Table("", "search half", "held-out half", "wasted [%]", "seconds")
    for name, rows in figures.items():
        rho = [f"{np.mean(rows[half]):.3f} ± {np.std(rows[half]):.3f}" for half in ("search half", "held-out half")]
        table.add_row(name, *rho, f"{100 * np.mean(rows['wasted']):.1f}", f"{np.mean(rows['seconds']):.0f}")
    Console(width=110).print(table)
    if arguments.json:
        write_json(
            arguments.json, {"table": arguments.table.name, "evaluations": arguments.evaluations, "variants": figures}
        )


if __name__ == "__main__":
    run_command(main)
