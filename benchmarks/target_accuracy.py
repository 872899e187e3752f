"""What the form of a target costs: one supernet, specialized to each built-in target, at uniform 8 and 4 bits.

    python -m benchmarks.target_accuracy RUN [--json FILE]

For each target the most precise form that it runs, weights at 8 and at 4 bits, activations at the same or the next higher width
that it runs. Prints validation and test accuracy in percent, specialized and as trained (same config, same BN recalibration):
the difference is what narrow ranges, powers of two and unused codes cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from benchmarks.tables import save, show
from eqnet.nn.specialize import specialize
from eqnet.run import Run, open_data
from eqnet.scoring.evaluation import Evaluator, uniform_configs
from eqnet.space.hardware import load_target, target_names

SPLITS = ["validation", "test"]
WIDTHS = (8, 4)


def measure(run: Run) -> dict[str, Any]:
    """The figures of each target and width, by name."""
    supernet, _ = run.load_supernet()
    accelerator = Accelerator()
    supernet.to(accelerator.device)
    trained = Evaluator.from_data(supernet, open_data(run), run.settings, torch.device(accelerator.device))
    rows: dict[str, Any] = {}
    for name in target_names():
        target = load_target(name)
        try:
            special = specialize(supernet, target)
        except ValueError as error:
            rows[name] = {"form": f"refused: {error}"}
            continue
        found = uniform_configs(special.space)
        # channels before tensors, symmetric before asymmetric weights, asymmetric before symmetric activations
        form = min({f for _, f, _ in found}, key=lambda f: (f.granularity, not f.weight_symmetric, f.act_symmetric))
        configs = {bits: config for bits, f, config in found if f == form and bits in WIDTHS}
        after = trained.of(special).measure_all(list(configs.values()), SPLITS, accelerator)
        before = trained.measure_all(list(configs.values()), SPLITS, accelerator)
        for (bits, config), special_row, row in zip(configs.items(), after, before, strict=True):
            acts = [
                layer.act.bits for n, layer in config.items() if layer.act is not None and n not in special.space.fixed
            ]
            figures = rows[f"{name}, {bits}-bit weights, {min(acts)}-bit inputs"] = {"form": form.name}
            for split, value, was in zip(SPLITS, special_row, row, strict=True):
                figures |= {f"{split} %": f"{value:.2f}", f"as trained, {split} %": f"{was:.2f}"}
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(Run.open(arguments.run))
    show(Console(width=130, highlight=False), "target", rows)
    if arguments.json:
        save(arguments.json, rows)


if __name__ == "__main__":
    main()
