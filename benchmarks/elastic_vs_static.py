"""Elastic against dedicated: one supernet and static quantization-aware training of the same length, over several seeds.

    python benchmarks/elastic_vs_static.py --seeds 5 --output runs/elastic_vs_static --json docs/elastic_vs_static.json [key=value ...]

For each seed: a float model and its supernet, then from the same float weights static training (LSQ: tensor-sym-sym, LSQ+:
tensor-asym-asym) at 2, 3, 4 and 8 bits with the same steps, batches and learning rates. Prints test accuracy in percent,
mean over seeds and standard deviation. Finished runs are kept, so an interrupted benchmark continues.
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

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
STATIC_BITS = (2, 3, 4, 8)
STATIC_FORMS = {"LSQ": ("tensor-sym-sym", "true"), "LSQ+": ("tensor-asym-asym", "false")}


def train(output: Path, *overrides: str) -> dict:
    """Trains one run unless it is finished, and returns its evaluation."""
    if not (output / "evaluation.json").exists():
        resume = ["--resume"] if (output / "settings.yaml").exists() else []
        command = [sys.executable, str(TRAIN), f"output={output}", "tracking=none", *overrides, *resume]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return read_json(output / "evaluation.json")


def statistics(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    console = Console(width=150, highlight=False)
    floats: list[float] = []
    elastic: dict[str, dict[int, list[float]]] = {}
    static: dict[str, dict[int, list[float]]] = {name: {b: [] for b in STATIC_BITS} for name in STATIC_FORMS}
    for seed in range(arguments.seeds):
        folder = arguments.output / f"seed{seed}"
        common = [f"seed={seed}", *arguments.overrides]
        result = train(folder / "elastic", *common)
        floats.append(result["float"]["test"])
        for row in result["uniform"]:
            elastic.setdefault(row["form"], {}).setdefault(row["bits"], []).append(row["test"])
        for name, (form, symmetric) in STATIC_FORMS.items():
            for bits in STATIC_BITS:
                choices = [f"space.bits=[{bits}]", f"space.symmetric=[{symmetric}]", "space.granularity=[tensor]"]
                weights = f"model.weights={folder / 'elastic' / 'float.safetensors'}"
                (row,) = train(folder / f"static-{form}-{bits}", weights, *choices, *common)["uniform"]
                static[name][bits].append(row["test"])
        console.print(f"seed {seed} done: float {floats[-1]:.2f}")
    bits = sorted(next(iter(elastic.values())))
    table = Table(title=f"test accuracy [%], {arguments.seeds} seeds; float {statistics(floats)}", title_justify="left")
    table.add_column("", no_wrap=True)
    for b in bits:
        table.add_column(f"{b} bit", justify="right", no_wrap=True)
    mean = {b: list(np.mean([elastic[f][b] for f in elastic], axis=0)) for b in bits}
    table.add_row(f"elastic, mean over {len(elastic)} forms", *(statistics(mean[b]) for b in bits))
    for name, (form, _) in STATIC_FORMS.items():
        table.add_row(f"elastic, {form}", *(statistics(elastic[form][b]) for b in bits))
        table.add_row(
            f"static, {form} ({name})", *(statistics(static[name][b]) if b in STATIC_BITS else "" for b in bits)
        )
    pooled = {
        b: [float(np.mean([static[n][b][i] for n in static])) for i in range(arguments.seeds)] for b in STATIC_BITS
    }
    gap = {b: float(np.mean(mean[b]) - np.mean(pooled[b])) for b in STATIC_BITS}
    table.add_row("elastic mean - static mean", *(f"{gap[b]:+.2f}" if b in gap else "" for b in bits))
    table.add_row("elastic mean - float", *(f"{np.mean(mean[b]) - np.mean(floats):+.2f}" for b in bits))
    console.print(table)
    if arguments.json:
        write_json(
            arguments.json, {"float": floats, "elastic": elastic, "static": static, "overrides": arguments.overrides}
        )


if __name__ == "__main__":
    main()
