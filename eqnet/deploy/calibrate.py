"""Grids of the quantizers that a target needs besides those of the subnet, from images.

The graph runs in ONNX Runtime, without optimizations, with the tensors in question as further outputs; each is counted in a
histogram and gets the best of 80 shrunken ranges, as every quantizer of eqnet does (`eqnet.nn.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from eqnet.deploy.codes import LIMITS, Grid, act_kind
from eqnet.deploy.outputs import Place
from eqnet.deploy.trace import IMAGES, require_packages
from eqnet.nn.calibration import Histogram, choose_qparams
from eqnet.space.target_rules import ActRule

_BITS = 8


def calibrated_grids(model: ir.Model, found: Mapping[str, Place], images: Iterable[Tensor]) -> dict[str, Grid]:
    """8-bit grids of tensors of the graph.

    Args:
        model: an executable graph; left as it was.
        found: tensors by name, with their rules; those with a grid keep it.
        images: batches [N, C, H, W].

    Raises:
        ValueError: onnxruntime is missing, there is no image, or a value is not finite.
    """
    wanted = {name: place for name, place in found.items() if place.grid is None}
    histograms = {name: Histogram() for name in wanted}
    images = images if wanted else []
    run = _session(model, [place.value for place in wanted.values()])
    for batch in images:
        for name, array in zip(wanted, run(batch), strict=True):
            histograms[name].add(torch.from_numpy(np.array(array)))
    if any(histogram.tensors == 0 for histogram in histograms.values()):
        raise ValueError("no image to calibrate the outputs of layers with; give at least one.")
    return {
        name: _grid(histograms[name], place.rule) if place.grid is None else place.grid for name, place in found.items()
    }


def _session(model: ir.Model, values: list[ir.Value]) -> Any:
    """A function from images to the arrays of `values`."""
    require_packages("onnxruntime")
    import onnxruntime as ort

    outputs = list(model.graph.outputs)
    try:
        model.graph.outputs.extend(value for value in values if value not in outputs)
        data = ir.to_proto(model).SerializeToString()
    finally:
        while len(model.graph.outputs) > len(outputs):  # a slice would leave the values marked as outputs
            model.graph.outputs.pop()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [str(value.name) for value in values]
    return lambda batch: session.run(names, {IMAGES: batch.detach().cpu().numpy()})


def _grid(histogram: Histogram, rule: ActRule) -> Grid:
    """The best 8-bit grid of the values by the target's rule of activations."""
    kind = act_kind(rule, _BITS)
    symmetric = rule.zero_point == "zero"
    signed = float(histogram.low) < 0 or kind == "int8" if symmetric else False
    scale, zero_point = choose_qparams(histogram, torch.tensor([_BITS]), torch.tensor([symmetric]), signed)
    step, zero = float(scale), int(zero_point)
    if rule.power_of_two:
        step = 2.0 ** math.ceil(math.log2(step))
        zero = 0
    if kind == "uint8" and signed:
        kind = "int8"
    shift = -128 if kind == "int8" and not signed else 0
    low, high = LIMITS[kind]
    return Grid(float(np.float32(step)), zero + shift, low, high, kind)
