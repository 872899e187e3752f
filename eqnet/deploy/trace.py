"""A subnet as an ONNX graph in which every quantized weight and input is a marked place.

torch exports everything but the quantizers: in a copy of the subnet each quantized layer emits two marker nodes of the domain
`eqnet`, which carry the layer's name. What stands there in the file is built from the layer's integers (`graph.py`), so
nothing is traced, rounded or folded on the way.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eqnet.nn.layers import QuantizedLayer

DOMAIN = "eqnet"
INPUT, WEIGHT, LAYER = "Input", "Weight", "layer"  # op types of the markers, and their attribute
IMAGES, OUTPUT = "images", "logits"
LOWEST_OPSET = 18  # of torch's exporter


class _MarkedLayer(QuantizedLayer):
    """Marks the places of the quantized weight and input instead of computing them."""

    marker: str

    @property
    def weight(self) -> Tensor:
        shape, dtype = self.weight_codes.shape, self.weight_scale.dtype
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{WEIGHT}", (self.weight_codes,), {LAYER: self.marker}, dtype=dtype, shape=shape, version=1
        )

    def quantize_input(self, x: Tensor) -> Tensor:
        if self.act_scale is None:
            return x
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{INPUT}", (x,), {LAYER: self.marker}, dtype=x.dtype, shape=x.shape, version=1
        )


class _PlainLayer(QuantizedLayer):
    """Rounds its input by tensor operations alone: the arithmetic of the simulation, bit for bit."""

    def quantize_input(self, x: Tensor) -> Tensor:
        if self.act_scale is None:
            return x
        low, high = self.act_qmin - self.act_zero_point, self.act_qmax - self.act_zero_point
        return torch.clamp(x / self.act_scale, low, high).round() * self.act_scale


def _with_layers(subnet: nn.Module, kind: type) -> nn.Module:
    """A copy of a subnet whose quantized layers have the methods of `kind`."""
    net = copy.deepcopy(subnet).eval()
    for layer in quantized_layers(net).values():
        layer.__class__ = type(f"{kind.__name__}{type(layer).__name__}", (kind, type(layer)), {})
    return net


def quantized_layers(subnet: nn.Module) -> dict[str, QuantizedLayer]:
    """Quantized layers of an extracted subnet by name."""
    return {name: module for name, module in subnet.named_modules() if isinstance(module, QuantizedLayer)}


def require_packages(*names: str) -> None:
    """Raises ValueError that names the extra to install if a package is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            extra = "openvino" if name == "openvino" else "export"
            raise ValueError(f'this needs the package {name}; run: pip install "eqnet[{extra}]".') from error


def trace_graph(subnet: nn.Module, input_size: Sequence[int], opset: int, batch: int | None = None) -> Any:
    """The subnet as an `onnx_ir.Model` with markers.

    Args:
        subnet: from `Supernet.extract`, in eval mode; not changed.
        input_size: `(C, H, W)` of one image.
        opset: version of the operators, from 18 on.
        batch: images per call; None leaves the number open (dimension `N`).

    Raises:
        ValueError: a package is missing, or torch cannot export an operation (named).
    """
    require_packages("onnx", "onnx_ir", "onnxscript")
    net = _with_layers(subnet, _MarkedLayer)
    for name, layer in quantized_layers(net).items():
        layer.marker = name  # type: ignore[attr-defined]
    images = torch.zeros(batch or 2, *input_size)
    shapes = None if batch else ({0: torch.export.Dim("N", min=1)},)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                net, (images,), dynamo=True, opset_version=opset, optimize=True, verbose=False,
                dynamic_shapes=shapes, input_names=[IMAGES], output_names=[OUTPUT],
            )  # fmt: skip
    except Exception as error:  # many kinds, by what is missing
        raise ValueError(f"torch cannot export this model to ONNX: {_reason(error)}.") from error
    finally:
        quiet.setLevel(level)
    assert program is not None
    return program.model


def trace_program(
    subnet: nn.Module, input_size: Sequence[int], batch: int | None = None
) -> torch.export.ExportedProgram:
    """The subnet as a `torch.export` program; its outputs equal the subnet's bit for bit.

    Args:
        subnet: from `Supernet.extract`, in eval mode; not changed.
        input_size: `(C, H, W)` of one image.
        batch: images per call; None leaves the number open.

    Raises:
        ValueError: torch cannot export the model.
    """
    images = torch.zeros(batch or 2, *input_size)
    shapes = None if batch else ({0: torch.export.Dim("N", min=1)},)
    try:
        with torch.no_grad():
            return torch.export.export(_with_layers(subnet, _PlainLayer), (images,), dynamic_shapes=shapes)
    except Exception as error:  # many kinds, by what is missing
        raise ValueError(f"torch cannot export this model: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """The line that says what is wrong, of an error that wraps others."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
