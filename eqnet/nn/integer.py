"""Integer layers on CPU: u8 x s8 convolutions and linear layers with exact int32 sums instead of their float simulation.

What a fake-quantized layer computes is an integer convolution by construction (Jacob et al., arXiv 1712.05877, section 2),
and oneDNN runs that several times faster than the float convolution of the simulation. Codes are as `functional.quantize`
gives them. Inputs are shifted to unsigned bytes, weights to codes minus zero point, so that only the input has a zero
point; padding is with the code of 0.0. Per-tensor weights are per-channel weights with equal step sizes.

Outputs agree with the simulation to float32 rounding (there sums are rounded, here they are exact).

Shape legend: `N` batch, `C` input channels, `O` output channels, `H`, `W` height and width.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from timm.layers.linear import Linear as TimmLinear
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

from eqnet.nn.kernels import SCALE_EPS
from eqnet.nn.layers import ElasticLayer
from eqnet.nn.quantizer import ElasticQuantizer

CONV_TYPES = (nn.Conv2d, StdConv2d, ScaledStdConv2d)
LINEAR_TYPES = (nn.Linear, TimmLinear)
WEIGHT_CACHE_BYTES = 2**30  # packed weights kept by a `WeightCache`; the oldest go first


# -- inputs -----------------------------------------------------------------------------------------------------------


class InputGrid(NamedTuple):
    """The grid of an input as unsigned bytes: `code = round(clip(x / scale, low, high)) + zero`, 0 .. 255."""

    scale: float
    zero: int
    low: float
    high: float


def input_grid(quantizer: ElasticQuantizer) -> InputGrid:
    """The grid of the active format; signed codes are shifted by half their range."""
    scale, z, qmin, qmax = quantizer.qparams()
    return InputGrid(float(scale.clamp_min(SCALE_EPS)), int(z - qmin), float(qmin - z), float(qmax - z))


def quantize_codes(x: Tensor, grid: InputGrid) -> Tensor:
    """uint8 codes of a float tensor of any shape; `(codes - grid.zero) * grid.scale` is the fake-quantized tensor.

    Examples:
        >>> quantize_codes(torch.tensor([-1.0, 0.0, 0.6, 9.0]), InputGrid(scale=0.5, zero=1, low=-1, high=2))
        tensor([0, 1, 2, 3], dtype=torch.uint8)
    """
    r = torch.div(x.float(), grid.scale).clamp_(grid.low, grid.high).round_()
    if grid.high + grid.zero > 127:  # float to int8 is vectorised in torch, float to uint8 is not (5 times slower)
        return r.add_(grid.zero - 128).to(torch.int8).view(torch.uint8).bitwise_xor_(128)
    return (r.add_(grid.zero) if grid.zero else r).to(torch.int8).view(torch.uint8)


def dequantize_codes(codes: Tensor, grid: InputGrid) -> Tensor:
    """float32 values of uint8 codes."""
    return codes.to(torch.float32).sub_(grid.zero).mul_(grid.scale)


# -- weights ----------------------------------------------------------------------------------------------------------


class PackedWeight(NamedTuple):
    """Weight codes minus zero point in the layout of the kernel.

    Attributes:
        codes: s8, opaque.
        scale: step sizes, float32 [O].
        zero: int32 zeros [O], an argument of the kernels.
        doubled: the weight is the sum of two s8 tensors side by side along the input channels, so the input must be given
            twice: 8-bit codes minus a zero point take 9 bits.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    doubled: bool


def runs_on_integers(layer: object) -> bool:
    """Whether the kernels exist for a layer's type, padding and input (single formats may still be out of range)."""
    if not isinstance(layer, ElasticLayer) or layer.act_quantizer is None:
        return False
    float_type = type(layer).float_type
    if float_type in LINEAR_TYPES:
        return True
    conv: Any = layer
    return float_type in CONV_TYPES and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


