"""The fused quantizer: forward and backward of fake quantization over rows. `compiled.py` compiles these formulas.

LSQ (arXiv 1902.08153) eq. 3; EQ-Net (arXiv 2308.07650) section 3.2. Everything that a config changes (row, step size, zero
point, bounds, signedness) is a tensor, so one compilation serves every layer and every format.
Nothing is saved for the backward pass but the input, which the network keeps anyway, and a few numbers per channel: the
mask is computed again.

A tensor is seen as rows [R, L] in the order of its storage. Weights have one row per channel; an activation has as many
rows as keep sums short, because the gradient of its step size is a sum over millions of values in float32.

Shape legend: `R` rows, `L` values of a row, `C` channels (R for weights, 1 for activations), `F` formats, `S` entries of
the tables of step sizes and of zero points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_EPS = 1e-8  # step sizes below this are clamped (gradients pass), so s never reaches or crosses zero
_ROW_LENGTH = 4096  # values of a row at most, where the shape allows
_BLOCK = 2**16  # values of a block of the eager kernels: its temporaries stay in the cache


class Formats(NamedTuple):
    """The constants of a quantizer's formats and the active one.

    Attributes:
        entries: int64 [F, C], where each format and channel is in the tables.
        ranges: float [2, F, 2], (qmin, qmax) by signedness.
        groups: float [F, 1], step sizes per value: one over the number of values that share a step size.
        signed: int64 [1].
        row: int64 [1], the active format.
    """

    entries: Tensor
    ranges: Tensor
    groups: Tensor
    signed: Tensor
    row: Tensor


class Grid(NamedTuple):
    """The quantization grid of the active format, float: `s` [C, 1] step size; `low`, `high` [C, 1] bounds without the zero
    point; `bounds` [2], smallest and largest code."""

    s: Tensor
    low: Tensor
    high: Tensor
    bounds: Tensor


def active_grid(scale: Tensor, zero_point: Tensor, formats: Formats) -> Grid:
    """The grid of the active row of the tables `scale` and `zero_point` [S]."""
    entries = formats.entries.index_select(0, formats.row)[0]
    bounds = formats.ranges.index_select(0, formats.signed)[0].index_select(0, formats.row)[0]
    s = scale.index_select(0, entries).clamp_min(SCALE_EPS)
    z = zero_point.index_select(0, entries)
    return Grid(s[:, None], (bounds[0] - z)[:, None], (bounds[1] - z)[:, None], bounds)


def quantize_rows(x: Tensor, grid: Grid) -> Tensor:
    """`s * round(clip(x / s, low, high))` of rows [R, L], in the dtype of the step size or wider."""
    return (x / grid.s).clamp_(grid.low, grid.high).round_().mul_(grid.s)


def code_rows(x: Tensor, grid: Grid) -> Tensor:
    """uint8 codes of rows [R, L] that count from the smallest value of the grid: `round(clip(x / s, low, high)) - low`."""
    return (x / grid.s).clamp_(grid.low, grid.high).round_().sub_(grid.low).to(torch.uint8)


def row_gradients(u: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients of `quantize_rows` for the incoming gradient `u` [R, L].

    Returns:
        of `x` [R, L]: u inside the range (bounds included), 0 outside; of the step size [R]: sum of u * (r - x / s) inside
        and u * (qmin - z) or u * (qmax - z) outside.
    """
    v = x / grid.s
    c = v.clamp(grid.low, grid.high)
    inside = v == c
    grad_x = torch.where(inside, u, 0).to(x.dtype)
    d = torch.where(inside, c.round() - v, c)
    return grad_x, (u.to(v.dtype) * d).sum(1)


