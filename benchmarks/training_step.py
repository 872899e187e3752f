"""What a step of the supernet costs, against float steps of the same model (its floor).

A supernet step trains three subnets (largest, random, smallest) with guidance and weight distribution regularisation and
updates once. Its floor is three plain float steps with the same layout and precision. 1.00 is three plain float32 steps in
contiguous layout, which is what most people train with.

    python -m benchmarks training_step [--short] [--output folder]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm
from benchmarks.timing import interleave
from eqnet.nn.kernels import choose_kernels
from eqnet.nn.supernet import Supernet
from eqnet.settings import TrainSettings
from eqnet.space import SandwichSampler
from eqnet.training.optimizer import SupernetAdamW, parameter_groups
from eqnet.training.step import supernet_step

NETS = {
    "resnet18, 224 px, batch 16": ("resnet18", 224, 16, 1000),
    "cifar_resnet20, 32 px, batch 128": ("cifar_resnet20", 32, 128, 10),
}
SHORT = {"cifar_resnet20, 16 px, batch 8": ("cifar_resnet20", 16, 8, 10)}
# name: (supernet or float, compile mode, precision, layout)
VARIANTS = {
    "float32, contiguous": ("float", "off", "fp32", torch.contiguous_format),
    "float32, channels_last": ("float", "off", "fp32", torch.channels_last),
    "bf16, channels_last": ("float", "off", "bf16", torch.channels_last),
    "supernet float32, eager": ("supernet", "off", "fp32", torch.channels_last),
    "supernet float32, compiled": ("supernet", "on", "fp32", torch.channels_last),
    "supernet bf16, eager": ("supernet", "off", "bf16", torch.channels_last),
    "supernet bf16, compiled": ("supernet", "on", "bf16", torch.channels_last),
}
FLOORS = {"fp32": "float32, channels_last", "bf16": "bf16, channels_last"}
UNIT = "float32, contiguous"


def make_step(net: str, variant: str) -> Callable[[], None]:
    """Three float steps, or one step of the supernet, on fixed random images."""
    name, size, batch, classes = {**NETS, **SHORT}[net]
    kind, mode, precision, layout = VARIANTS[variant]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes).to(memory_format=layout).train()
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
    labels = torch.randint(0, classes, (batch,))
    return (
        float_steps(model, images, labels, precision)
        if kind == "float"
        else supernet_steps(model, images, labels, precision, mode)
    )


def float_steps(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable[[], None]:
    """Three plain steps."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def run() -> None:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def supernet_steps(model: nn.Module, images: Tensor, labels: Tensor, precision: str, mode: Any) -> Callable[[], None]:
    """One step of the supernet; the configs change every time."""
    settings = TrainSettings()
    supernet = Supernet.from_model(model, tuple(images.shape[1:])).to(memory_format=torch.channels_last)
    supernet.use_kernels(choose_kernels(mode, images.device))
    supernet.calibrate(images[:8])
    supernet.train()
    AcceleratorState._reset_state(True)  # one process measures several precisions
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
    groups = parameter_groups(
        supernet, supernet.step_sizes(), supernet.offsets(), lr=1e-4, step_size_lr=1e-4, weight_decay=0.0
    )
    prepared, optimizer = accelerator.prepare(supernet, SupernetAdamW(groups))
    sampler = SandwichSampler(supernet.space, num_random=settings.num_random, form_per=settings.form_per)
    generator = np.random.default_rng(0)

    def run() -> None:
        configs = sampler.sample(generator)
        supernet_step(accelerator, prepared, supernet, images, labels, configs, F.cross_entropy, settings)
        optimizer.step()
        optimizer.zero_grad()

    return run


def peak_memory(net: str, variant: str) -> float:
    """Peak resident memory in MiB of a process that runs the variant three times."""
    command = [sys.executable, "-m", "benchmarks.training_step", net, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def run(short: bool) -> dict[str, Any]:
    """Seconds, ratios and memory of all variants of both networks."""
    out: dict[str, Any] = {}
    for net in SHORT if short else NETS:
        timings = interleave(
            {v: make_step(net, v) for v in VARIANTS}, rounds=1 if short else 9, warmup=1 if short else 2
        )
        rows = {}
        for variant, timing in timings.items():
            unit, floor = timings[UNIT].median, timings[FLOORS[VARIANTS[variant][2]]].median
            rows[variant] = {
                "seconds": timing.median,
                "quartiles": [timing.low, timing.high],
                "against float32 contiguous": timing.median / unit,
                "against its floor": timing.median / floor,
            }
            if not short:
                rows[variant]["peak memory [MiB]"] = peak_memory(net, variant)
        out[net] = rows
    return out


if __name__ == "__main__":
    step = make_step(sys.argv[1], sys.argv[2])
    for _ in range(3):
        step()
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
