"""Predicted against measured latency: tables of layers summed, beside whole networks of random configs.

    python -m benchmarks.latency_prediction [--target NAME] [--configs 30] [--output FILE.json]

CIFAR ResNet-20 at 32 px and ResNet-18 at 224 px with random weights, which take the time of trained ones; one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets
from benchmarks.tables import save
from eqnet.command import progress_bar
from eqnet.deploy.latency import count_networks, measure_latency
from eqnet.nn.supernet import Supernet
from eqnet.space.hardware import load_target

NETS = {"cifar_resnet20": 32, "resnet18": 224}


def measure(name: str, size: int, target_name: str, configs: int, rounds: int, console: Console) -> dict[str, Any]:
    """The check of one network, with the facts of its table."""
    torch.manual_seed(0)
    supernet = Supernet.from_model(timm.create_model(name), (3, size, size), bits=[2, 4, 8])
    supernet.calibrate(torch.randn(1, 3, size, size))
    target = load_target(target_name)
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(console, name, count_networks(supernet, target, configs)) as advance,
    ):
        file = Path(folder) / "table.json"
        table, check = measure_latency(
            supernet.eval(), target, (3, size, size), file, configs=configs, rounds=rounds, progress=advance
        )
    console.print(f"{name}, {size} px, {target_name}: {check.describe()}", soft_wrap=True)
    slowest, fastest = max(check.measured), min(check.measured)
    return {
        "entries of the table": len(table.entries),
        "configs": len(check.measured),
        "measured, ms": [fastest, slowest],
        "Spearman": check.spearman,
        "mean error, %": 100 * check.mean_error,
        "noise, %": 100 * check.noise,
    }


def main() -> None:
    """Prints one line for each network and writes all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="onnxruntime-x86", help="onnxruntime-x86 or openvino-cpu")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--configs", type=int, default=30, help="random configs")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each network")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/latency_prediction.json"))
    arguments = parser.parse_args()
    console = Console(width=170, highlight=False)
    rows = {
        name: measure(name, NETS[name], arguments.target, arguments.configs, arguments.rounds, console)
        for name in arguments.nets
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save(arguments.output, rows, target=arguments.target, rounds=arguments.rounds)
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
