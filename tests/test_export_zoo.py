"""Whole models of the zoo, at mixed bits 2 to 8: they load, run on the kernels that the target says, and compute the subnet.

Weights are random, which is enough for parity: every layer is compared from the codes that the simulation, or the runtime, has in
front of it (`eqnet.deploy.verify`). Only the chain of a whole random net says nothing: one code that changes at a tie, or the
roundings that a target asks for, are amplified from layer to layer.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers cifar_resnet20
from eqnet.deploy.certificate import Certificate
from eqnet.deploy.export import export_onnx
from eqnet.deploy.exported import Exported
from eqnet.deploy.runtime import RUNTIMES, sums_are_exact
from eqnet.deploy.trace import trace_graph
from eqnet.deploy.verify import verify_export
from eqnet.nn.specialize import specialize
from eqnet.nn.supernet import BATCH_NORM_TYPES, Supernet
from eqnet.space import LayerConfig, QuantConfig, QuantFormat, QuantSpace
from eqnet.space.hardware import load_target, target_names

OPSET = 18
IMAGES = 4


class Case(NamedTuple):
    """A model, the side of its images, and the number of images of a call (None: open)."""

    model: str
    side: int
    batch: int | None = IMAGES  # a fixed one is traced faster

    @property
    def size(self) -> tuple[int, int, int]:
        return (3, self.side, self.side)


# smaller images than in use; the networks are whole
SMALL = [
    Case("cifar_resnet20", 16, None),
    Case("resnet18", 32),
    Case("mobilenetv2_100", 32),
]
LARGE = [
    Case("efficientnet_b0", 32),
    Case("deit_tiny_patch16_224", 32),
    Case("cifar_resnet20", 32),
    Case("resnet18", 224),
    Case("mobilenetv2_100", 224),
    Case("efficientnet_b0", 224),
    Case("deit_tiny_patch16_224", 224, None),
]


class Traced(NamedTuple):
    """A supernet of random weights, images, and the graph that all of its exports start from."""

    supernet: Supernet
    images: Tensor
    graph: Any


def randomize(model: nn.Module) -> None:
    """Scales and biases that a trained net has and an initialised one has not, some of the scales negative."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (*BATCH_NORM_TYPES, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.weight[::4].neg_()
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                bias.uniform_(-0.5, 0.5, generator=generator)


def trace(case: Case) -> Traced:
    torch.manual_seed(0)
    arguments = {"img_size": case.side} if "deit" in case.model else {}
    model = timm.create_model(case.model, num_classes=10, **arguments)
    randomize(model)
    supernet = Supernet.from_model(model, case.size, symmetric=[True], granularity=["channel"], fixed="none").eval()
    images = torch.randn(IMAGES, *case.size)
    supernet.calibrate(images)
    supernet.set_config(supernet.space.largest())
    supernet.recalibrate_bn([images])
    graph = trace_graph(supernet.extract(), case.size, OPSET, case.batch)
    return Traced(supernet, images, graph)


def mixed_bits(space: QuantSpace, heaviest: int) -> QuantConfig:
    """A random config; weights have at most `heaviest` bits."""
    config = space.sample(np.random.default_rng(2))
    narrower = {
        name: LayerConfig(QuantFormat(heaviest, layer.weight.symmetric, layer.weight.granularity), layer.act)
        for name, layer in config.items()
        if layer.weight.bits > heaviest
    }
    return config.replace(narrower)


def verified(case: Case, traced: Traced, name: str, folder: Path, heaviest: int = 8) -> tuple[Certificate, Exported]:
    """Exports a subnet for a target and verifies the file."""
    target = load_target(name)
    supernet = specialize(traced.supernet, target)
    config = mixed_bits(supernet.space, heaviest)
    assert {layer.weight.bits for layer in config.values()} == set(range(2, heaviest + 1))
    subnet, layers, path = supernet.extract(config), supernet.space.layers, folder / f"{name}.onnx"
    images = traced.images
    export_onnx(
        subnet, config, layers, target, path,
        input_size=case.size, images=[images], batch=case.batch, traced=traced.graph,
    )  # fmt: skip
    exported = Exported.read(path)
    certificate = verify_export(exported, subnet, layers, target, images, rounds=0)
    assert [line for line in certificate.lines if line.verdict in ("error", "warning")] == []
    assert all(layer["kernel"] == "integer" for layer in exported.sidecar["layers"].values())
    return certificate, exported


def check(case: Case, folder: Path) -> None:
    traced = trace(case)
    convolutions = sum(layer.kind == "conv" for layer in traced.supernet.space.layers)
    others = len(traced.supernet.space.layers) - convolutions

    certificate, exported = verified(case, traced, "onnxruntime-x86", folder)
    kernels = Counter(layer["kernel"] for layer in certificate.layers.values())
    assert kernels["QLinearConv"] == convolutions
    assert kernels["QGemm"] + kernels["MatMulIntegerToFloat"] == others
    assert certificate.results["reference_and_runtime"]["largest_step"] <= 1
    assert certificate.results["reference_and_runtime"]["share"] < 1e-4
    biases = [layer["bias"] for layer in exported.sidecar["layers"].values() if layer["bias"] is not None]
    assert {bias["dtype"] for bias in biases} == {"int32"}

    # weights of 7 bits do not saturate on CPUs without VNNI
    heaviest = 8 if sums_are_exact(RUNTIMES["openvino"]) else 7
    certificate, exported = verified(case, traced, "openvino-cpu", folder, heaviest)
    kernels = Counter(layer["kernel"].lower()[-2:] for layer in certificate.layers.values())
    assert kernels == {"i8": convolutions + others}
    results = certificate.results
    assert exported.sidecar["quantizers"] == results["permitted"]["bias_rounding"] == {}
    assert results["simulation_and_reference"]["layer_by_layer"]["share"] < 1e-4  # all at ties, or it were an error


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.model)
def test_the_zoo_runs_on_integers_as_simulated(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, SMALL[0]) for name in target_names()), ("vitis-ai", SMALL[1])],
    ids=lambda value: value if isinstance(value, str) else value.model,
)
def test_files_for_every_target_are_as_its_rules_say(name: str, case: Case, tmp_path: Path) -> None:
    """Also where nothing here runs them; additions, pooling and slices need quantizers in some."""
    target = load_target(name)
    model = timm.create_model(case.model, num_classes=10)
    randomize(model)
    supernet = Supernet.from_model(model, case.size, fixed="none").eval()
    images = torch.randn(IMAGES, *case.size)
    supernet.calibrate(images)
    special = specialize(supernet, target)
    config = special.space.sample(np.random.default_rng(0))
    special.set_config(config)
    special.recalibrate_bn([images])
    subnet, layers, path = special.extract(config), special.space.layers, tmp_path / f"{name}.onnx"
    export_onnx(subnet, config, layers, target, path, input_size=case.size, images=[images], batch=case.batch)
    exported = Exported.read(path)
    certificate = verify_export(exported, subnet, layers, target, images, rounds=0)
    assert certificate.errors == []
    kept = exported.sidecar["kept_grids"]
    moves = {"MaxPool", "Slice"} & {node.op_type for node in exported.model.graph.node}
    assert bool(kept) == (target.integer_add and bool(moves))


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.model}-{case.side}")
def test_so_do_larger_models_and_images(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
