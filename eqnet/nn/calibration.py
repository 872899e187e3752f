"""Initial step sizes, and zero points: for every format, the best of 80 shrunken ranges under mean |x - x_hat|^2.4.

EQ-Net (arXiv 2308.07650) section 3.2; zero points are integers as in `functional`.

Departs from the official code: it scans all values once for each of 80 candidates of each format (5 candidates for
symmetric per-channel weights). Here every format has 80 candidates, and three facts make them cheap:

- b bits do not see details finer than a few percent of a step, so 2^(b+7) bins stand for the values of a channel,
- a coarse histogram tells which candidates come close to the best (up to 5 bits), or which ones lose by clipping alone
  (from 6 bits on: the error of clipping is convex, so the means of bins bound it from below); only the others are measured,
- the power 2.4 comes from the exponent and mantissa of a float (to 0.2 %), without a logarithm.

The range that is chosen has at most 0.5 % more error than the best of the 80, and less than 0.01 % more on average.

Shape legend: `C` channels (1 if per tensor), `R` formats, `K` candidates, `M` values of a channel, `B` bins, `P` pairs of a
format and a channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from eqnet.nn.functional import code_range
from eqnet.nn.kernels import SCALE_EPS

CALIBRATION_NORM = 2.4  # exponent of the error that initialisation minimises
CALIBRATION_CANDIDATES = 80  # ranges (1 - 0.01 i) * range, i = 0..79
NOT_FINITE = "calibration met a value that is not finite; check the images and the weights."
_ROUNDING = 0.5**CALIBRATION_NORM / (CALIBRATION_NORM + 1)  # mean |error|^2.4 of rounding, in steps
_SHORTLIST = 12  # candidates that are measured up to 5 bits
_FINALISTS = 4
_EXACT_VALUES = 2**14  # values of a channel that are used one by one; more are counted in as many bins
_COARSE_BINS = 2**11  # bins of a channel with fewer values
_RUNNING_BINS = 2**15  # bins of a histogram that grows, half of them for negative values
_BLOCK = 2**18  # numbers that a thread handles at once: temporaries stay in the cache
_COUNTED = 2**20  # values of a tensor that a histogram counts; of more, evenly spaced ones
_CHANNEL_BLOCK = 2**22  # values of the channels searched at once

T = TypeVar("T")


class Points(NamedTuple):
    """Values [C, B] and the log2 of the share of their channel that each stands for ([C, B], or [1, 1] if all are equal)."""

    values: Tensor
    log_share: Tensor


class _Bins:
    """A histogram of each channel and its coarser versions, made by merging pairs of bins.

    Args:
        counts: float [C, B] with B a power of two; exact, so float64 beyond 2^24 values.
        centers: [C, B] or [1, B], the value that stands for a bin.
    """

    def __init__(self, counts: Tensor, centers: Tensor) -> None:
        self._total = counts.sum(1, keepdim=True)
        self._levels = {counts.shape[1]: (counts, counts * centers)}
        self._points: dict[int, Points] = {}

    def points(self, bins: int) -> Points:
        """Means and shares of `bins` groups of neighbouring bins (a power of two, or all there are if more)."""
        size = min(self._levels)
        while size > bins:
            counts, sums = (t[:, ::2] + t[:, 1::2] for t in self._levels[size])
            size //= 2
            self._levels[size] = counts, sums
        size = min(bins, max(self._levels))
        if size not in self._points:
            counts, sums = self._levels[size]
            self._points[size] = Points((sums / counts.clamp_min(1)).float(), (counts / self._total).log2_().float())
        return self._points[size]


class Histogram:
    """Counts of the values of a stream, in bins whose width is a power of two.

    Where a value lies beyond the range, the range doubles and pairs of bins are merged: the counts depend on all values
    together, not on their order. 256 KiB, whatever is added. Of a tensor with more than 2^20 values, every k-th is counted.

    Attributes:
        counts: int64 [2^15], the values of each bin.
        low, high: float32 [1], the smallest and the largest of all values so far.
        tensors: how many have been added.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.counts = torch.zeros(_RUNNING_BINS, dtype=torch.int64, device=device)
        self.low = torch.full((1,), torch.inf, device=device)
        self.high = torch.full((1,), -torch.inf, device=device)
        self.tensors = 0
        self._exponent = -100  # the range is +- 2 ** exponent

    def add(self, x: Tensor) -> None:
        """Counts the elements of `x`, float of any shape and layout.

        Raises:
            ValueError: a value is not finite, or there is none.
        """
        if x.numel() == 0:
            raise ValueError("calibration got an empty tensor; give at least one image.")
        order = sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True)
        flat = x.detach().permute(order).reshape(-1)  # as it lies in memory: nothing is copied
        low, high = (t.float() for t in flat.aminmax())
        peak = float(torch.maximum(-low, high))
        if not math.isfinite(peak):
            raise ValueError(NOT_FINITE)
        self._grow(math.frexp(peak * 1.001)[1] if peak else self._exponent)
        half = _RUNNING_BINS // 2
        scale = math.ldexp(float(half), -self._exponent)
        every = -(-len(flat) // _COUNTED)
        while every > 1 and math.gcd(every, len(flat)) > 1:  # else only some channels or columns would be counted
            every += 1
        index = flat[::every].mul(scale).float().add_(half).int()  # truncation rounds down, because all are positive
        self.counts += torch.bincount(index, minlength=_RUNNING_BINS)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.tensors += 1

    def _grow(self, exponent: int) -> None:
        doublings = min(exponent - self._exponent, int(math.log2(_RUNNING_BINS)) - 1)
        if doublings > 0:
            merged = self.counts.view(-1, 2**doublings).sum(1)
            self.counts.zero_()
            start = (_RUNNING_BINS - len(merged)) // 2
            self.counts[start : start + len(merged)] = merged
        self._exponent = max(exponent, self._exponent)

    def bins(self) -> _Bins:
        """The counts as a histogram of one channel, of 2^13 bins or more over the range of the values; on the CPU."""
        half = _RUNNING_BINS // 2
        first = half if float(self.low) >= 0 else 0
        width = math.ldexp(1.0, self._exponent) / half
        centers = (torch.arange(first - half, half, dtype=torch.float64) + 0.5) * width
        centers[half - first] = 0.0  # the first bin from 0 on, so that the zeros of ReLU are exact
        return _Bins(self.counts[None, first:].cpu().double(), centers[None])


class _Channels:
    """The values [C, M] of some channels, as they are or in bins of equal width between the extremes of each channel."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.low, self.high = x.aminmax(dim=1)
        self._bins: _Bins | None = None

    def points(self, bins: int) -> Points:
        """At least `bins` bins (a power of two), or all values, or as many bins as there are to have."""
        numel = self.x.shape[1]
        most = _COARSE_BINS if numel <= _EXACT_VALUES else _EXACT_VALUES
        if numel <= _EXACT_VALUES and (numel <= 1.5 * bins or bins > most):
            return Points(self.x, self.x.new_full((1, 1), -math.log2(numel)))
        if self._bins is None:
            self._bins = self._count(most)
        return self._bins.points(bins)

    def _count(self, bins: int) -> _Bins:
        channels, numel = self.x.shape
        width = ((self.high - self.low) / bins).clamp_min(1e-30)[:, None]
        index = self.x.sub(self.low[:, None]).div_(width).int().clamp_(max=bins - 1)
        index += bins * torch.arange(channels, dtype=torch.int32, device=index.device)[:, None]
        counts = torch.bincount(index.flatten(), minlength=channels * bins).view(channels, bins)
        centers = self.low[:, None] + width * (torch.arange(bins, device=width.device) + 0.5)
        return _Bins(counts.to(torch.float32 if numel < 2**24 else torch.float64), centers)


def _errors(
    points: Points, channel: Tensor, s: Tensor, low: Tensor, high: Tensor, rounding: bool = True, rough: bool = False
) -> Tensor:
    """Mean |x - x_hat|^2.4 of candidates; without rounding, what clipping alone costs.

    Args:
        points: the values of all channels.
        channel: int64 [P], whose values.
        s, low, high: [P, K], step size, and bounds in steps (smallest and largest code without the zero point).
        rough: to 0.6 % instead of 0.2 %.

    Returns:
        float32 [P, K].
    """
    pairs, candidates = s.shape
    bins = points.values.shape[1]
    errors, inverse = torch.empty_like(s), (1 / s)[..., None]
    low, high = low[..., None], high[..., None]
    step = max(1, torch.get_num_threads() * _BLOCK // (candidates * bins))
    buffers = s.new_empty(3, min(pairs, step) * candidates * bins)
    # |d|^2.4 = u * 2^(0.2 log2 u) with u = d^2. For the bits i of a float, i(u) / 2^23 - 127 is close to log2(u); the
    # deviation repeats every octave, and the mean over u and sqrt(2) u has a quarter of it (the second is scaled by
    # 2^-60 so that the sum stays an int32).
    factor = (CALIBRATION_NORM / 2 - 1) * 2.0**-23 / (1 if rough else 2)
    bias = (127 - 0.057) if rough else (2 * 127 - 60 + 0.5)
    log_share = points.log_share - factor * 2.0**23 * bias
    for start in range(0, pairs, step):
        part = slice(start, start + step)
        chosen = channel[part]
        numel = len(chosen) * candidates * bins
        a, b, c = (buffer[:numel].view(len(chosen), candidates, bins) for buffer in buffers)
        torch.mul(points.values.index_select(0, chosen)[:, None], inverse[part], out=a)
        torch.maximum(a, low[part], out=b)
        torch.minimum(b, high[part], out=b)
        if rounding:
            b.round_()
        b.sub_(a).square_()
        if rough:
            c.copy_(b.view(torch.int32))
        else:
            torch.mul(b, 2**0.5 * 2.0**-60, out=a)
            c.copy_(a.view(torch.int32).add_(b.view(torch.int32)))
        share = log_share if len(log_share) == 1 else log_share.index_select(0, chosen)[:, None]
        torch.add(share, c, alpha=factor, out=c)
        errors[part] = b.mul_(c.exp2_()).sum(-1)
    return errors * s.pow(CALIBRATION_NORM)


def _best_candidates(
    points: Callable[[int], Points], bits: int, channel: Tensor, s: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Index [P] of the best candidate of formats of one bit-width; arguments as in `_errors`."""

    def of(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return s.gather(1, index), low.gather(1, index), high.gather(1, index)

    few = len(channel) <= 4  # one channel: a finer look costs little
    coarse = points((2048 if bits <= 5 else 512) if few else 256 if bits in (4, 5) else 128 if bits <= 3 else 64)
    middle = points(min(2 ** (bits + 6), 8192 if few else 1024))
    fine = points(2 ** (bits + (8 if few else 7)))
    if coarse.values.shape == fine.values.shape:
        return _errors(fine, channel, s, low, high).argmin(1)
    final = middle.values.shape != fine.values.shape  # whether the best of a rough look are measured again
    if bits <= 5:
        errors = _errors(coarse, channel, s, low, high, rough=True)
        errors[:, 0] = 0  # the unshrunken range always takes part
        index = errors.topk(_SHORTLIST, 1, largest=False, sorted=False).indices.sort(1).values
        errors = _errors(middle, channel, *of(index), rough=final)
    else:
        clipping = _errors(coarse, channel, s, low, high, rounding=False, rough=True)
        guess = (clipping + _ROUNDING * s.pow(CALIBRATION_NORM)).argmin(1, keepdim=True)
        limit = 1.1 * _errors(middle, channel, *of(guess), rough=True)
        pair, i = (clipping <= limit).nonzero(as_tuple=True)
        marked = s[pair, i, None], low[pair, i, None], high[pair, i, None]
        errors = torch.full_like(s, torch.inf)
        errors[pair, i] = _errors(middle, channel[pair], *marked, rough=final)[:, 0]
        index = torch.arange(CALIBRATION_CANDIDATES, device=s.device).expand_as(s)
    if final:
        best = errors.topk(_FINALISTS, 1, largest=False, sorted=False).indices.sort(1).values
        index = index.gather(1, best)
        errors = _errors(fine, channel, *of(index))
    return index.gather(1, errors.argmin(1, keepdim=True))[:, 0]


def _search(
    low: Tensor, high: Tensor, points: Callable[[int], Points], bits: Tensor, symmetric: Tensor, signed: bool
) -> tuple[Tensor, Tensor]:
    """As `choose_qparams`, for channels of range `low` to `high` [C]; `bits` and `symmetric` on the CPU."""
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError(NOT_FINITE)
    low, high = low.clamp_max(0)[:, None], high.clamp_min(0)[:, None]  # zero must stay representable
    peak = torch.maximum(-low, high) * (2 if signed else 1)
    shrink = 1 - 0.01 * torch.arange(CALIBRATION_CANDIDATES, device=low.device)
    channels = torch.arange(len(low), device=low.device)
    scale, zero_point = low.new_empty(2, len(bits), len(low))
    for b in sorted(set(bits.tolist())):
        rows = (bits == b).nonzero()[:, 0]
        sym = symmetric[rows].to(low.device)[:, None, None]
        qmin, qmax = (float(code) for code in code_range(b, signed))
        span = torch.where(sym, peak, high - low)  # [R, C, 1]
        floor = torch.where(span > 0, SCALE_EPS, 1e-4)  # an all-zero channel gets a step that lets it move
        s = (span / (qmax - qmin) * shrink).maximum(floor)  # [R, C, K]
        # qmin stands for the minimum, as nearly as a whole number of steps from zero allows
        z = torch.where(sym, 0.0, (s * qmin - low * shrink) / s).round_().clamp_(qmin, qmax)
        s, z = s.flatten(0, 1), z.flatten(0, 1)  # [P, K]
        best = _best_candidates(points, b, channels.repeat(len(rows)), s, qmin - z, qmax - z)[:, None]
        chosen = s.gather(1, best).view(len(rows), -1)
        scale[rows], zero_point[rows] = chosen, z.gather(1, best).view_as(chosen)
    return scale, zero_point


@torch.no_grad()
def choose_qparams(x: Tensor | Histogram, bits: Tensor, symmetric: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Step size and zero point of every format, each the best of 80 shrunken ranges under mean |x - x_hat|^2.4.

    Args:
        x: values per channel, float [C, M] (C = 1 for per-tensor formats), or a histogram of one channel.
        bits: bit-widths of the R formats, int64 [R].
        symmetric: bool [R]; symmetric formats have zero point 0.
        signed: False uses codes 0 .. 2^b - 1 (inputs without negative values).

    Returns:
        (scale, zero point), float [R, C] each, on the CPU for a histogram. The error is at most 0.5 % above the best of the 80 ranges, and so of the
        unshrunken one. All-zero channels get a tiny positive step.

    Raises:
        ValueError: a value is not finite.

    Source: EQ-Net section 3.2 and its released calibration (see header for what differs).

    Examples:
        >>> scale, _ = choose_qparams(torch.linspace(-1, 1, 101)[None], torch.tensor([8]), torch.tensor([True]), True)
        >>> round(2 / scale.item())
        255
    """
    bits, symmetric = bits.cpu(), symmetric.cpu()
    if isinstance(x, Histogram):
        return _search(x.low.cpu(), x.high.cpu(), x.bins().points, bits, symmetric, signed)
    x = x.detach().float()
    blocks = (_Channels(block) for block in x.split(max(1, _CHANNEL_BLOCK // x.shape[1])))
    found = [_search(b.low, b.high, b.points, bits, symmetric, signed) for b in blocks]
    scale, zero_point = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return scale, zero_point


def in_threads(function: Callable[[T], object], items: Sequence[T]) -> None:
    """Calls `function` on each item, in as many threads as torch uses, each of which runs torch on one.

    A search is thousands of short operations. If each were split between threads, these would wait for one another more
    than they work, above all on a busy machine. The results are those of a plain loop.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(function, items))  # raises what a call has raised
    finally:
        torch.set_num_threads(threads)  # new threads begin with the number that was set last
