"""What the form of a target costs: one supernet, specialized to each built-in target, at uniform 8 and 4 bits.

    python benchmarks/target_accuracy.py RUN [--json FILE]

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
from rich.table import Table

from eqnet.checkpoint import write_json
from eqnet.nn.specialize import specialize
from eqnet.run import Run, open_data
from eqnet.scoring.evaluation import Evaluator, uniform_configs
from eqnet.space.hardware import load_target, target_names

SPLITS = ["validation", "test"]
WIDTHS = (8, 4)


def measure(run: Run) -> list[dict[str, Any]]:
    """One row for each target and width."""
    supernet, _ = run.load_supernet()
    accelerator = Accelerator()
    supernet.to(accelerator.device)
    trained = Evaluator.from_data(supernet, open_data(run), run.settings, torch.device(accelerator.device))
    rows = []
    for name in target_names():
        target = load_target(name)
        try:
            special = specialize(supernet, target)
        except ValueError as error:
            rows.append({"target": name, "refused": str(error)})
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
            figures = {"form": form.name, "weight_bits": bits, "act_bits": min(acts, default=None)}
            accuracies = {"specialized": dict(zip(SPLITS, special_row.tolist(), strict=True))}
            accuracies |= {"trained": dict(zip(SPLITS, row.tolist(), strict=True))}
            rows.append({"target": name, **figures, **accuracies})
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path, help="default: target_accuracy.json in the run's folder")
    arguments = parser.parse_args()
    rows = measure(Run.open(arguments.run))
    table = Table("target", "form", "W/A bits", title="accuracy [%]: specialized (as trained)", title_justify="left")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for row in rows:
        if "refused" in row:
            table.add_row(row["target"], row["refused"])
            continue
        cells = [f"{row['specialized'][s]:.2f} ({row['trained'][s]:.2f})" for s in SPLITS]
        table.add_row(row["target"], row["form"], f"{row['weight_bits']}/{row['act_bits']}", *cells)
    Console(width=130, highlight=False).print(table)
    write_json(arguments.json or arguments.run / "target_accuracy.json", {"run": arguments.run.name, "rows": rows})


if __name__ == "__main__":
    main()
