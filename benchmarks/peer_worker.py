"""One process of `benchmarks.peers`: torchvision's resnet18 as one library quantizes it, trained a step at a time on command.

    PYTHON benchmarks/peer_worker.py LIBRARY

Runs in the library's own environment, so it imports nothing of this project unless LIBRARY is eqnet. It builds the float
network and its W8A8 versions, prints one JSON line about them, and then answers each line on stdin, the number of a
variant, with the seconds of one step of that variant: `{"cpu": ..., "wall": ..., "loss": ...}`. A library that cannot be
imported is reported as `{"error": ...}`.

Every variant has the same weights (seed 0), the same batch (16 images of 128 x 128), one thread, float32, train mode and
fused AdamW everywhere; a step is zero_grad, forward, cross entropy, backward, update.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

BATCH, SIZE, LR = 16, 128, 1e-5
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Quantized(NamedTuple):
    """A network under quantization-aware training.

    Attributes:
        name: of the variant.
        model: what is called on images.
        weights: quantized weight tensors.
        acts: quantized activation tensors.
        learned: trained scalars of the quantizers that take part in a step.
        optimizer: None means AdamW over all parameters.
    """

    name: str
    model: nn.Module
    weights: int
    acts: int
    learned: int
    optimizer: torch.optim.Optimizer | None = None


class Variant(NamedTuple):
    """One network that takes steps; `images` [N, 3, H, W] have the memory format of its weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    targets: Tensor


def resnet(memory_format: str = "contiguous") -> nn.Module:
    """resnet18 with the random weights of seed 0, in train mode."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(weights=None)
    return model.to(memory_format=MEMORY_FORMATS[memory_format])


def batch(memory_format: str = "contiguous") -> tuple[Tensor, Tensor]:
    """The images float32 [16, 3, 128, 128] and labels int64 [16] of every step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    return images.contiguous(memory_format=MEMORY_FORMATS[memory_format]), torch.randint(
        1000, (BATCH,), generator=generator
    )


def learned_scalars(model: nn.Module, marker: str) -> int:
    """Trainable numbers in parameters whose name contains `marker`."""
    return sum(p.numel() for name, p in model.named_parameters() if marker in name and p.requires_grad)


def quantize_eqnet(images: Tensor, memory_format: str) -> list[Quantized]:
    """A supernet of all 28 formats per weight and 14 per input, in its 8-bit channel-sym-sym config, eager and compiled."""
    from eqnet.nn.compiled import choose_kernels
    from eqnet.nn.supernet import Supernet
    from eqnet.space import Form
    from eqnet.training.optimizer import SupernetAdamW, parameter_groups

    result = []
    for name, mode in (("eager", "off"), ("compiled", "on")):
        supernet = Supernet.from_model(resnet(memory_format), (3, SIZE, SIZE))
        supernet.calibrate(images)
        supernet.use_kernels(choose_kernels(mode, images.device))
        supernet.set_config(supernet.space.restrict_form(Form.parse("channel-sym-sym")).largest())
        kinds = [name.rsplit(".", 1)[1] for name, _ in supernet.quantizers()]
        learned = sum(q.qparams()[0].numel() for _, q in supernet.quantizers() if q.scale.requires_grad)
        groups = parameter_groups(supernet, supernet.step_sizes(), lr=LR, step_size_lr=LR, weight_decay=0.01)
        optimizer = SupernetAdamW(groups, lr=LR)
        result.append(Quantized(f"QAT {name}", supernet, kinds.count("weight"), kinds.count("act"), learned, optimizer))
    return result


def quantize_brevitas(images: Tensor, memory_format: str) -> list[Quantized]:
    """Its two entry points with their default layer maps, activations calibrated so that their scales are parameters."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize
    from brevitas.proxy import ActQuantProxyFromInjectorBase, WeightQuantProxyFromInjectorBase

    networks = {
        "QAT graph": quantize(preprocess_for_quantize(resnet(memory_format))),
        "QAT layerwise": layerwise_quantize(resnet(memory_format)),
    }
    result = []
    for name, model in networks.items():
        model.eval()
        with torch.no_grad(), calibration_mode(model):
            model(images)
        weights, acts = (
            sum(isinstance(m, kind) and bool(m.is_quant_enabled) for m in model.modules())
            for kind in (WeightQuantProxyFromInjectorBase, ActQuantProxyFromInjectorBase)
        )
        result.append(Quantized(name, model, weights, acts, learned_scalars(model, "scaling_impl")))
    return result


def quantize_nncf(images: Tensor, memory_format: str) -> list[Quantized]:
    """`nncf.quantize` with its defaults, whose result is what its documentation fine-tunes."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # its kernels compile at first use: no limit on that
    import nncf
    from nncf.torch.quantization.layers import BaseQuantizer

    model = nncf.quantize(resnet(memory_format).eval(), nncf.Dataset([images]))
    quantizers = [m for m in model.modules() if isinstance(m, BaseQuantizer)]
    weights = sum(q.per_channel for q in quantizers)
    return [Quantized("QAT", model, weights, len(quantizers) - weights, learned_scalars(model, "__nncf_hooks"))]


