"""What each part of the training of a supernet is worth: the same run with one setting changed, over several seeds.

    python -m benchmarks.ablation --output runs/ablation [--seeds 3] [--variants ...] [--json FILE] [key=value ...]

All variants of a seed start from the same float weights. Prints test accuracy in percent of uniform bit-widths, mean over all
forms, then over seeds, with the standard deviation, and the difference to the default at 2 bits in pairs of equal seeds.
Finished runs are kept, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.elastic_vs_static import train
from benchmarks.tables import save, show, statistics

VARIANTS = {
    "default": [],
    "no WDR-Loss": ["train.kurtosis=0", "train.skewness=0"],  # EQ-Net table 3
    "kurtosis alone": ["train.skewness=0"],
    "skewness alone": ["train.kurtosis=0"],
    "hard labels alone": ["train.guidance=0"],  # no GPG-Loss
    "guidance alone": ["train.guidance=1"],
    "guided by the largest": ["train.guided_by=largest"],
    "guided by the float model": ["train.teacher=float"],
    "two random subnets": ["train.num_random=2"],
    "one form per net": ["train.form_per=net"],
    "EMA": ["train.ema_decay=0.99"],
    "triple learning rate of step sizes": ["train.step_size_lr=0.003"],
    "a third of it": ["train.step_size_lr=0.0003"],
}


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings of all runs: YAML files and key=value")
    arguments = parser.parse_intermixed_args()
    variants = ["default", *(name for name in arguments.variants if name != "default")]
    console = Console(width=150, highlight=False)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in variants}
    for seed in range(arguments.seeds):
        for name in variants:
            folder, weights = arguments.output / f"seed{seed}", []
            if name != "default":
                weights = [f"model.weights={folder / 'default' / 'float.safetensors'}", "pretrain.epochs=0"]
            run = folder / name.replace(" ", "-")
            rows = train(run, *arguments.overrides, f"seed={seed}", *weights, *VARIANTS[name])["uniform"]
            for bits in sorted({row["bits"] for row in rows}):
                mean = float(np.mean([row["test"] for row in rows if row["bits"] == bits]))
                found[name].setdefault(bits, []).append(mean)
            console.print(
                f"seed {seed}, {name}: " + "  ".join(f"{b} bit {v[seed]:.2f}" for b, v in found[name].items())
            )
    table = {}
    for name, accuracies in found.items():
        table[name] = {f"{bits} bit": statistics(values) for bits, values in accuracies.items()}
        lowest = min(accuracies)
        pairs = [a - b for a, b in zip(accuracies[lowest], found["default"][lowest], strict=True)]
        table[name][f"against the default, {lowest} bit"] = "" if name == "default" else statistics(pairs, "+.2f")
    show(console, f"test accuracy [%], {arguments.seeds} seeds", table)
    if arguments.json:
        save(arguments.json, table, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