@torch.no_grad()
def pack_weight(layer: ElasticLayer) -> PackedWeight | None:
    """The weight of a layer in its active format; None if its codes minus zero point are out of range.

    Out of range are 8-bit formats with zero points in grouped convolutions, and with one at the end of the code range.
    """
    codes, scale, zero = layer.weight_quantizer.quantize(layer.float_weight)
    return pack_codes(layer, codes.to(torch.int16) - zero.to(torch.int16), scale.float().reshape(-1))


def pack_codes(layer: ElasticLayer, r: Tensor, scale: Tensor) -> PackedWeight | None:
    """Packs codes minus zero point `r`, int8 or int16 like the weight, with step sizes [1] or [O]; None as `pack_weight`."""
    scale = scale.expand(len(r)).contiguous()
    doubled = r.dtype != torch.int8 and (int(r.min()) < -128 or int(r.max()) > 127)
    if doubled:
        if getattr(layer, "groups", 1) > 1:
            return None
        half = r.clamp(-128, 127)
        r = torch.cat([half, r - half], 1)
        if int(r.max()) > 127:
            return None
    r = r.to(torch.int8)
    # scale and zero point of the input are arguments of each call; the packed layout does not depend on them
    if isinstance(layer, nn.Linear):
        packed = torch.ops.onednn.qlinear_prepack(r, None)
    else:
        packed = torch.ops.onednn.qconv_prepack(r, scale, 1.0, 0, *_geometry(layer), None)
    return PackedWeight(packed, scale, torch.zeros(len(scale), dtype=torch.int32), doubled)


class WeightCache:
    """Packed weights by layer and format; a changed weight, step size or zero point is packed again.

    Changes are seen by the version counters of the parameters, which writes through `.data` do not advance.
    """

    def __init__(self, limit_bytes: int = WEIGHT_CACHE_BYTES) -> None:
        self.limit_bytes, self.num_bytes = limit_bytes, 0
        self._entries: OrderedDict[tuple[int, int], tuple[tuple[int, ...], int, PackedWeight | None]] = OrderedDict()

    def get(self, layer: ElasticLayer) -> PackedWeight | None:
        """`pack_weight(layer)`, from the cache if it is there. The layer must outlive the cache."""
        key = (id(layer), int(layer.weight_quantizer.row))
        parameters = [*layer._parameters.values(), *layer.weight_quantizer.parameters()]
        versions = tuple(p._version for p in parameters if p is not None)
        entry = self._entries.get(key)
        if entry is not None and entry[0] == versions:
            self._entries.move_to_end(key)
            return entry[2]
        packed = pack_weight(layer)
        size = 0 if packed is None else layer.latent_weight.numel() * (2 if packed.doubled else 1)
        if entry is not None:
            self.num_bytes -= entry[1]
        self._entries[key] = (versions, size, packed)
        self._entries.move_to_end(key)
        self.num_bytes += size
        while self.num_bytes > self.limit_bytes and len(self._entries) > 1:
            self.num_bytes -= self._entries.popitem(last=False)[1][1]
        return packed


# -- kernels ----------------------------------------------------------------------------------------------------------


def _geometry(layer: Any) -> tuple[list[int], list[int], list[int], int]:
    return list(layer.stride), list(layer.padding), list(layer.dilation), int(layer.groups)


def _repeated(codes: Tensor, weight: PackedWeight, axis: int) -> Tensor:
    return torch.cat([codes, codes], axis) if weight.doubled else codes


