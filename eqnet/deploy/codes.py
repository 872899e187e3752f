"""The integers of a layer as a target stores them: weight codes, the grid of the input, folded BN, integer biases.

Everything is numpy, in float64 wherever a number is computed, and rounded once to float32.

Folding. BN after a layer computes `y = f * (s_w s_a S + b) + h` in each output channel, S being the integer sum over codes
minus zero points, `f = gain / sqrt(var + eps)` and `h = shift - mean * f`. So `y = (f s_w) s_a S + (f b + h)`: the same codes
and the same sum; only the step size and the bias change. Step sizes are positive, so a negative f turns the codes: `-q` where
the container has it, else the complement `~q` with the zero point `~z` (`~q - ~z = -(q - z)`) where the target subtracts
zero points of weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eqnet.nn.layers import QuantizedLayer
from eqnet.space import LayerConfig, LayerInfo, QuantFormat
from eqnet.space.hardware import HardwareTarget
from eqnet.space.target_rules import ActRule, BiasRule, WeightRule

Container = Literal["int8", "uint8", "int4", "int2"]
Floats = NDArray[np.float64]
LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "int2": (-2, 1)}
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Grid:
    """The grid of an activation: `code = clip(round(x / scale) + zero_point, low, high)`, stored in `container`."""

    scale: float
    zero_point: int
    low: int
    high: int
    container: Container

    @property
    def clipped(self) -> bool:
        """Whether the range is narrower than the container."""
        return (self.low, self.high) != LIMITS[self.container]

    def code_of(self, value: float) -> int:
        """The code of one value, by the arithmetic of QuantizeLinear."""
        rounded = int(np.round(np.float32(value) / np.float32(self.scale)))
        return min(max(rounded + self.zero_point, self.low), self.high)

    def bounded(self, low: float, high: float) -> Grid:
        """The grid behind a clip of the values: `quantize(clip(x, low, high)) = clip(quantize(x), code(low), code(high))`."""
        ends = self.code_of(low) if low > -np.inf else self.low, self.code_of(high) if high < np.inf else self.high
        return dataclasses.replace(self, low=ends[0], high=ends[1])

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class WeightCodes:
    """The weight of a layer in the file: `(codes - zero_point) * scale` along `axis`.

    Attributes:
        codes: int8, shape of the weight.
        scale, zero_point: float32 and int8, [1] per tensor or [C] per channel.
        axis: of the output channels.
        container: of a code.
        turned: channels whose codes changed their sign.
        shift: codes and zero point are `2**shift` times those of the subnet, the step size `2**-shift` times.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int8]
    axis: int
    container: Container
    turned: tuple[int, ...] = ()
    shift: int = 0

    def shifted(self, by: int) -> WeightCodes:
        """The same weight, exactly, on a step size `2**-by` times as large."""
        codes, zero = self.codes << by, self.zero_point << by
        scale = self.scale * np.float32(2.0**-by)
        return dataclasses.replace(self, codes=codes, zero_point=zero, scale=scale, shift=self.shift + by)

    @property
    def centred(self) -> NDArray[np.int16]:
        """Codes minus zero points."""
        return self.codes.astype(np.int16) - self._along(self.zero_point).astype(np.int16)

    def _along(self, values: NDArray[Any]) -> NDArray[Any]:
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return values.reshape(shape)


def input_grid(layer: QuantizedLayer, name: str, info: LayerInfo, fmt: QuantFormat, target: HardwareTarget) -> Grid:
    """The grid of a layer's input in the target's container.

    Signed and unsigned codes are the same numbers half a range apart, where zero points are free.

    Raises:
        ValueError: the target executes another range or other step sizes than the subnet was measured with.
    """
    assert layer.act_scale is not None
    rule = target.act_rule(info, fmt)
    scale, zero = float(layer.act_scale), int(layer.act_zero_point)
    low, high = int(layer.act_qmin), int(layer.act_qmax)
    executed = target.code_range(info, "act", fmt, signed=low < 0)
    if (low, high) != executed:
        raise ValueError(_mismatch(name, target, f"input codes {executed[0]} to {executed[1]}", f"{low} to {high}"))
    if rule.power_of_two and not _is_power_of_two(np.float32(scale)):
        raise ValueError(_mismatch(name, target, "power-of-two step sizes of inputs", f"{scale:g}"))
    kind = act_kind(rule, fmt.bits)
    shift = 0
    if rule.zero_point == "any":
        half = 2 ** (fmt.bits - 1)
        shift = half if kind == "uint8" and low < 0 else -half if kind == "int8" and high > 127 else 0
    elif low >= 0 and high > 127:
        kind = "uint8"
    elif low < 0:
        kind = "int8"
    return Grid(scale, zero + shift, low + shift, high + shift, kind)


