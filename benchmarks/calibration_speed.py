"""What calibration costs, against the float forward passes over its images (its floor).

Calibration initialises the step sizes of all formats (7 bit-widths x 2 symmetries x 2 granularities, 80 ranges each) of all
weights, and of all inputs in one forward pass through the largest subnet. Its floor is that pass in floating point: same
batches, channels_last, BN statistics of the batch.

    python -m benchmarks calibration_speed [--full | --short] [--output folder]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm
from benchmarks.timing import Size, interleave, nets_of, ratio
from eqnet.command import keep_freed_memory
from eqnet.nn.calibration import CALIBRATION_CANDIDATES, CALIBRATION_NORM, in_threads
from eqnet.nn.functional import code_range
from eqnet.nn.layers import ElasticLayer
from eqnet.nn.supernet import Supernet

THREADS = 2


class Net(NamedTuple):
    """A model and its calibration images, which pass in batches."""

    model: str
    size: int
    classes: int
    images: int
    batch: int
    scanned_layer: str  # the layer that the scan is timed on


NETS = {  # with as many images as `train.calibration_images` asks for, and the official code takes
    "resnet18, 224 px, 256 images": Net("resnet18", 224, 1000, 256, 32, "layer3.1.conv1"),
    "cifar_resnet20, 32 px, 256 images": Net("cifar_resnet20", 32, 10, 256, 128, "layer2.1.conv1"),
}
SHORT = {"cifar_resnet20, 16 px, 16 images": Net("cifar_resnet20", 16, 10, 16, 8, "layer2.1.conv1")}
SPACES: dict[str, dict[str, Any]] = {
    "8 bits, symmetric, per tensor": {"bits": [8], "symmetric": [True], "granularity": ["tensor"]},
    "2 to 8 bits, symmetric, per tensor": {"symmetric": [True], "granularity": ["tensor"]},
    "2 to 8 bits, symmetric, per channel": {"symmetric": [True], "granularity": ["channel"]},
    "2, 4, 8 bits, all forms": {"bits": [2, 4, 8]},
    "2 to 8 bits, all forms": {},
}


def float_model(net: Net) -> nn.Module:
    """Seeded random weights, channels_last."""
    torch.manual_seed(0)
    model = timm.create_model(net.model, num_classes=net.classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def supernet(net: Net, **choices: Any) -> Supernet:
    """A supernet of the same model in which no layer is fixed."""
    built = Supernet.from_model(float_model(net), (3, net.size, net.size), fixed="none", **choices)
    return built.to(memory_format=torch.channels_last)


def batches(net: Net) -> list[Tensor]:
    """Random images, channels_last."""
    images = torch.randn(net.images, net.size, net.size, 3, generator=torch.Generator().manual_seed(0))
    return list(images.permute(0, 3, 1, 2).split(net.batch))


def calibrate_weights(net: Supernet) -> None:
    """The part of `Supernet.calibrate` before the images pass."""

    def calibrate(layer: ElasticLayer) -> None:
        with torch.no_grad():
            layer.weight_quantizer.calibrate(layer.float_weight)

    in_threads(calibrate, sorted(net.layers.values(), key=lambda layer: -layer.latent_weight.numel()))


def parts(net: Net, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of calibration and its parts, and of the floor."""
    images, model, elastic = batches(net), float_model(net).train(), supernet(net)

    @torch.no_grad()
    def forward(module: nn.Module) -> None:
        for batch in images:
            module(batch)

    elastic.calibrate(images)
    elastic.set_config(elastic.space.largest())
    floor = "float forward passes"
    timings = interleave(
        {
            floor: lambda: forward(model),
            "forward passes of the largest subnet": lambda: forward(elastic.train()),
            "calibration of weights": lambda: calibrate_weights(elastic),
            "calibration": lambda: elastic.calibrate(images),
        },
        rounds,
    )
    rows = {
        name: {"seconds": t.median, "quartiles": [t.low, t.high], "/ float forward": ratio(timings, name, floor)}
        for name, t in timings.items()
    }
    whole, weights = rows["calibration"], rows["calibration of weights"]
    of_inputs = {column: whole[column] - weights[column] for column in ("seconds", "/ float forward")}
    return {**rows, "calibration of inputs, with their forward passes": of_inputs}


