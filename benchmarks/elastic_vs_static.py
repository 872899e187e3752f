"""Elastic against dedicated: one supernet and static quantization-aware training of the same length, over several seeds.

    python -m benchmarks.elastic_vs_static --seeds 5 --output runs/elastic_vs_static --json digits.json [key=value ...]

For each seed: a float model and its supernet, then from the same float weights static training (LSQ: tensor-sym-sym, LSQ+:
tensor-asym-asym, with calibrated zero points) at a few bit-widths with the same steps, batches and learning rates. Prints test
accuracy in percent, mean over seeds and standard deviation. Finished runs are kept, so an interrupted benchmark continues.
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

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
FORMS = {"LSQ": ("tensor-sym-sym", "true"), "LSQ+": ("tensor-asym-asym", "false")}
Accuracies = dict[str, dict[int, list[float]]]  # by form, then by bit-width, one for each seed


def train(output: Path, *overrides: str) -> Any:
    """Trains one run unless it is finished, and returns its evaluation."""
    if not (output / "evaluation.json").exists():
        resume = ["--resume"] if (output / "settings.yaml").exists() else []
        command = [sys.executable, str(TRAIN), f"output={output}", "tracking=none", *overrides, *resume]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return read_json(output / "evaluation.json")


def compare(floats: list[float], elastic: Accuracies, static: Accuracies) -> dict[str, dict[str, str]]:
    """One row for each form of each training, a column for each bit-width, and the differences of means."""

    def cells(found: dict[int, list[float]]) -> dict[str, str]:
        return {f"{b} bit": statistics(values) for b, values in found.items()}

    bits = sorted(next(iter(elastic.values())))
    mean = {b: [float(v) for v in np.mean([of[b] for of in elastic.values()], axis=0)] for b in bits}
    rows = {f"elastic, mean over {len(elastic)} forms": cells(mean)}
    rows |= {f"elastic, {form}": cells(elastic[form]) for form in elastic}
    for name, of in static.items():
        form = FORMS[name][0]
        rows[f"static, {form} ({name})"] = cells(of)
        gaps = {b: np.mean(elastic[form][b]) - np.mean(of[b]) for b in of}
        rows[f"elastic - static, {form}"] = {f"{b} bit": f"{gap:+.2f}" for b, gap in gaps.items()}
    rows["elastic mean - float"] = {f"{b} bit": f"{np.mean(mean[b]) - np.mean(floats):+.2f}" for b in bits}
    return rows


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], help="of static training")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of static training")
    parser.add_argument("overrides", nargs="*", help="settings of all runs: YAML files and key=value")
    arguments = parser.parse_intermixed_args()
    console = Console(width=150, highlight=False)
    floats: list[float] = []
    elastic: Accuracies = {}
    static: Accuracies = {name: {b: [] for b in arguments.bits} for name in arguments.forms}
    for seed in range(arguments.seeds):
        folder = arguments.output / f"seed{seed}"
        common = [*arguments.overrides, f"seed={seed}"]
        result = train(folder / "elastic", *common)
        floats.append(result["float"]["test"])
        for row in result["uniform"]:
            elastic.setdefault(row["form"], {}).setdefault(row["bits"], []).append(row["test"])
        weights = [f"model.weights={folder / 'elastic' / 'float.safetensors'}", "pretrain.epochs=0"]
        for name in arguments.forms:
            form, symmetric = FORMS[name]
            for bits in arguments.bits:
                choices = [f"space.bits=[{bits}]", f"space.symmetric=[{symmetric}]", "space.granularity=[tensor]"]
                (only,) = train(folder / f"static-{form}-{bits}", *common, *weights, *choices)["uniform"]
                static[name][bits].append(only["test"])
        console.print(f"seed {seed} done: float {floats[-1]:.2f}")
    rows = compare(floats, elastic, static)
    show(console, f"test accuracy [%], {arguments.seeds} seeds, float {statistics(floats)}", rows)
    if arguments.json:
        save(arguments.json, rows, seeds=arguments.seeds, float=statistics(floats))


if __name__ == "__main__":
    main()