def act_kind(rule: ActRule, bits: int) -> Literal["int8", "uint8"]:
    """The container that the target prefers for activations of a bit-width."""
    kind = rule.signed[0]
    if bits < rule.container_bits(QuantFormat(bits)) and rule.clipped is not None:
        kind = rule.clipped
    return "int8" if kind == "signed" else "uint8"


def weight_codes(
    layer: QuantizedLayer, name: str, info: LayerInfo, chosen: LayerConfig, target: HardwareTarget
) -> WeightCodes:
    """The trained weight in the target's container.

    Raises:
        ValueError: the target does not execute all codes of the subnet, or other step sizes.
    """
    fmt = chosen.weight
    rule = target.weight_rule(info, fmt)
    codes = layer.weight_codes.cpu().numpy()
    scale = layer.weight_scale.cpu().numpy().astype(np.float32).reshape(-1)
    zero = layer.weight_zero_point.cpu().numpy().astype(np.int8).reshape(-1)
    if fmt.granularity == "tensor":
        scale, zero = scale[:1], zero[:1]
    low, high = target.code_range(info, "weight", fmt)
    if int(codes.min()) < low or int(codes.max()) > high:
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(_mismatch(name, target, f"weight codes {low} to {high}", found))
    if rule.power_of_two and not _is_power_of_two(scale):
        raise ValueError(_mismatch(name, target, "power-of-two step sizes of weights", f"{float(scale[0]):g}"))
    return WeightCodes(codes, scale, zero, info.channel_axis, container_of(rule, fmt))


def container_of(rule: WeightRule, fmt: QuantFormat) -> Container:
    """The narrowest ONNX type that holds codes of the target's container."""
    bits = rule.container_bits(fmt)
    return "int2" if bits <= 2 else "int4" if bits <= 4 else "int8"


def fold_batch_norm(weight: WeightCodes, factor: Floats, zero_points: bool, lowest: int = -128) -> WeightCodes | str:
    """The weight with BN's factors in its step sizes; the same codes up to the sign of each channel.

    Channels whose factor is zero, or makes the step size no normal float32, become constants: all codes are the zero point.

    Args:
        weight: the trained codes.
        factor: f of the module's docstring, float64 [C].
        zero_points: whether the target subtracts zero points of weights.
        lowest: smallest code that the target executes.

    Returns:
        The new weight, or the reason why it cannot be.
    """
    axis = weight.axis
    codes = np.moveaxis(weight.codes.copy(), axis, 0)
    scale = np.broadcast_to(weight.scale, factor.shape).astype(np.float64)
    zero = np.broadcast_to(weight.zero_point, factor.shape).copy()
    low, high = max(LIMITS[weight.container][0], lowest), LIMITS[weight.container][1]
    folded = np.abs(factor) * scale
    dead = folded < _SMALLEST_STEP
    turned = np.flatnonzero((factor < 0) & ~dead)
    for channel in turned:
        block = codes[channel].astype(np.int16)
        if zero[channel] == 0 and -block.min() <= high and -block.max() >= low:
            codes[channel] = -block
        elif zero_points:
            codes[channel], zero[channel] = ~codes[channel], ~zero[channel]
        else:
            return f"channel {channel} has a negative gain, and the code {int(block.min())} has no negative"
    for channel in np.flatnonzero(dead):
        codes[channel] = zero[channel]
    folded[dead] = scale[dead]
    return WeightCodes(
        np.ascontiguousarray(np.moveaxis(codes, 0, axis)),
        folded.astype(np.float32),
        zero,
        axis,
        weight.container,
        tuple(int(c) for c in turned),
    )


