"""Step sizes per tensor, learned or derived from those per channel (EQ-Net table 4), on a trained supernet.

    python -m benchmarks.derived_steps --run runs/NAME [--bits 2 4 8] [--json FILE]

Test accuracy in percent of uniform bit-widths in symmetric forms. Derived step sizes of weights are the smallest, mean or largest
of the layer's channels; those of inputs are the same everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.tables import save, show
from eqnet.command import keep_freed_memory
from eqnet.nn.compiled import choose_kernels
from eqnet.nn.layers import ElasticLayer
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, open_data
from eqnet.scoring.evaluation import Evaluator
from eqnet.space import Form

REDUCED: dict[str, Callable[[Tensor], Tensor]] = {"smallest": torch.amin, "mean": torch.mean, "largest": torch.amax}


@torch.no_grad()
def derive(supernet: Supernet, reduced: Callable[[Tensor], Tensor]) -> None:
    """Replaces the step sizes of weights in symmetric per-tensor formats by those of the channels, reduced to one."""
    for layer in supernet.modules():
        if not isinstance(layer, ElasticLayer):
            continue
        quantizer = layer.weight_quantizer
        for fmt, row in quantizer.rows.items():
            if fmt.symmetric and fmt.granularity == "tensor":
                channel = quantizer.rows[replace(fmt, granularity="channel")]
                quantizer.scale[quantizer.index[row, 0]] = reduced(quantizer.scale[quantizer.index[channel]])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    run = Run.open(arguments.run)
    data, device = open_data(run), torch.device("cpu")
    rows: dict[str, dict[str, float]] = {}
    cases = {"per channel, learned": ("channel", None), "per tensor, learned": ("tensor", None)}
    cases |= {f"per tensor, {name} of the channels": ("tensor", reduced) for name, reduced in REDUCED.items()}
    for title, (granularity, reduced) in cases.items():
        supernet = run.load_supernet()[0].to(memory_format=torch.channels_last)
        supernet.use_kernels(choose_kernels("auto", device))
        if reduced is not None:
            derive(supernet, reduced)
        evaluator = Evaluator.from_data(supernet, data, run.settings, device)
        configs = {b: supernet.space.uniform(b, Form.parse(f"{granularity}-sym-sym")) for b in arguments.bits}
        rows[title] = {f"{b} bit": evaluator.measure(config, "test")[0] for b, config in configs.items()}
    show(Console(width=110, highlight=False), "test accuracy [%]", rows)
    if arguments.json:
        save(arguments.json, rows)


if __name__ == "__main__":
    main()