def growth(net: Net, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of the weights of spaces with more and more rows."""
    nets = {name: supernet(net, **choices) for name, choices in SPACES.items()}
    timings = interleave({name: (lambda n=n: calibrate_weights(n)) for name, n in nets.items()}, rounds)
    first = next(iter(SPACES))
    return {
        name: {
            "rows": len(next(iter(nets[name].layers.values())).weight_quantizer.formats),
            "seconds": t.median,
            "quartiles": [t.low, t.high],
            "/ one row": ratio(timings, name, first),
        }
        for name, t in timings.items()
    }


def scan(x: Tensor, bits: int, symmetric: bool, signed: bool) -> tuple[Tensor, Tensor]:
    """All values once for each candidate: how the released code of EQ-Net searches (our own code).

    Args:
        x: values [C, M].

    Returns:
        Step size and zero point, [C] each.
    """
    n, p = code_range(bits, signed)
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    span = torch.maximum(-low, high) * (2 if signed else 1) if symmetric else high - low
    best = torch.full_like(span, torch.inf)
    scale, zero = torch.ones_like(span), torch.zeros_like(span)
    for i in range(CALIBRATION_CANDIDATES):
        s = span * (1 - 0.01 * i) / (p - n)
        z = torch.zeros_like(s) if symmetric else (n - low * (1 - 0.01 * i) / s).round().clamp(n, p)
        out = (torch.clamp((x / s).round() + z, n, p) - z) * s
        error = (out - x).abs().pow(CALIBRATION_NORM).mean(1, keepdim=True)
        better = error < best
        best, scale, zero = (torch.where(better, a, b) for a, b in ((error, best), (s, scale), (z, zero)))
    return scale[:, 0], zero[:, 0]


@torch.no_grad()
def extrapolated_scan(net: Net, calibration_s: float) -> dict[str, dict[str, Any]]:
    """Seconds of a scan of every layer, from the time per value of one layer's weights and of its input for 4 images."""
    elastic = supernet(net)
    layer = elastic.layers[net.scanned_layer]
    facts = {info.name: info for info in elastic.space.layers}
    numel = facts[net.scanned_layer].act_numel * 4
    weight, inputs = layer.latent_weight.detach().flatten(1), torch.randn(1, numel).relu_()

    def seconds_per_value(x: Tensor, signed: bool) -> float:
        """Per value and format; the mean of a symmetric and an asymmetric one."""
        start = time.perf_counter()
        for symmetric in (True, False):
            scan(x, 4, symmetric, signed)
        return (time.perf_counter() - start) / 2 / x.numel()

    for _ in range(2):  # the first time is a warm-up
        of_weights, of_inputs = seconds_per_value(weight, True), seconds_per_value(inputs, False)
    weight_rows = sum(n.latent_weight.numel() * len(n.weight_quantizer.formats) for n in elastic.layers.values())
    rows = {name: len(n.act_quantizer.formats) for name, n in elastic.layers.items() if n.act_quantizer is not None}
    input_rows = sum(facts[name].act_numel * count for name, count in rows.items())
    seconds = {
        "weights": of_weights * weight_rows,
        "inputs of one image": of_inputs * input_rows,
        "all": of_weights * weight_rows + of_inputs * input_rows * net.images,
    }
    return {
        name: {
            "seconds, extrapolated": value,
            **({"/ our calibration": value / calibration_s} if name == "all" else {}),
        }
        for name, value in seconds.items()
    }


def memory(net: str) -> dict[str, dict[str, Any]]:
    """Peak memory of calibration beyond the model and the images, each measured in a process of its own."""
    images = {**NETS, **SHORT}[net].images
    out = {}
    for batch in (images, images // 4, images // 8):
        command = [sys.executable, "-m", "benchmarks.calibration_speed", net, str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        out[f"batches of {batch}"] = {"peak memory [MiB]": float(done.stdout.splitlines()[-1])}
    return out


def print_memory(net: str, batch: int) -> None:
    """What `memory` starts."""
    keep_freed_memory()
    found = {**NETS, **SHORT}[net]
    elastic, images = supernet(found), batches(found._replace(batch=batch))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    elastic.calibrate(images)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def run(size: Size) -> dict[str, Any]:
    """Calibration and its parts against its floor, an exhaustive scan extrapolated, growth with the rows, and memory."""
    out: dict[str, Any] = {}
    threads, rounds = torch.get_num_threads(), 1 if size == "short" else 3
    torch.set_num_threads(THREADS)
    try:
        for name, net in nets_of(size, NETS, SHORT).items():
            out[name] = parts(net, rounds)
            out[f"{name}: scan of all values (our own code)"] = extrapolated_scan(
                net, out[name]["calibration"]["seconds"]
            )
            out[f"{name}: weights of larger spaces"] = growth(net, rounds)
            out[f"{name}: memory beyond model and images"] = memory(name)
    finally:
        torch.set_num_threads(threads)
    return out


if __name__ == "__main__":
    print_memory(sys.argv[1], int(sys.argv[2]))
