"""Hardware targets: which formats a device executes, in which containers and by which rules.

A target is data: one YAML file beside this module (`targets/<name>.yaml`, each fact with its source) or the user's own in
the same schema. The width of a code and the container that stores it are two things: a 3-bit weight in an int8 container
runs on the int8 kernel, saves no time, and saves storage only if the file packs it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from eqnet.documents import read_yaml
from eqnet.space.qconfig import LayerInfo, QuantConfig, QuantFormat
from eqnet.space.space import QuantSpace, Slot
from eqnet.space.target_rules import ActRule, BiasRule, FixedOutput, OpRules, Ops, Strict, WeightRule, bits_text

OpKind = Literal["conv", "depthwise", "linear", "conv_transpose"]
_BUILT_IN = Path(__file__).parent / "targets"
_PLURAL: dict[OpKind, str] = {
    "conv": "convolutions",
    "depthwise": "depthwise convolutions",
    "linear": "linear layers",
    "conv_transpose": "transposed convolutions",
}
_SLOT = {"weight": "weights", "act": "activations"}


class HardwareTarget(Strict):
    """What a device and its runtime execute.

    Attributes:
        name: short name, e.g. "onnxruntime-x86".
        title: the device and runtime in words.
        ops: rules of each kind of operation.
        first_last_bits: widths allowed in the first and last layer; null for no such rule.
        rounding: of the device when it quantizes activations; null where it is not documented.
        latency_bits: what computing time follows: the width of the container, or of the code (bit-serial).
        storage_bits: what the deployed file stores: containers, or packed codes.
        integer_add: inputs of additions and concatenations need quantizers, else the graph is not all integer.
        fused: sequences that run as one kernel, e.g. "conv+bn+relu"; quantize after the last one.
        fixed_outputs: operations whose output format is given.
        opset: smallest ONNX opset of a graph, null if the target does not read ONNX.
        runtime: the oldest runtime or device that the facts are known to hold for.
        processor: what the runtime must run on for the facts to hold, null for anything.
        notes: what an exporter or a user must know besides.
        sources: where the facts come from.
        verified: statements that were measured.
        unverified: statements taken without proof.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: str
    ops: Ops
    first_last_bits: tuple[int, ...] | None = None
    rounding: Literal["half_even", "half_up", "half_away"] | None
    latency_bits: Literal["container", "code"]
    storage_bits: Literal["container", "packed"]
    integer_add: bool
    fused: tuple[str, ...] = ()
    fixed_outputs: tuple[FixedOutput, ...] = ()
    opset: int | None = None
    runtime: str | None = None
    processor: Literal["x86_64", "aarch64"] | None = None
    notes: tuple[str, ...] = ()
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    verified: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    # -- what runs ----------------------------------------------------------------------------------------------------

    def rules(self, layer: LayerInfo) -> OpRules | None:
        """Rules of the layer's kind of operation, None if the target does not run it."""
        rules: OpRules | None = getattr(self.ops, op_kind(layer))
        return rules

    def weight_rule(self, layer: LayerInfo, fmt: QuantFormat) -> WeightRule:
        """The alternative that executes a weight format. Raises ValueError if there is none (the reason of `allows`)."""
        rules = self.rules(layer)
        for rule in () if rules is None else rules.weight:
            if not rule.problems(layer, fmt):
                return rule
        raise ValueError(self.allows(layer, "weight", fmt))

    def act_rule(self, layer: LayerInfo, fmt: QuantFormat) -> ActRule:
        """The alternative that executes an activation format. Raises ValueError as `weight_rule`."""
        rules = self.rules(layer)
        for rule in () if rules is None else rules.act:
            if not rule.problems(fmt):
                return rule
        raise ValueError(self.allows(layer, "act", fmt))

    def allows(self, layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> str | None:
        """None if the target executes the format, else one sentence: layer, rule, what would be allowed.

        `first_last_bits` depends on the network; `restrict` and `check` see to it.
        """
        problems = self._problems(layer, slot, fmt)
        return self._sentence(layer, slot, problems) if problems else None

    def container_bits(self, layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> int:
        """Bits of the container of one code. Raises ValueError for a format the target does not run."""
        rule = self.weight_rule(layer, fmt) if slot == "weight" else self.act_rule(layer, fmt)
        return rule.container_bits(fmt)

    def executed(self, layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> QuantFormat:
        """The format whose computing time `fmt` has: as wide as its container, unless time follows the code.

        Raises:
            ValueError: the target does not run the format.
        """
        bits = self.container_bits(layer, slot, fmt)
        return fmt if self.latency_bits == "code" else dataclasses.replace(fmt, bits=bits)

    def timed(self, layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> QuantFormat:
        """The format under which a latency table lists the time of `fmt`.

        As `executed`, but all activations narrower than their container are listed as one bit narrower: their codes are
        clipped, which takes time too.

        Raises:
            ValueError: the target does not run the format.
        """
        executed = self.executed(layer, slot, fmt)
        narrow = slot == "act" and fmt.bits < executed.bits
        return dataclasses.replace(executed, bits=executed.bits - 1) if narrow else executed

    def code_range(self, layer: LayerInfo, slot: Slot, fmt: QuantFormat, signed: bool = True) -> tuple[int, int]:
        """Smallest and largest code that the target executes exactly.

        Weights are signed; a narrow range leaves out the lowest code of the container, so of narrower codes none.
        Unsigned codes (inputs without negative values) need unsigned containers, a zero point that shifts them, or a
        spare bit; otherwise they must become signed ones, of which half stays unused.

        Args:
            layer: the layer.
            slot: "weight" or "act".
            fmt: a format that the target runs.
            signed: signedness of the simulated codes.

        Raises:
            ValueError: the target does not run the format.
        """
        half = 2 ** (fmt.bits - 1)
        if slot == "weight":
            weight = self.weight_rule(layer, fmt)
            lowest = -(2 ** (weight.container_bits(fmt) - 1)) + weight.narrow_range
            return max(-half, lowest), half - 1
        act = self.act_rule(layer, fmt)
        shifts = "unsigned" in act.signed or act.zero_point == "any" or fmt.bits < act.container_bits(fmt)
        return (0, 2 * half - 1) if shifts and not signed else (-half, half - 1)

    # -- spaces and configs -------------------------------------------------------------------------------------------

    def restrict(self, space: QuantSpace) -> QuantSpace:
        """The subspace that the target executes; layers with fixed bits are restricted in their forms.

        Raises:
            ValueError: a layer has nothing left: which, by which rule, what the target would allow, what the space has.
        """
        ends = _ends(space.layers)

        def problems(layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> list[str]:
            return self._problems(layer, slot, fmt, layer.name in ends)

        for gene in space.genes:
            layers = [space.info(name) for name in gene.layers]
            found = {fmt: [(layer, problems(layer, gene.slot, fmt)) for layer in layers] for fmt in gene.formats}
            if all(any(p for _, p in rows) for rows in found.values()):
                nearest = min(found.values(), key=lambda rows: sum(len(p) for _, p in rows))
                layer, rules = next((layer, p) for layer, p in nearest if p)
                tied = f" (tied: {', '.join(gene.layers)})" * (len(layers) > 1)
                has = _formats_text(gene.formats, gene.slot)
                sentence = self._sentence(layer, gene.slot, rules, layer.name in ends)
                raise ValueError(f"{sentence[:-1]}; the space offers only {has}{tied}.")
        return space.restrict(lambda layer, slot, fmt: not problems(layer, slot, fmt))

    def check(self, config: QuantConfig, layers: Sequence[LayerInfo]) -> list[str]:
        """What the target cannot run of a config, one sentence each; empty if it runs all of it.

        Layers that are read directly (`calls == 0`) have floating-point inputs: only their weights are checked.

        Raises:
            ValueError: the config and `layers` name different layers.
        """
        wrong = sorted({layer.name for layer in layers} ^ set(config))
        if wrong:
            raise ValueError(f"the config does not belong to these layers: {', '.join(wrong[:5])} on one side only.")
        ends, violations = _ends(layers), []
        for layer in layers:
            formats: list[tuple[Slot, QuantFormat | None]] = [("weight", config[layer.name].weight)]
            if layer.calls > 0:
                formats.append(("act", config[layer.name].act))
            for slot, fmt in formats:
                end = layer.name in ends
                problems = ["inputs in floating point"] if fmt is None else self._problems(layer, slot, fmt, end)
                if problems:
                    violations.append(self._sentence(layer, slot, problems, end))
        return violations

    def _problems(self, layer: LayerInfo, slot: Slot, fmt: QuantFormat, end: bool = False) -> list[str]:
        """Problems of the alternative that has fewest."""
        rules = self.rules(layer)
        if rules is None:
            return [_PLURAL[op_kind(layer)]]
        found = (
            [r.problems(layer, fmt) for r in rules.weight] if slot == "weight" else [r.problems(fmt) for r in rules.act]
        )
        problems = min(found, key=len)
        if end and self.first_last_bits is not None and fmt.bits not in self.first_last_bits:
            problems = [*problems, f"{fmt.bits}-bit {_SLOT[slot]} in the first and last layer"]
        return problems

    def _sentence(self, layer: LayerInfo, slot: Slot, problems: list[str], end: bool = False) -> str:
        rules, kind = self.rules(layer), _PLURAL[op_kind(layer)]
        if rules is None:
            return f"layer {layer.name!r}: {self.name} does not run {kind}."
        allowed = " / ".join(rule.describe() for rule in (rules.weight if slot == "weight" else rules.act))
        if end and self.first_last_bits is not None:
            allowed += f" ({bits_text(self.first_last_bits)} bits in the first and last layer)"
        otherwise = "; anything else runs in floating point" * (rules.fallback == "float")
        listed = " and ".join(problems)
        return f"layer {layer.name!r}: {self.name} does not run {listed} in {kind}, only {allowed}{otherwise}."

    # -- words --------------------------------------------------------------------------------------------------------

    def describe(self, slot: Slot) -> str:
        """The rules of a slot for all kinds of operations, kinds of equal rules together."""
        kinds: dict[str, list[str]] = {}
        for kind in _PLURAL:
            rules: OpRules | None = getattr(self.ops, kind)
            text = "not run"
            if rules is not None:
                text = " / ".join(rule.describe() for rule in (rules.weight if slot == "weight" else rules.act))
                text += " (computed in floating point)" * (rules.kernel == "float")
            kinds.setdefault(text, []).append(kind)
        if len(kinds) == 1:
            return next(iter(kinds))
        return "; ".join(f"{', '.join(names)}: {text}" for text, names in kinds.items())


def op_kind(layer: LayerInfo) -> OpKind:
    """The kind of operation; a convolution with one input channel per group and several groups is depthwise.

    Groups are not among the facts about a layer. A kernel of one input channel belongs to a single group if it reads the
    image, has one output channel, or reads fewer than two values for each output position.
    """
    if layer.kind != "conv" or layer.weight_shape[1] > 1 or layer.weight_shape[0] == 1 or layer.reads_images:
        return layer.kind
    output_positions = layer.macs / layer.weight_numel
    return "depthwise" if layer.calls == 0 or layer.act_numel >= 2 * output_positions else "conv"


def _ends(layers: Sequence[LayerInfo]) -> set[str]:
    """First and last layer that are called."""
    called = [layer.name for layer in layers if layer.calls > 0] or [layer.name for layer in layers]
    return {called[0], called[-1]}


def _formats_text(formats: Iterable[QuantFormat], slot: Slot) -> str:
    """E.g. '2-8 bits symmetric per tensor; 4 bits asymmetric per channel'."""
    forms: dict[str, list[int]] = {}
    for fmt in formats:
        granularity = f" per {fmt.granularity}" if slot == "weight" else ""
        forms.setdefault(f"{'' if fmt.symmetric else 'a'}symmetric{granularity}", []).append(fmt.bits)
    return "; ".join(f"{bits_text(bits)} bits {form}" for form, bits in forms.items())


# -- files ------------------------------------------------------------------------------------------------------------


def target_names() -> list[str]:
    """Names of the built-in targets, sorted."""
    return sorted(path.stem for path in _BUILT_IN.glob("*.yaml"))


def load_target(name_or_path: str) -> HardwareTarget:
    """A built-in target by name, or the user's own from a YAML file of the same schema.

    Args:
        name_or_path: e.g. "onnxruntime-x86" or "boards/mine.yaml"; a text with a suffix or a slash is a path.

    Raises:
        ValueError: unknown name (with the nearest known one); unreadable file; a rule that is wrong, missing or unknown
            (file, key, what is expected).
    """
    names = target_names()
    if name_or_path in names:
        return _read_target(_BUILT_IN / f"{name_or_path}.yaml")
    if Path(name_or_path).suffix in (".yaml", ".yml") or "/" in name_or_path or Path(name_or_path).is_file():
        return _read_target(Path(name_or_path))
    near = difflib.get_close_matches(name_or_path.lower(), names, 1, 0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"the built-in ones are {', '.join(names)}."
    raise ValueError(f"unknown target {name_or_path!r}; {hint}")


def _read_target(path: Path) -> HardwareTarget:
    data = read_yaml(path, "target file")
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold the rules of a target by name; got a {type(data).__name__}.")
    try:  # through JSON, whose lists may become tuples in strict mode
        return HardwareTarget.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ValueError(_explain(error, path)) from error


def _explain(error: ValidationError, path: Path) -> str:
    first = error.errors()[0]
    *parents, last = (str(part) for part in first["loc"]) if first["loc"] else ("",)
    where, key = ".".join(parents), ".".join([*parents, last])
    place = f" in {where}" if where else ""
    if first["type"] == "missing":
        return f"{path}: {last!r} is missing{place}."
    if first["type"] == "extra_forbidden":
        models = (WeightRule, ActRule, BiasRule, OpRules, Ops, FixedOutput, HardwareTarget)
        near = difflib.get_close_matches(last, {name for model in models for name in model.model_fields}, 1, 0.5)
        return f"{path}: unknown key {last!r}{place}" + (f"; did you mean {near[0]!r}?" if near else ".")
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], (dict, list)) else f"; got {first['input']!r}"
    return f"{path}: {key}: {message[0].lower()}{message[1:]}{got}."
