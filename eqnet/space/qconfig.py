"""The datum of eqnet: which format every quantizer of a network uses.

A `QuantConfig` maps layer names to a `LayerConfig` (weight format, activation format). It is a frozen, hashable value;
everything else in the library is a function of it. Layers are addressed by name, never by position.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eqnet.documents import parse_json

Granularity = Literal["tensor", "channel"]
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """Facts about one quantizable layer, measured by tracing one image through the network.

    Attributes:
        name: module name as in `model.named_modules()`.
        kind: "conv", "linear" or "conv_transpose".
        weight_shape: shape of the weight tensor, e.g. `(out, in / groups, k, k)`.
        macs: multiply-accumulate operations per image, summed over all calls.
        act_numel: input elements per image, summed over all calls.
        calls: calls per forward pass; 0 for layers whose weight is read directly (their input stays in floating point).
        signed_input: False if no input value was negative.
        reads_images: True if its input is the image itself.
    """

    name: str
    kind: Literal["conv", "linear", "conv_transpose"]
    weight_shape: tuple[int, ...]
    macs: int
    act_numel: int
    calls: int = 1
    signed_input: bool = True
    reads_images: bool = False

    @property
    def weight_numel(self) -> int:
        """Number of weights."""
        numel = 1
        for size in self.weight_shape:
            numel *= size
        return numel

    @property
    def channel_axis(self) -> int:
        """Axis of the weight that counts output channels (per group for transposed convolutions)."""
        return 1 if self.kind == "conv_transpose" else 0

    @property
    def channels(self) -> int:
        """Number of step sizes of a per-channel weight format."""
        return self.weight_shape[self.channel_axis]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {
            "name": self.name,
            "kind": self.kind,
            "weight_shape": list(self.weight_shape),
            "macs": self.macs,
            "act_numel": self.act_numel,
            "calls": self.calls,
            "signed_input": self.signed_input,
            "reads_images": self.reads_images,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerInfo:
        """Inverse of `to_json`. Raises ValueError for anything else."""
        try:
            layer = LayerInfo(**{**data, "weight_shape": tuple(data["weight_shape"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the facts of a layer of a space: {error}") from error
        counts = (*layer.weight_shape, layer.macs, layer.act_numel, layer.calls)
        switches = (layer.signed_input, layer.reads_images)
        if (
            not isinstance(layer.name, str)
            or layer.kind not in ("conv", "linear", "conv_transpose")
            or len(layer.weight_shape) < 2
            or not all(type(count) is int and 0 <= count < 2**63 for count in counts)
            or not all(isinstance(switch, bool) for switch in switches)
        ):
            raise ValueError(f"not the facts of a layer of a space: {_short(data)}")
        return layer


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How one tensor is quantized.

    Attributes:
        bits: bit-width, 2 to 8.
        symmetric: zero point 0; otherwise an integer zero point.
        granularity: one step size per "tensor" or per output "channel".
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}; got {_short(self.bits)}.")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be true or false; got {_short(self.symmetric)}.")
        if self.granularity not in ("tensor", "channel"):
            raise ValueError(f"granularity must be 'tensor' or 'channel'; got {_short(self.granularity)}.")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"bits": self.bits, "symmetric": self.symmetric, "granularity": self.granularity}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> QuantFormat:
        """Inverse of `to_json`. Raises ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"bits", "symmetric", "granularity"}:
            raise ValueError(f"a format needs exactly the keys bits, symmetric and granularity; got {_short(data)}.")
        return QuantFormat(data["bits"], data["symmetric"], data["granularity"])


@dataclass(frozen=True, slots=True)
class Form:
    """What a whole network shares beside its bit-widths: (weight granularity, weight symmetry, activation symmetry).

    EQ-Net trains per-layer forms and deploys one form per network: 2 x 2 x 2 = 8 forms.
    """

    granularity: Granularity
    weight_symmetric: bool
    act_symmetric: bool

    @property
    def name(self) -> str:
        """E.g. 'channel-sym-asym': granularity, weight symmetry, activation symmetry."""
        sym = {True: "sym", False: "asym"}
        return f"{self.granularity}-{sym[self.weight_symmetric]}-{sym[self.act_symmetric]}"

    @staticmethod
    def parse(name: str) -> Form:
        """Inverse of `name`. Raises ValueError for anything else."""
        for form in ALL_FORMS:
            if form.name == name:
                return form
        raise ValueError(f"unknown form {name!r}; the forms are {', '.join(f.name for f in ALL_FORMS)}.")

    def weight_format(self, bits: int) -> QuantFormat:
        """The weight format of this form at `bits`."""
        return QuantFormat(bits, self.weight_symmetric, self.granularity)

    def act_format(self, bits: int) -> QuantFormat:
        """The activation format of this form at `bits` (always per tensor)."""
        return QuantFormat(bits, self.act_symmetric, "tensor")


ALL_FORMS: tuple[Form, ...] = tuple(
    Form(granularity, weight_symmetric, act_symmetric)
    for granularity in ("tensor", "channel")
    for weight_symmetric in (True, False)
    for act_symmetric in (True, False)
)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Formats of one layer; `act=None` leaves its input in floating point."""

    weight: QuantFormat
    act: QuantFormat | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"weight": self.weight.to_json(), "act": None if self.act is None else self.act.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerConfig:
        """Inverse of `to_json`. Raises ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"weight", "act"}:
            raise ValueError(f"a layer needs exactly the keys weight and act; got {_short(data)}.")
        act = None if data["act"] is None else QuantFormat.from_json(data["act"])
        return LayerConfig(QuantFormat.from_json(data["weight"]), act)


class QuantConfig(Mapping[str, LayerConfig]):
    """A mixed-precision assignment: layer name -> `LayerConfig`. Immutable and hashable; order does not matter.

    Examples:
        >>> c = QuantConfig({"fc": LayerConfig(QuantFormat(4), QuantFormat(8))})
        >>> c["fc"].weight.bits, QuantConfig.from_json(c.to_json()) == c
        (4, True)
    """

    __slots__ = ("_hash", "_layers")

    def __init__(self, layers: Mapping[str, LayerConfig]) -> None:
        self._layers = dict(layers)
        self._hash = hash(frozenset(self._layers.items()))

    def __getitem__(self, name: str) -> LayerConfig:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[QuantConfig], tuple[dict[str, LayerConfig]]]:
        return QuantConfig, (self._layers,)  # hashes of strings differ between processes: never pickle the hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantConfig) and self._layers == other._layers

    def __repr__(self) -> str:
        return f"QuantConfig({self._layers!r})"

    def replace(self, changes: Mapping[str, LayerConfig]) -> QuantConfig:
        """A copy with some layers changed. Raises ValueError for a name that is not in the config."""
        foreign = sorted(set(changes) - set(self._layers))
        if foreign:
            raise ValueError(f"no layer named {', '.join(foreign)} in this config.")
        return QuantConfig({**self._layers, **changes})

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict `{layer name: {"weight": {...}, "act": {...} or null}}`."""
        return {name: layer.to_json() for name, layer in self._layers.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any] | str) -> QuantConfig:
        """Inverse of `to_json`; also accepts the JSON text. Raises ValueError naming the first layer that is wrong."""
        if isinstance(data, str):
            data = parse_json(data, "the config")
        if not isinstance(data, Mapping):
            raise ValueError(f"a config is an object of layers; got {type(data).__name__}.")
        layers = {}
        for name, layer in data.items():
            try:
                layers[name] = LayerConfig.from_json(layer)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        return QuantConfig(layers)


def _short(data: Any) -> str:
    """What a message quotes of a value that may be of any size."""
    return reprlib.repr(data)