@dataclass(frozen=True)
class IntegerBias:
    """A bias in integers: `codes * scale`, zero point 0; the scale is [1] or [C]."""

    codes: NDArray[np.signedinteger[Any]]
    scale: NDArray[np.float32]
    error: float


def integer_bias(bias: Floats, weight: WeightCodes, grid: Grid, rule: BiasRule) -> IntegerBias | str:
    """The bias as the target's rule stores it: off by at most half a step.

    Args:
        bias: float64 [C].
        weight: codes of one operand; its step sizes and those of `grid` give that of the sums.
        grid: of the other operand.
        rule: dtype and scale; a free scale is that of the sums.

    Returns:
        The integers, or the reason why the bias stays in floating point.
    """
    if rule.scale == "power_of_two":
        limit = 127 if rule.dtype == "int8" else 2**31 - 1
        peak = max(float(np.abs(bias).max()), _SMALLEST_STEP)
        scale = np.array([2.0 ** np.ceil(np.log2(peak / limit))], dtype=np.float32)
    else:
        scale = (weight.scale.astype(np.float32) * np.float32(grid.scale)).astype(np.float32)
    dtype: type[np.signedinteger[Any]] = np.int8 if rule.dtype == "int8" else np.int32
    if float(scale.min()) < _SMALLEST_STEP:
        return "its step size is no normal float32"
    codes = np.round(bias / scale.astype(np.float64))
    limits = np.iinfo(dtype)
    if codes.min() < limits.min or codes.max() > limits.max:
        return f"it is out of the range of {rule.dtype}"
    error = float(np.abs(codes * scale.astype(np.float64) - bias).max())
    return IntegerBias(codes.astype(dtype), scale, error)


def bias_in_finer_steps(
    bias: Floats, weight: WeightCodes, bits: int, grid: Grid, rule: BiasRule
) -> tuple[WeightCodes, IntegerBias | str]:
    """The weight and its bias on the finest step size of the sums that the container of narrow codes allows.

    The step size of the sums of few bits is coarse, and so is a bias in its multiples. Codes of `bits` bits leave room in
    their container: `2**k` times the codes with `2**-k` times the step size are the same weight, and their bias is off by
    `2**-k` times as much. One bit of the container stays free, for turned signs and for CPUs whose sums of 8-bit products
    saturate.

    Args:
        bias: float64 [C].
        weight: codes of `bits` bits.
        bits: of a code.
        grid: as for `integer_bias`.
        rule: as for `integer_bias`.
    """
    free = LIMITS[weight.container][1].bit_length() - bits
    for by in range(free if rule.scale != "power_of_two" else 0, 0, -1):
        finer = weight.shifted(by)
        number = integer_bias(bias, finer, grid, rule)
        if isinstance(number, IntegerBias) and float(finer.scale.min()) >= _SMALLEST_STEP:
            return finer, number
    return weight, integer_bias(bias, weight, grid, rule)


def batch_norm_affine(gain: Floats, shift: Floats, mean: Floats, var: Floats, eps: float) -> tuple[Floats, Floats]:
    """(factor, offset) of `y = factor * x + offset`, float64 [C]."""
    factor = gain / np.sqrt(var + eps)
    return factor, shift - mean * factor


def _is_power_of_two(scale: NDArray[np.float32] | np.float32) -> bool:
    return bool(np.all(np.frexp(scale)[0] == 0.5))


def _mismatch(name: str, target: HardwareTarget, executed: str, found: str) -> str:
    return (
        f"layer {name!r}: {target.name} executes {executed}, but the subnet has {found}; search or measure it with "
        f"--target {target.name}."
    )


def first_problem(problems: Sequence[str]) -> None:
    """Raises ValueError with the first violation and the number of others."""
    if problems:
        more = f" ({len(problems) - 1} more; see `eqnet targets check`)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0].rstrip('.')}{more}.")