def linear(
    codes: Tensor, grid: InputGrid, weight: PackedWeight, bias: Tensor | None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dtype` (float32 or bf16) [..., O] of uint8 codes [..., C]."""
    x = _repeated(codes, weight, -1).contiguous()
    packed, scale, zero, _ = weight
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, grid.scale, grid.zero, packed, scale, zero, bias, 1.0, 0, dtype, "none", [], ""
    )
    return out


def conv2d(
    codes: Tensor,
    grid: InputGrid,
    weight: PackedWeight,
    bias: Tensor | None,
    layer: ElasticLayer,
    *,
    clip: tuple[float, float] | None = None,
    out_grid: InputGrid | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convolution, clipping and requantization in one kernel.

    Args:
        codes: uint8 [N, C, H, W].
        grid: what the codes mean.
        weight: packed weight of `layer`; its step sizes may hold other factors (BN).
        bias: float32 [O].
        layer: gives stride, padding, dilation and groups.
        clip: bounds of the result, e.g. `(0, inf)` for ReLU.
        out_grid: the result as uint8 codes on this grid.
        dtype: float32 or bf16; of the result without `out_grid`.

    Returns:
        `dtype`, or uint8 with `out_grid`, [N, O, H', W'] in channels_last. Requantization rounds after the zero point is
        added, so the exact middle between two codes may go the other way than in `quantize_codes`.
    """
    x = _repeated(codes, weight, 1).contiguous(memory_format=torch.channels_last)
    packed, scale, zero, _ = weight
    low, high = (-math.inf, math.inf) if clip is None else clip
    out_scale, out_zero = 1.0, 0
    if out_grid is not None:
        low, high = max(low, out_grid.low * out_grid.scale), min(high, out_grid.high * out_grid.scale)
        out_scale, out_zero, dtype = out_grid.scale, out_grid.zero, torch.uint8
    bounded = (low, high) != (-math.inf, math.inf)
    post = ("hardtanh", [low, high]) if bounded else ("none", [])
    out: Tensor = torch.ops.onednn.qconv2d_pointwise(
        *(x, grid.scale, grid.zero, packed, scale, zero, bias, *_geometry(layer), out_scale, out_zero, dtype, *post, "")
    )
    return out


def conv2d_add_(
    codes: Tensor,
    grid: InputGrid,
    weight: PackedWeight,
    bias: Tensor | None,
    layer: ElasticLayer,
    total: Tensor,
    relu: bool,
) -> Tensor:
    """Adds a convolution to `total` float32 [N, O, H', W'] in channels_last, then ReLU if asked; arguments as `conv2d`."""
    x = _repeated(codes, weight, 1).contiguous(memory_format=torch.channels_last)
    packed, scale, zero, _ = weight
    kind: tuple[Any, ...] = (1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "relu" if relu else None, [], "")
    out: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
        x, grid.scale, grid.zero, packed, scale, zero, total, bias, *_geometry(layer), *kind
    )
    return out


@functools.cache
def kernels_available() -> bool:
    """Whether this CPU runs the kernels with exact sums, found out by the most extreme codes.

    Without VNNI instructions pairs of products saturate at 16 bits; on some platforms the operators are missing.
    """
    layer = nn.Conv2d(64, 16, 3, padding=1, device="meta")  # whose weights nobody draws
    codes, grid = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8), InputGrid(1.0, 3, -3, 252)
    r, one, zero = (
        torch.full((16, 64, 3, 3), -128, dtype=torch.int8),
        torch.ones(16),
        torch.zeros(16, dtype=torch.int32),
    )
    expected = torch.full((1, 64, 5, 5), 252.0)
    try:
        packed = torch.ops.onednn.qconv_prepack(r, one, 1.0, 0, *_geometry(layer), None)
        conv = conv2d(codes, grid, PackedWeight(packed, one, zero, False), None, layer)  # type: ignore[arg-type]
        packed = torch.ops.onednn.qlinear_prepack(r[:, :, 0, 0].contiguous(), None)
        flat = linear(codes[:, :, 0, 0], grid, PackedWeight(packed, one, zero, False), None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(conv, nn.functional.conv2d(expected, r.float(), padding=1)) and torch.equal(
        flat, expected[:, :, 0, 0] @ r[:, :, 0, 0].float().T
    )
