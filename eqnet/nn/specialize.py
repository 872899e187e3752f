"""Specialization: a supernet that simulates exactly the codes and step sizes that one hardware target executes.

A supernet trains in the full range of its codes with free step sizes. A target may leave out the lowest code of a container,
take powers of two only, or know no unsigned codes. Each of these changes values a little, so accuracies for a target are
measured on the specialized supernet, and its extracted codes are those that the target executes.

    narrow range     the lowest code of the container is clipped; the step size stays
    power of two     weights: the neighbouring power of less squared error; inputs, whose values are not at hand: the nearest
                     in log2
    unsigned inputs  with signed codes and zero point 0 only, half of the codes stays unused: b bits have the values of b - 1
                     unsigned bits, whose trained step size is taken where there is one; otherwise the own is doubled

Not simulated: rounding of exact middles other than half to even, quantizers of residual additions, quantized biases.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from eqnet.nn.layers import ElasticLayer
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.nn.supernet import Supernet
from eqnet.space import LayerInfo, QuantFormat, QuantSpace
from eqnet.space.hardware import HardwareTarget

_SMALLEST = 2.0**-26  # the smallest power of two that the kernels do not clamp (SCALE_EPS)


@torch.no_grad()
def specialize(supernet: Supernet, target: HardwareTarget) -> Supernet:
    """A copy that computes as the target does; its space is what the target runs, its config the largest of that.

    The result may be measured, recalibrated, extracted and specialized again (which changes nothing); the supernet given is
    not changed. A target whose rules ask for none of the above gives a copy of equal outputs.

    Args:
        supernet: calibrated.
        target: the target.

    Raises:
        ValueError: a layer has no format left that the target runs, or the supernet is not calibrated.
    """
    space = target.restrict(supernet.space)
    if not supernet.calibrated:
        raise ValueError("the supernet is not calibrated; load a trained one, or call calibrate() first.")
    special = copy.deepcopy(supernet)
    special.space = space
    for name, layer in special.layers.items():
        _specialize_weight(layer, space.info(name), space, target)
        if layer.act_quantizer is not None:
            _specialize_act(layer.act_quantizer, space.info(name), space, target)
    special.set_config(space.largest())
    return special


def _specialize_weight(layer: ElasticLayer, info: LayerInfo, space: QuantSpace, target: HardwareTarget) -> None:
    quantizer = layer.weight_quantizer
    for fmt in space.choices(info.name, "weight"):
        quantizer.ranges[1, quantizer.rows[fmt]] = _bounds(quantizer, target.code_range(info, "weight", fmt))
        if target.weight_rule(info, fmt).power_of_two:
            _fit_power_of_two(quantizer, fmt, layer.float_weight)


def _specialize_act(quantizer: ElasticQuantizer, info: LayerInfo, space: QuantSpace, target: HardwareTarget) -> None:
    signed = int(quantizer.signed)
    # widest first: each takes the trained step size of the next
    for fmt in sorted(space.choices(info.name, "act"), key=lambda f: -f.bits):
        row = quantizer.rows[fmt]
        index = quantizer.index[row]
        bounds = _bounds(quantizer, target.code_range(info, "act", fmt, bool(signed)))
        if bounds[0] < quantizer.ranges[signed, row, 0]:
            rows = [r for f, r in quantizer.rows.items() if (f.bits, f.symmetric) == (fmt.bits - 1, fmt.symmetric)]
            narrower = [quantizer.scale[quantizer.index[r]] for r in rows]
            quantizer.scale[index] = narrower[0] if narrower else 2 * quantizer.scale[index]
        quantizer.ranges[signed, row] = bounds
        if target.act_rule(info, fmt).power_of_two:
            below, above = _powers_around(quantizer.scale[index])
            nearer_above = quantizer.scale[index] > math.sqrt(2) * below
            quantizer.scale[index] = torch.where(nearer_above, above, below)


def _bounds(quantizer: ElasticQuantizer, code_range: tuple[int, int]) -> Tensor:
    return torch.tensor(code_range, dtype=quantizer.ranges.dtype, device=quantizer.ranges.device)


def _powers_around(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The powers of two next to step sizes, below and above; both the same where it is one."""
    scale = scale.clamp_min(_SMALLEST)
    mantissa, _ = torch.frexp(scale)  # in [0.5, 1)
    below = scale / (2 * mantissa)  # exact
    return below, torch.where(mantissa > 0.5, 2 * below, below)


def _fit_power_of_two(quantizer: ElasticQuantizer, fmt: QuantFormat, weight: Tensor) -> None:
    """Sets the step sizes of a row to the power of two below or above that quantizes the weight with less squared error."""
    assert quantizer.axis is not None
    quantizer.select(fmt)
    index = quantizer.index[quantizer.rows[fmt]]
    below, above = _powers_around(quantizer.scale[index])
    errors = []
    for step in (below, above):
        quantizer.scale[index] = step
        error = (quantizer(weight) - weight).double().square().movedim(quantizer.axis, 0).flatten(1).sum(1)
        errors.append(error.sum().expand_as(error) if fmt.granularity == "tensor" else error)
    quantizer.scale[index] = torch.where(errors[1] < errors[0], above, below)
