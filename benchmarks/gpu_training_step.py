"""What a step of the supernet costs on a GPU, against float steps of the same model in the same precision (its floor).

A supernet step trains three subnets (largest, random, smallest) with guidance and weight distribution regularisation and
updates once; its floor is three plain float steps. Both in bf16 and channels_last, on random images that lie on the GPU;
on a GPU, how steps are launched matters as much as what they compute, so both come as plain calls and as CUDA graphs.

    python -m benchmarks.gpu_training_step [net ...] [--variants variant ...] [--json gpu_training_step.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm
from benchmarks.tables import save, show
from benchmarks.training_step import float_steps, supernet_steps

NETS = {
    "cifar_resnet20, batch 128": ("cifar_resnet20", 32, 128, 10),
    "cifar_resnet20, batch 1024": ("cifar_resnet20", 32, 1024, 10),
    "resnet50, batch 256": ("resnet50", 224, 256, 1000),
    "resnet18, batch 256": ("resnet18", 224, 256, 1000),
    "mobilenetv2, batch 256": ("mobilenetv2_100", 224, 256, 1000),
    "efficientnet_b0, batch 256": ("efficientnet_b0", 224, 256, 1000),
    "deit_tiny, batch 256": ("deit_tiny_patch16_224", 224, 256, 1000),
}
# name: (supernet or float, compile mode, CUDA graph)
VARIANTS = {
    "float": ("float", "off", False),
    "float, CUDA graph": ("float", "off", True),
    "supernet, eager": ("supernet", "off", False),
    "supernet, compiled": ("supernet", "on", False),
    "supernet, compiled, CUDA graph": ("supernet", "on", True),
    "supernet, network compiled, CUDA graph": ("supernet", "network", True),
}
FLOORS = ("float", "float, CUDA graph")
IMAGENET, EPOCHS = 1_281_167, 120  # training images, and the epochs of the recipes in configs/train
ROUNDS = 5


def graphed_float_steps(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Three float steps whose gradients are one CUDA graph."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def gradients() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad()
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        gradients()

    def run() -> None:
        for _ in range(3):
            graph.replay()
            optimizer.step()

    run.inputs = images, labels  # type: ignore[attr-defined]  # kept alive: a graph knows addresses only
    return run


def make_step(net: str, variant: str) -> Callable[[], None]:
    """Three float steps, or one step of the supernet, on fixed random images."""
    name, size, batch, classes = NETS[net]
    kind, mode, graph = VARIANTS[variant]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes).cuda().to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device="cuda")
    if kind == "supernet":
        return supernet_steps(model, images, labels, "bf16", mode, graph)
    return graphed_float_steps(model, images, labels) if graph else float_steps(model, images, labels, "bf16")


def measured(net: str, variant: str) -> dict[str, Any]:
    """Milliseconds of a step with quartiles over rounds, and MiB of memory at most.

    One variant at a time, because the graph of a large network keeps its memory.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = make_step(net, variant)
    for i in range(6):  # graphs are recorded in the fourth
        step()
        if i == 1:  # without what compiling took
            torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    repeat = max(1, round(0.3 / (time.perf_counter() - start)))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeat):
            step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / repeat)
    low, median, high = (float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms": median, "quartiles": [low, high], "peak [MiB]": peak}


def rows_of(net: str, variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Some variants of a network, with ratios to the floors and what the training of a recipe would take."""
    rows: dict[str, dict[str, Any]] = {}
    batch = NETS[net][2]
    for variant in variants:
        try:
            rows[variant] = measured(net, variant)
        except torch.OutOfMemoryError:
            rows[variant] = {"ms": None, "quartiles": None, "peak [MiB]": "out of memory"}
            continue
        ms = rows[variant]["ms"]
        rows[variant] |= {f"/ {floor}": ms / rows[floor]["ms"] for floor in FLOORS if rows.get(floor, {}).get("ms")}
        if "float" in rows:
            rows[variant]["memory / float"] = rows[variant]["peak [MiB]"] / rows["float"]["peak [MiB]"]
        if NETS[net][1] == 224 and variant.startswith("supernet"):
            rows[variant]["images/s"] = 1e3 * batch / ms
            rows[variant][f"hours for {EPOCHS} epochs"] = EPOCHS * IMAGENET * ms / batch / 3.6e6
    return rows


def main() -> None:
    """Measures the networks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help=f"first words of {', '.join(NETS)}; default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="variant")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch; this benchmark needs one")
    console, rows = Console(width=170, highlight=False), {}
    for net in [n for n in NETS if not arguments.nets or n.startswith(tuple(arguments.nets))]:
        rows[net] = rows_of(net, arguments.variants)
        show(console, net, rows[net])
        if arguments.json is not None:  # after each, so that a killed one leaves what it has
            facts = torch.cuda.get_device_properties(0)
            save(arguments.json, rows, gpu=facts.name, cuda=torch.version.cuda)


if __name__ == "__main__":
    main()
