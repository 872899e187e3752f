"""Training whose forward pass runs on integers: u8 x s8 convolutions and linear layers, gradients in floating point.

The output of a layer is what `Supernet.forward` simulates, to float32 rounding: sums of codes are exact, whereas the simulation
rounds each product (to bf16 under autocast). The backward pass is that of the simulation: gradients of the layer for
fake-quantized input and weight, which are computed again, then those of both quantizers. So nothing is kept for it but the
input, which the network keeps anyway; the simulation also keeps its fake-quantized copy.

Layers without an integer kernel, those whose input or weight is not quantized, and those whose quantizers somebody hooked (MetaMix
does), run as the simulation does.

Shape legend: `N` batch, `C` input channels, `O` output channels, `H`, `W` height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eqnet.nn.functional import layer_dtype
from eqnet.nn.integer import InputGrid, PackedWeight, conv2d, linear, pack_codes, runs_on_integers
from eqnet.nn.kernels import Grid
from eqnet.nn.layers import ElasticLayer
from eqnet.nn.supernet import Supernet


def use_integers(supernet: Supernet) -> None:
    """Runs the layers of a supernet on integers whenever gradients are recorded; `kernels_available` tells where that works."""
    for layer in supernet.layers.values():
        if runs_on_integers(layer):
            layer.trained_forward = integer_forward


def integer_forward(layer: ElasticLayer, x: Tensor) -> Tensor:
    """The layer on an input [N, C, H, W], or [..., C] of a linear layer; differentiable; dtype as in the simulation."""
    act, weight = layer.act_quantizer, layer.weight_quantizer
    assert act is not None
    return _IntegerLayer.apply(x, layer.float_weight, layer._parameters["bias"], act.scale, weight.scale, layer)  # type: ignore[no-any-return]


class _IntegerLayer(torch.autograd.Function):
    """Integer forward pass, simulated backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        act_scale: Tensor,
        scale: Tensor,
        layer: ElasticLayer,
    ) -> Tensor:
        act, quantizer = layer.act_quantizer, layer.weight_quantizer
        assert act is not None
        ctx.layer, ctx.dtype = layer, layer_dtype(x)
        ctx.input, ctx.weight = act.selected(x), quantizer.selected(w)
        codes, ctx.input_grid = ctx.input.codes(x, act_scale, act.zero_point)
        weight_codes, ctx.weight_grid = ctx.weight.codes(w, scale, quantizer.zero_point)
        ctx.save_for_backward(x, w, bias, act_scale, scale)
        packed = _packed(layer, weight_codes, ctx.weight_grid, ctx.dtype)
        if packed is None:
            values, _ = ctx.input.values(x, act_scale, act.zero_point, ctx.dtype)
            weight, _ = ctx.weight.values(w, scale, quantizer.zero_point, ctx.dtype)
            return _float_forward(layer, values, weight, None if bias is None else bias.to(ctx.dtype))
        grid = _input_grid(ctx.input_grid)
        if isinstance(layer, nn.Linear):
            return linear(codes, grid, packed, bias, dtype=ctx.dtype)
        return conv2d(codes, grid, packed, bias, layer, dtype=ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, act_scale, scale = ctx.saved_tensors
        of_input = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        values, _ = ctx.input.values(x, act_scale, ctx.layer.act_quantizer.zero_point, ctx.dtype)
        weight, _ = ctx.weight.values(w, scale, ctx.layer.weight_quantizer.zero_point, ctx.dtype)
        u_values, u_weight, u_bias = _float_backward(ctx.layer, grads[0], values, weight, of_input, bias is not None)
        del values
        of_x: tuple[Tensor | None, Tensor | None] = (None, None)
        if u_values is not None:
            of_x = ctx.input.gradients(u_values, x, act_scale, ctx.input_grid)
        of_w, of_scale = ctx.weight.gradients(u_weight, w, scale, ctx.weight_grid)
        return of_x[0], of_w, None if bias is None else u_bias.to(bias.dtype), of_x[1], of_scale, None


def _input_grid(grid: Grid) -> InputGrid:
    low, high = float(grid.low), float(grid.high)
    return InputGrid(float(grid.s), int(-low), low, high)


def _packed(layer: ElasticLayer, codes: Tensor, grid: Grid, dtype: torch.dtype) -> PackedWeight | None:
    """The packed weight of uint8 codes that count from the smallest value of the grid; None where `dtype` does better."""
    quantizer = layer.weight_quantizer
    shape = quantizer.broadcast
    if float(grid.low.amin()) >= -128 and float(grid.high.amax()) <= 127:  # sums modulo 256 are right
        r = codes.add(grid.low.to(torch.int16).to(torch.uint8).view(shape)).view(torch.int8)
    elif dtype != torch.float32:
        return None  # two integer convolutions take longer than one in bf16
    else:
        r = codes.to(torch.int16) + grid.low.to(torch.int16).view(shape)
    return pack_codes(layer, r, grid.s.reshape(-1))


def _float_forward(layer: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(values, weight, bias)
    return F.conv2d(values, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _float_backward(
    layer: Any, u: Tensor, values: Tensor, weight: Tensor, of_input: bool, has_bias: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of fake-quantized input (None unless `of_input`), weight and bias for that of the output, `u`."""
    if isinstance(layer, nn.Linear):
        flat = u.reshape(-1, u.shape[-1])
        return u @ weight if of_input else None, flat.T @ values.reshape(-1, values.shape[-1]), flat.sum(0)
    geometry = (layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)
    mask = [of_input, True, has_bias]
    bias_sizes = [len(weight)] if has_bias else None
    return torch.ops.aten.convolution_backward(u, values, weight, bias_sizes, *geometry, mask)  # type: ignore[no-any-return]
