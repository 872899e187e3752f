"""The rules of a hardware target: what its operations take, as data with a strict schema.

Rules of an operation are alternatives in order of preference: a format is executed by the first that takes it. `problems`
says in words what an alternative does not run, `describe` what it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eqnet.space.qconfig import MAX_BITS, MIN_BITS, Granularity, LayerInfo, QuantFormat

CONTAINER_BITS = {"int8": 8, "int4": 4, "int2": 2}


class Strict(BaseModel):
    """Immutable; unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Rule(Strict):
    """What weights and activations have in common.

    Attributes:
        bits: widths of the codes.
        container: what stores a code on the device; "packed" is exactly as wide as the code.
        power_of_two: step sizes are powers of two.
    """

    bits: Annotated[tuple[Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)], ...], Field(min_length=1)]
    container: Literal["int8", "int4", "int2", "packed"]
    power_of_two: bool = False

    @model_validator(mode="after")
    def _codes_fit(self) -> _Rule:
        if max(self.bits) > CONTAINER_BITS.get(self.container, MAX_BITS):
            raise ValueError(f"codes of {max(self.bits)} bits do not fit into the container {self.container}")
        return self

    def container_bits(self, fmt: QuantFormat) -> int:
        """Bits that one code of `fmt` takes on the device."""
        return CONTAINER_BITS.get(self.container, fmt.bits)

    def _width(self) -> str:
        return f"{bits_text(self.bits)} bits {'packed' if self.container == 'packed' else f'in {self.container}'}"

    def _scales(self) -> str:
        return ", power-of-two scales" if self.power_of_two else ""


class WeightRule(_Rule):
    """Weights that an operation takes.

    Attributes:
        symmetric: symmetries; false needs an integer kernel that subtracts weight zero points.
        granularity: one step size per tensor or per output channel.
        narrow_range: the lowest code of the container is left out (int8: -127 to 127). Narrower codes keep their range.
        pointwise: only for 1x1 kernels of stride 1 and linear layers.
        min_channels: only for layers of at least so many output channels.
    """

    symmetric: Annotated[tuple[bool, ...], Field(min_length=1)]
    granularity: Annotated[tuple[Granularity, ...], Field(min_length=1)]
    narrow_range: bool
    pointwise: bool = False
    min_channels: Annotated[int, Field(ge=1)] = 1

    def problems(self, layer: LayerInfo, fmt: QuantFormat) -> list[str]:
        """What this alternative does not run, e.g. ["asymmetric weights"]; empty if it takes the format."""
        outputs, inputs = layer.weight_shape[:2]
        pointwise = layer.weight_numel == outputs * inputs and layer.act_numel * outputs == layer.macs
        return (
            [f"{fmt.bits}-bit weights"] * (fmt.bits not in self.bits)
            + [f"{'' if fmt.symmetric else 'a'}symmetric weights"] * (fmt.symmetric not in self.symmetric)
            + [f"weights with one scale per {fmt.granularity}"] * (fmt.granularity not in self.granularity)
            + ["kernels other than 1x1 with stride 1"] * (self.pointwise and not pointwise)
            + [f"fewer than {self.min_channels} output channels"] * (layer.channels < self.min_channels)
        )

    def describe(self) -> str:
        """E.g. '2-8 bits in int8, symmetric, per tensor or channel'."""
        symmetry = " or ".join(f"{'' if s else 'a'}symmetric" for s in self.symmetric)
        limits = ", 1x1 kernels" * self.pointwise
        limits += f", from {self.min_channels} output channels" if self.min_channels > 1 else ""
        narrow = ", narrow range" * self.narrow_range
        return f"{self._width()}, {symmetry}, per {' or '.join(self.granularity)}{narrow}{self._scales()}{limits}"


class ActRule(_Rule):
    """Activations that an operation takes, always with one step size per tensor.

    Attributes:
        signed: kinds of codes, the preferred one first.
        zero_point: "zero" for codes whose zero point is always 0, "any" otherwise. Signed and unsigned codes are the same
            numbers where any zero point is possible: they differ by half the range of the container.
        clipped: kind of the codes narrower than the container, if not the preferred one: a clip of the other kind costs
            the integer kernel.
    """

    signed: Annotated[tuple[Literal["signed", "unsigned"], ...], Field(min_length=1)]
    zero_point: Literal["zero", "any"]
    clipped: Literal["signed", "unsigned"] | None = None

    @model_validator(mode="after")
    def _represents_negative_values(self) -> ActRule:
        if self.zero_point == "zero" and "signed" not in self.signed:
            raise ValueError("unsigned codes with zero point 0 cannot hold negative values; add 'signed'")
        return self

    def problems(self, fmt: QuantFormat) -> list[str]:
        """What this alternative does not run, e.g. ["4-bit activations"]; empty if it takes the format."""
        return (
            [f"{fmt.bits}-bit activations"] * (fmt.bits not in self.bits)
            + ["asymmetric activations"] * (self.zero_point == "zero" and not fmt.symmetric)
            + ["activations with one scale per channel"] * (fmt.granularity == "channel")
        )

    def describe(self) -> str:
        """E.g. '8 bits in int8, signed, zero point 0'."""
        zero = "zero point 0" if self.zero_point == "zero" else "any zero point"
        return f"{self._width()}, {' or '.join(self.signed)}, {zero}{self._scales()}"


class BiasRule(Strict):
    """Biases: "weight_times_act" scales are the product of both step sizes, zero point 0; null leaves them free."""

    dtype: Literal["int32", "int8", "float32"]
    scale: Literal["weight_times_act", "power_of_two"] | None

    @model_validator(mode="after")
    def _float_has_no_scale(self) -> BiasRule:
        if self.dtype == "float32" and self.scale is not None:
            raise ValueError("a float32 bias has no scale; write scale: null")
        return self


class OpRules(Strict):
    """Rules of one kind of operation.

    Attributes:
        kernel: what runs within the rules; "float" stores codes but computes in floating point.
        weight: alternatives, the preferred one first.
        act: alternatives, the preferred one first.
        bias: how biases are stored.
        fallback: what happens outside the rules: the target refuses, or silently computes in floating point.
        output: "quantized" if the integer kernel only runs when its output is quantized too.
        pointwise_stride: "pooled" if 1x1 kernels run in integers only when a pooling in front of them takes their stride.
    """

    kernel: Literal["integer", "float"] = "integer"
    weight: Annotated[tuple[WeightRule, ...], Field(min_length=1)]
    act: Annotated[tuple[ActRule, ...], Field(min_length=1)]
    bias: BiasRule
    fallback: Literal["refuse", "float"]
    output: Literal["quantized", "any"] = "any"
    pointwise_stride: Literal["pooled", "any"] = "any"


class Ops(Strict):
    """Rules by kind of operation; null for what the target does not run."""

    conv: OpRules | None
    depthwise: OpRules | None
    linear: OpRules | None
    conv_transpose: OpRules | None


class FixedOutput(Strict):
    """An operation whose output has a step size and a zero point that cannot be chosen."""

    op: str
    scale: Annotated[float, Field(gt=0)]
    zero_point: int


def bits_text(bits: Iterable[int]) -> str:
    """E.g. '2-8', '8' or '2, 4, 8'."""
    ordered = sorted(set(bits))
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}-{ordered[-1]}"
    return ", ".join(map(str, ordered))
