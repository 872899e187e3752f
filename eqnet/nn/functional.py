"""Fake quantization with learned step sizes; `calibration` finds their initial values, and the zero points.

LSQ (arXiv 1902.08153); EQ-Net (arXiv 2308.07650) eq. 1 and section 3.2.

    r = round(clip(x / s, qmin - z, qmax - z)),   x_hat = s * r,   code = r + z

Departs from the paper: the zero point z is a calibrated integer inside the code range, and not learned. Learned real offsets
(LSQ+, arXiv 2004.09576) settle midway between two integers, where the zero point that rounds them flips at any move. Departs from the
official code: zero is on the grid (there an offset of any value), and the step size is clamped, not shifted. Rounding is half
to even *before* the zero point is added, exactly as ONNX QuantizeLinear does it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eqnet.nn.kernels import (
    EAGER,
    SCALE_EPS,
    Formats,
    Grid,
    Kernels,
    from_rows,
    like_layout,
    to_rows,
)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code of a bit-width.

    Examples:
        >>> code_range(4, True), code_range(4, False)
        ((-8, 7), (0, 15))
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class Selected(NamedTuple):
    """The active row of a quantizer, kept for the backward pass: the next config may be selected before it.

    Attributes:
        formats: what the rows mean, and which one is active; `groups` divided by the values of the tensor.
        axis: axis of the channels, None for one channel.
        kernels: eager or compiled.
    """

    formats: Formats
    axis: int | None
    kernels: Kernels

    @staticmethod
    def of(formats: Formats, axis: int | None, numel: int, kernels: Kernels) -> Selected:
        """The row that is active now, for tensors whose step size is shared by a part of `numel` values."""
        return Selected(formats._replace(row=formats.row.clone(), groups=formats.groups / numel), axis, kernels)

    def values(self, x: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> tuple[Tensor, Grid]:
        """(fake-quantized `x` in `dtype`, its grid), for tables `scale` and `zero_point` [S]."""
        rows = to_rows(x.detach(), self.axis).data
        out, grid = self.kernels.forward(rows, scale.detach(), zero_point, self.formats, dtype)
        return from_rows(out, x, self.axis), grid

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Grid]:
        """(uint8 codes of `x` that count from the smallest value of the grid, the grid)."""
        rows = to_rows(x.detach(), self.axis).data
        out, grid = self.kernels.codes(rows, scale.detach(), zero_point, self.formats)
        return from_rows(out, x, self.axis), grid

    def gradients(self, u: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Gradients of `x` and `scale` for that of the fake-quantized values, `u`."""
        rows = to_rows(x.detach(), self.axis).data
        u = to_rows(like_layout(u.detach(), x), self.axis).data
        grad_x, grad_scale = self.kernels.backward(u, rows, scale.detach(), self.formats, grid)
        return from_rows(grad_x, x, self.axis), grad_scale


def layer_dtype(x: Tensor) -> torch.dtype:
    """What a layer computes in for an input or weight: its own dtype, or the lower-precision one of autocast."""
    device = x.device.type
    if x.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization of a tensor by the active row of two tables; the mathematics is in `kernels`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, selected: Selected) -> Tensor:
        out, ctx.grid = selected.values(x, scale, zero_point, layer_dtype(x))
        ctx.save_for_backward(x, scale)
        ctx.selected = selected
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.selected.gradients(grads[0], *ctx.saved_tensors, ctx.grid), None, None


def fake_quantize_active(x: Tensor, scale: Tensor, zero_point: Tensor, selected: Selected) -> Tensor:
    """Rounds `x` to the grid of the selected row of a quantizer's tables; differentiable.

    Args:
        x: any shape, float.
        scale: table [S].
        zero_point: table [S], whole numbers.
        selected: the row; its number of values N gives LSQ's gradient scale g = 1 / sqrt(qmax * N).

    Returns:
        Same shape as `x`, and same dtype, or under autocast the lower-precision one that the layer computes in. Gradients,
        with u the incoming one (LSQ eq. 3): x: u inside the range (bounds included), 0 outside; scale: g * sum u * (r - x / s
        inside, qmin - z or qmax - z outside).
    """
    return _FakeQuantize.apply(x, scale, zero_point, selected)  # type: ignore[no-any-return]


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor, grad_scale: Tensor | None = None
) -> Tensor:
    """Rounds `x` to the grid of a step size and a zero point; differentiable.

    Args:
        x: any shape, float.
        scale: step size, 0-d or broadcastable to `x` along one axis, e.g. `[C, 1, 1, 1]`.
        zero_point: whole number from `qmin` to `qmax`, float like `scale` and of its shape; zeros for symmetric formats.
        qmin: smallest code, one float.
        qmax: largest code, one float.
        grad_scale: factor g on the gradient of `scale`, one positive float; None means 1.

    Returns:
        As `fake_quantize_active`.

    Examples:
        >>> one = torch.ones(())
        >>> fake_quantize(torch.tensor([-9.0, -0.4, 0.6, 9.0]), one, 0 * one, -2 * one, one)
        tensor([-2., -0.,  1.,  1.])
    """
    axis = next((x.ndim - scale.ndim + d for d, size in enumerate(scale.shape) if size > 1), None)
    index = torch.arange(scale.numel(), device=scale.device)[None]
    zero = torch.zeros(1, dtype=torch.int64, device=scale.device)
    ranges = torch.stack([qmin.reshape(()), qmax.reshape(())]).view(1, 1, 2)
    groups = (qmax if grad_scale is None else qmax * grad_scale.square()).view(1, 1)  # g = sqrt(groups / qmax)
    formats = Formats(index, ranges, groups, zero, zero)
    return fake_quantize_active(x, scale.reshape(-1), zero_point.reshape(-1), Selected.of(formats, axis, 1, EAGER))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers behind `fake_quantize`: (codes int8 or uint8 like `x`, step size, zero point int8 or uint8).

    `(codes - zero_point) * step size` equals `fake_quantize(x, ...)` bit for bit.
    """
    dtype = torch.int8 if float(qmin.min()) < 0 else torch.uint8
    s, z = scale.clamp_min(SCALE_EPS), zero_point
    codes = torch.clamp(x / s, qmin - z, qmax - z).round_() + z
    return codes.to(dtype), s, z.to(dtype)