def forward_pass(
    x: Tensor, scale: Tensor, zero_point: Tensor, formats: Formats, dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    """`Kernels.forward` in plain operations."""
    grid = active_grid(scale, zero_point, formats)
    return quantize_rows(x, grid).to(dtype), grid


def code_pass(x: Tensor, scale: Tensor, zero_point: Tensor, formats: Formats) -> tuple[Tensor, Grid]:
    """`Kernels.codes` in plain operations."""
    grid = active_grid(scale, zero_point, formats)
    return code_rows(x, grid), grid


def _table_gradient(ds: Tensor, scale: Tensor, formats: Formats, bounds: Tensor) -> Tensor:
    """Row sums [R] to the gradient of the table, times g = 1 / sqrt(qmax * values that share a step size) (LSQ)."""
    entries, groups = (t.index_select(0, formats.row)[0] for t in (formats.entries, formats.groups))
    if entries.shape[0] == 1:  # one channel, many rows
        ds = ds.sum(0, keepdim=True)
    g = torch.rsqrt(bounds[1] / groups)
    return torch.zeros_like(scale).index_add(0, entries, (ds * g).to(scale.dtype))


def backward_pass(u: Tensor, x: Tensor, scale: Tensor, formats: Formats, grid: Grid) -> tuple[Tensor, Tensor]:
    """`Kernels.backward` in plain operations."""
    grad_x, ds = row_gradients(u, x, grid)
    return grad_x, _table_gradient(ds, scale, formats, grid.bounds)


class Moments(NamedTuple):
    """Statistics of all values of a tensor, 0-d: mean, largest deviation from it, variance in units of the latter, skewness,
    kurtosis; all but the mean are 0 where all values are equal but for rounding."""

    mean: Tensor
    spread: Tensor
    variance: Tensor
    skewness: Tensor
    kurtosis: Tensor


def moments(w: Tensor) -> Moments:
    """Moments of the population of rows [R, L]; sums go row by row, so that they stay exact in float32."""
    numel = w.numel()
    mean = w.sum(1).sum() / numel
    low, high = w.amin(), w.amax()
    spread = torch.maximum(high - mean, mean - low)
    spread = torch.where(spread > 8 * torch.finfo(w.dtype).eps * torch.maximum(-low, high).abs(), spread, 0)
    # Dividing by the largest deviation keeps squares of tiny weights from underflowing; it cancels in the result.
    u = (w - mean) * torch.where(spread > 0, 1 / spread, 0)
    square = u * u
    variance = square.sum(1).sum() / numel
    third, fourth = (square * u).sum(1).sum() / numel, (square * square).sum(1).sum() / numel
    safe = torch.where(spread > 0, variance, 1)
    return Moments(mean, spread, variance, third / (safe * safe.sqrt()), fourth / (safe * safe))


def moments_gradient(w: Tensor, m: Moments, grad_skewness: Tensor, grad_kurtosis: Tensor) -> Tensor:
    """Gradient of skewness and kurtosis in rows [R, L], with z = (w - mean) / std over n values:
    d skewness = 3 (z^2 - 1 - skewness z) / (n std), d kurtosis = 4 (z^3 - skewness - kurtosis z) / (n std)."""
    std = m.spread * m.variance.sqrt()
    factor = torch.where(m.spread > 0, 1 / std, 0)
    z = (w - m.mean) * factor
    a, b = 4 * grad_kurtosis * factor / w.numel(), 3 * grad_skewness * factor / w.numel()
    linear, constant = -(a * m.kurtosis + b * m.skewness), -(a * m.skewness + b)
    return ((a * z + b) * z + linear) * z + constant


class Kernels(NamedTuple):
    """One implementation of the passes over tensors.

    Attributes:
        forward: (x [R, L], scale [S], zero_point [S], formats, dtype of the result) -> (result [R, L], grid).
        codes: (x [R, L], scale [S], zero_point [S], formats) -> (uint8 [R, L], grid), see `code_rows`.
        backward: (u [R, L], x, scale, formats, grid) -> gradients of x and scale.
        moments: see `moments`.
        moments_gradient: see there.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Formats, torch.dtype], tuple[Tensor, Grid]]
    codes: Callable[[Tensor, Tensor, Tensor, Formats], tuple[Tensor, Grid]]
    backward: Callable[[Tensor, Tensor, Tensor, Formats, Grid], tuple[Tensor, Tensor]]
    moments: Callable[[Tensor], Moments]
    moments_gradient: Callable[[Tensor, Moments, Tensor, Tensor], Tensor]


def _blocks(x: Tensor) -> list[slice]:
    """Slices of rows that fit the cache; one slice on an accelerator, where launches cost more."""
    step = max(1, _BLOCK // x.shape[1]) if x.device.type == "cpu" else len(x)
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _part(grid: Grid, rows: slice) -> Grid:
    return grid if len(grid.s) == 1 else Grid(grid.s[rows], grid.low[rows], grid.high[rows], grid.bounds)


def _eager_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, formats: Formats, dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    grid = active_grid(scale, zero_point, formats)
    out = torch.empty_like(x, dtype=dtype)
    for rows in _blocks(x):
        out[rows] = quantize_rows(x[rows], _part(grid, rows))
    return out, grid


def _eager_codes(x: Tensor, scale: Tensor, zero_point: Tensor, formats: Formats) -> tuple[Tensor, Grid]:
    grid = active_grid(scale, zero_point, formats)
    out = torch.empty_like(x, dtype=torch.uint8)
    for rows in _blocks(x):
        out[rows] = code_rows(x[rows], _part(grid, rows))
    return out, grid


def _eager_backward(u: Tensor, x: Tensor, scale: Tensor, formats: Formats, grid: Grid) -> tuple[Tensor, Tensor]:
    grad_x, sums = torch.empty_like(x), []
    for rows in _blocks(x):
        grad_x[rows], ds = row_gradients(u[rows], x[rows], _part(grid, rows))
        sums.append(ds)
    return grad_x, _table_gradient(torch.cat(sums), scale, formats, grid.bounds)


EAGER = Kernels(_eager_forward, _eager_codes, _eager_backward, moments, moments_gradient)


def _storage_order(x: Tensor) -> Tensor:
    """A view of `x` whose axes follow its storage, where that is one of the two usual layouts."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1)
    return x


def like_layout(u: Tensor, x: Tensor) -> Tensor:
    """`u` in the layout of `x`, of the same shape; a copy only if they differ."""
    return u if u.stride() == x.stride() else torch.empty_like(x, dtype=u.dtype).copy_(u)


def to_rows(x: Tensor, axis: int | None) -> Tensor:
    """A tensor as rows [R, L] in the order of its storage, without a copy where it is dense in a usual layout.

    Args:
        x: any shape.
        axis: axis of the channels, one row each; None for as many rows as keep them short.
    """
    if axis is not None:
        return _storage_order(x if axis == 0 else x.movedim(axis, 0)).reshape(x.shape[axis], -1)
    x = _storage_order(x)
    if x.ndim < 2:
        return x.reshape(1, -1)
    length, d = x.shape[-1], x.ndim - 1
    while d > 1 and length * x.shape[d - 1] <= _ROW_LENGTH:
        d -= 1
        length *= x.shape[d]
    return x.reshape(-1, length)


def from_rows(rows: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Inverse of `to_rows(x, axis)` for rows of the same shape: shape and layout of `x`."""
    moved = x if axis in (None, 0) else x.movedim(axis, 0)
    ordered = _storage_order(moved)
    out = rows.view(ordered.shape)
    if ordered is not moved:
        out = out.permute(0, 3, 1, 2)
    return out if axis in (None, 0) else out.movedim(0, axis)