def quantize_modelopt(images: Tensor, memory_format: str) -> list[Quantized]:
    """`mtq.quantize` with INT8_DEFAULT_CFG, its configuration for CNNs."""
    import modelopt.torch.quantization as mtq

    model = mtq.quantize(resnet(memory_format).eval(), mtq.INT8_DEFAULT_CFG, lambda network: network(images))
    quantizers = {n: m for n, m in model.named_modules() if n.endswith("_quantizer") and m.is_enabled}
    weights = sum(name.endswith("weight_quantizer") for name in quantizers)
    return [Quantized("QAT", model, weights, len(quantizers) - weights, learned_scalars(model, "_quantizer"))]


def quantize_aimet(images: Tensor, memory_format: str) -> list[Quantized]:
    """`prepare_model`, then `QuantizationSimModel` with its defaults: 8 bit, and min and max learned."""
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantization.base import QuantizerBase
    from aimet_torch.quantsim import QuantizationSimModel

    simulation = QuantizationSimModel(prepare_model(resnet(memory_format).eval()), images)
    simulation.compute_encodings(lambda network: network(images))
    model = simulation.model
    names = [name for name, m in model.named_modules() if isinstance(m, QuantizerBase)]
    weights = sum("param_quantizers" in name for name in names)
    return [Quantized("QAT", model, weights, len(names) - weights, learned_scalars(model, "_quantizers"))]


def no_quantization(images: Tensor, memory_format: str) -> list[Quantized]:
    """The control: a second float network, whose ratio to the first is the noise of the measurement."""
    return [Quantized("float again", resnet(memory_format), 0, 0, 0)]


BUILDERS: dict[str, tuple[str, Callable[[Tensor, str], list[Quantized]], list[str]]] = {
    "float": ("torch", no_quantization, ["contiguous", "channels_last"]),
    "eqnet": ("eqnet", quantize_eqnet, ["contiguous", "channels_last"]),
    "brevitas": ("brevitas", quantize_brevitas, ["contiguous"]),
    "nncf": ("nncf", quantize_nncf, ["contiguous"]),
    "modelopt": ("nvidia-modelopt", quantize_modelopt, ["contiguous"]),
    "aimet": ("aimet-torch", quantize_aimet, ["contiguous"]),
}


def build(library: str) -> tuple[dict[str, Any], list[Variant]]:
    """The description that the parent prints, and the networks. Raises ImportError without the library."""
    distribution, quantize, memory_formats = BUILDERS[library]
    variants: list[Variant] = []
    rows: list[dict[str, Any]] = []

    def add(network: Quantized, memory_format: str, floor: int | None) -> int:
        model = network.model.train()
        optimizer = network.optimizer or torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
        variants.append(Variant(model, optimizer, *batch(memory_format)))
        facts = {key: getattr(network, key) for key in ("name", "weights", "acts", "learned")}
        rows.append({**facts, "memory_format": memory_format, "floor": floor})
        return len(rows) - 1

    for memory_format in memory_formats:
        floor = add(Quantized("float", resnet(memory_format), 0, 0, 0), memory_format, None)
        for network in quantize(batch(memory_format)[0], memory_format):
            add(network, memory_format, floor)
    versions = {"version": importlib.metadata.version(distribution), "torch": torch.__version__}
    return {**versions, "python": platform.python_version(), "variants": rows}, variants


def step(variant: Variant) -> dict[str, float]:
    """One training step; seconds of this process (`cpu`) and of the clock (`wall`)."""
    gc.collect()
    gc.disable()
    wall, cpu = time.perf_counter(), time.process_time()
    variant.optimizer.zero_grad()
    loss = F.cross_entropy(variant.model(variant.images), variant.targets)
    loss.backward()
    variant.optimizer.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.enable()
    return {"cpu": cpu, "wall": wall, "loss": loss.item()}


def main() -> None:
    """Builds, then serves until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints must not mix with the answers
    torch.set_num_threads(1)
    try:
        description, variants = build(sys.argv[1])
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=channel)
        return
    print(json.dumps(description), file=channel)
    for line in sys.stdin:
        print(json.dumps(step(variants[int(line)])), file=channel)


if __name__ == "__main__":
    main()
