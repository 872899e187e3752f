"""What a step of the supernet costs, against float steps of the same model (its floor).

A supernet step trains three subnets (largest, random, smallest) with guidance and weight distribution regularisation and
updates once. Its floor is three plain float steps with the same layout and precision. 1.00 is three plain float32 steps in
contiguous layout, which is what most people train with. Variants in bf16 are left out on a CPU without bf16 instructions, those
whose forward passes run on integers on one without integer kernels.

    python -m benchmarks training_step [--full | --short] [--output folder]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm
from benchmarks.timing import Size, interleave, nets_of, ratio
from eqnet.nn.compiled import choose_kernels, traced_kernels
from eqnet.nn.integer import kernels_available
from eqnet.nn.integer_training import use_integers
from eqnet.nn.supernet import Supernet
from eqnet.settings import TrainSettings
from eqnet.space import SandwichSampler
from eqnet.training.cuda_graph import GraphedGradients
from eqnet.training.optimizer import SupernetAdamW, parameter_groups
from eqnet.training.step import supernet_step

NETS = {
    "resnet18, 224 px, batch 16": ("resnet18", 224, 16, 1000),
    "cifar_resnet20, 32 px, batch 128": ("cifar_resnet20", 32, 128, 10),
}
GROWTH = {
    "cifar_resnet20, 32 px, batch 16": ("cifar_resnet20", 32, 16, 10),
    "cifar_resnet20, 32 px, batch 256": ("cifar_resnet20", 32, 256, 10),
    "cifar_resnet56, 32 px, batch 64": ("cifar_resnet56", 32, 64, 10),
}
SHORT = {"cifar_resnet20, 16 px, batch 8": ("cifar_resnet20", 16, 8, 10)}
# name: (supernet or float, compile mode, precision, layout)
VARIANTS = {
    "float32, contiguous": ("float", "off", "fp32", torch.contiguous_format),
    "float32, channels_last": ("float", "off", "fp32", torch.channels_last),
    "bf16, channels_last": ("float", "off", "bf16", torch.channels_last),
    "supernet float32, eager": ("supernet", "off", "fp32", torch.channels_last),
    "supernet float32, compiled": ("supernet", "on", "fp32", torch.channels_last),
    "supernet float32, integers": ("supernet", "integers", "fp32", torch.channels_last),
    "supernet float32, network compiled": ("supernet", "network", "fp32", torch.channels_last),
    "supernet bf16, eager": ("supernet", "off", "bf16", torch.channels_last),
    "supernet bf16, compiled": ("supernet", "on", "bf16", torch.channels_last),
    "supernet bf16, integers": ("supernet", "integers", "bf16", torch.channels_last),
    "supernet bf16, network compiled": ("supernet", "network", "bf16", torch.channels_last),
}
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant[2] != "bf16"}
if not kernels_available():
    VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant[1] != "integers"}
FLOORS = {"fp32": "float32, channels_last", "bf16": "bf16, channels_last"}
UNIT = "float32, contiguous"


def make_step(net: str, variant: str) -> Callable[[], None]:
    """Three float steps, or one step of the supernet, on fixed random images."""
    name, size, batch, classes = {**NETS, **GROWTH, **SHORT}[net]
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
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def supernet_steps(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str, mode: Any, graph: bool = False
) -> Callable[[], None]:
    """One step of the supernet, on request with its gradients as a CUDA graph; the configs change every time."""
    settings = TrainSettings()
    supernet = Supernet.from_model(model, tuple(images.shape[1:])).to(memory_format=torch.channels_last)
    if mode == "network":
        supernet.use_kernels(traced_kernels())
    else:
        supernet.use_kernels(choose_kernels("on" if mode == "integers" else mode, images.device))
    if mode == "integers":
        use_integers(supernet)
    supernet.calibrate(images[:8])
    supernet.train()
    AcceleratorState._reset_state(reset_partial_state=True)  # one process measures several precisions
    accelerator = Accelerator(cpu=images.device.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    groups = parameter_groups(supernet, supernet.step_sizes(), lr=1e-4, step_size_lr=1e-4, weight_decay=0.0)
    prepared, optimizer = accelerator.prepare(supernet, SupernetAdamW(groups))
    if mode == "network":
        prepared = torch.compile(prepared, dynamic=False)
    sampler = SandwichSampler(supernet.space, num_random=settings.num_random, form_per=settings.form_per)
    generator = np.random.default_rng(0)

    def gradients(model: nn.Module, images: Tensor, labels: Tensor, configs: Sequence[Any]) -> dict[str, Tensor]:
        return supernet_step(accelerator, model, supernet, images, labels, configs, F.cross_entropy, settings)

    compute = GraphedGradients(supernet, gradients) if graph else gradients

    def run() -> None:
        compute(prepared, images, labels, sampler.sample(generator))
        optimizer.step()
        optimizer.zero_grad()

    return run


PARTS = {  # where the time goes: operations as the profiler names them
    "convolutions": (
        *("aten::mkldnn_convolution", "aten::convolution_backward", "aten::addmm", "aten::mm"),
        *("onednn::qconv2d_pointwise", "onednn::qlinear_pointwise"),
    ),
    "batch norm": ("aten::native_batch_norm", "aten::native_batch_norm_backward"),
    "activation functions": ("aten::threshold_backward", "aten::relu"),
    "quantizers": ("_FakeQuantize", "_FakeQuantizeBackward"),
    "WDR": ("_Moments", "_MomentsBackward"),
    "optimizer": ("Optimizer.step#SupernetAdamW.step", "Optimizer.step#AdamW.step"),
}


INTEGER_LAYERS = ("_IntegerLayer", "_IntegerLayerBackward")


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Shares of a step, in percent of its time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    spent = {e.key: e.cpu_time_total for e in events}
    shares = {part: 100 * sum(spent.get(name, 0.0) for name in names) / total for part, names in PARTS.items()}
    whole = sum(spent.get(name, 0.0) for name in INTEGER_LAYERS)
    if whole:  # what is left of such layers quantizes and packs
        shares["quantizers"] = 100 * whole / total - shares["convolutions"]
    return {**shares, "everything else": 100 - sum(shares.values())}


def measured(net: str, variants: Iterable[str], rounds: int, warmup: int) -> dict[str, dict[str, Any]]:
    """One row per variant: seconds with quartiles, and ratios against the unit and the floor where those are variants."""
    timings = interleave({v: make_step(net, v) for v in variants}, rounds, warmup)
    rows: dict[str, dict[str, Any]] = {}
    for variant, timing in timings.items():
        rows[variant] = {"seconds": timing.median, "quartiles": [timing.low, timing.high]}
        for name, other in ((f"/ {UNIT}", UNIT), ("/ its floor", FLOORS[VARIANTS[variant][2]])):
            if other in timings:
                rows[variant][name] = ratio(timings, variant, other)
    return rows


def run(size: Size) -> dict[str, Any]:
    """Seconds and ratios of all variants of the networks, shares of a step, and growth with batch and depth if full."""
    out: dict[str, Any] = {}
    rounds, warmup = (1, 1) if size == "short" else (5, 1)
    for net in nets_of(size, NETS, SHORT):
        # compiling a whole network takes a minute, for a tiny one too
        chosen = [v for v, (_, mode, _, _) in VARIANTS.items() if size == "full" or mode != "network"]
        out[net] = measured(net, chosen, rounds, warmup)
        for variant in [v for v, (_, mode, _, _) in VARIANTS.items() if mode in ("on", "integers")]:
            step = make_step(net, variant)
            for _ in range(warmup):
                step()
            out.setdefault(f"{net}: where the time goes [%]", {})[variant] = profiled(step)
    best = "integers" if kernels_available() else "compiled"
    pair = ("float32, channels_last", f"supernet float32, {best}")
    if size != "full":
        return out
    out[f"growth with batch and depth, float32, {best}"] = {
        net: {
            "float": rows[pair[0]]["seconds"],
            "supernet": rows[pair[1]]["seconds"],
            "ratio": rows[pair[1]]["/ its floor"],
        }
        for net in GROWTH
        for rows in [measured(net, pair, 5, 1)]
    }
    return out
