"""Whether an exported graph is what its description and its target say: nothing left unspecified, no other precision.

`check_graph` compares three things for every layer: the nodes and constants of the file, the description beside it, and the
rules of the target. It finds what a runtime would pass over in silence: a missing quantizer, codes in a container that
runs in floating point, a step size or zero point that the target does not execute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eqnet.deploy.products import PRODUCTS
from eqnet.deploy.reference import IntegerLayer, IntegerReference, Quantizer, integer_range
from eqnet.space import LayerInfo, QuantConfig
from eqnet.space.hardware import HardwareTarget

Array = NDArray[Any]
_MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity")
_JOINS = ("Add", "Concat")


def check_graph(
    model: Any,
    reference: IntegerReference,
    sidecar: Mapping[str, Any],
    layers: Sequence[LayerInfo],
    target: HardwareTarget,
) -> dict[str, list[str]]:
    """What is wrong by layer, one sentence each; quantizers and additions that belong to no layer count as layers."""
    config = QuantConfig.from_json(sidecar["config"])
    found: dict[str, list[str]] = {}
    known: set[str] = set()
    for info in layers:
        facts = sidecar["layers"].get(info.name)
        if facts is None:
            found[info.name] = ["it is missing in the description"]
            continue
        problems: list[str] = []
        for name in facts["nodes"]:
            layer = reference.layers.get(name)
            if layer is None:
                problems += [f"no node {name!r} with integer weights"] * (facts["op"] in PRODUCTS)
                continue
            if layer.act is not None:
                known.add(layer.act.name)
            problems += [*_weight_problems(layer, info, config, facts, target, model)]
            problems += [*_act_problems(layer, info, config, facts, target), *_bias_problems(layer, facts, reference)]
        if problems:
            found[info.name] = list(dict.fromkeys(problems))
    described = sidecar["quantizers"] | sidecar.get("kept_grids", {})
    for name, problems in _quantizer_problems(reference, described, known).items():
        found.setdefault(name, []).extend(problems)
    if target.integer_add:
        for name in _float_joins(model, reference):
            found.setdefault(name, []).append("an operand is in floating point; the target needs an all-integer graph")
    return found


def _weight_problems(
    layer: IntegerLayer, info: LayerInfo, config: QuantConfig, facts: Any, target: HardwareTarget, model: Any
) -> Iterator[str]:
    fmt = config[info.name].weight
    try:
        rule = target.weight_rule(info, fmt)
    except ValueError as error:
        yield str(error).rstrip(".")
        return
    codes, zero = _stored(layer, model)
    if codes is None:
        yield "its weight is no integer constant"
        return
    if codes.dtype.name != facts["weight"]["container"]:
        yield f"weight codes are stored as {codes.dtype.name}, not {facts['weight']['container']}"
    low, high = target.code_range(info, "weight", fmt)
    turned = bool(facts["weight"]["turned"])  # a turned channel holds negated codes
    lowest, highest = (min(low, -high - 1), max(high, -low)) if turned else (low, high)
    step = 2 ** int(facts["weight"].get("shift", 0))
    if bool(np.any(codes.astype(np.int64) % step)):
        yield f"weight codes are no multiples of {step}, which the description says"
    low, high, lowest, highest = low * step, high * step, lowest * step, highest * step
    container_low, container_high = integer_range(codes.dtype)
    if int(codes.min()) < max(lowest, container_low) or int(codes.max()) > min(highest, container_high):
        yield f"weight codes {int(codes.min())} to {int(codes.max())} are out of the range {low} to {high}"
    if zero is not None and bool(np.any(zero != 0)) and not facts["weight"]["zero_point"]:
        yield "its weight has a zero point"
    if zero is not None and bool(np.any(zero != 0)) and False not in rule.symmetric:
        yield "its weight has a zero point, which the target does not subtract"
    if rule.power_of_two and not _powers_of_two(layer.weight.scale):
        yield "the step size of its weight is no power of two"
    if layer.weight.scale.size > 1 and "channel" not in rule.granularity:
        yield "its weight has a step size for each channel"


def _stored(layer: IntegerLayer, model: Any) -> tuple[Array | None, Array | None]:
    """Weight codes and zero point as stored."""
    from onnx import numpy_helper

    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {t.name: t for t in model.graph.initializer}
    name = layer.node.input[1]
    while name in producers and producers[name].op_type != "DequantizeLinear":
        name = producers[name].input[0]
    node = producers.get(name)
    if node is None or node.input[0] not in constants:
        return None, None
    zero = node.input[2] if len(node.input) > 2 else ""
    codes = numpy_helper.to_array(constants[node.input[0]])
    return codes, numpy_helper.to_array(constants[zero]).astype(np.int64) if zero in constants else None


def _act_problems(
    layer: IntegerLayer, info: LayerInfo, config: QuantConfig, facts: Any, target: HardwareTarget
) -> Iterator[str]:
    said, fmt = facts["act"], config[info.name].act
    if layer.act is None:
        if said is not None:
            yield "its input has no quantizer (QuantizeLinear and DequantizeLinear are missing)"
        return
    if said is None or fmt is None:
        yield "its input is quantized, which the description does not say"
        return
    yield from _differences(layer.act, said)
    try:
        rule = target.act_rule(info, fmt)
    except ValueError as error:
        yield str(error).rstrip(".")
        return
    if rule.power_of_two and not _powers_of_two(layer.act.scale):
        yield "the step size of its input is no power of two"
    if rule.zero_point == "zero" and bool(np.any(layer.act.zero_point != 0)):
        yield "its input has a zero point"


def _bias_problems(layer: IntegerLayer, facts: Any, reference: IntegerReference) -> Iterator[str]:
    said = facts["bias"]
    if said is None or said["dtype"] == "float32" or layer.act is None:
        return
    bias = reference.on_grid(reference.bias_of(layer.node))
    if bias is None:
        yield "its bias is no integer constant"
    elif said["dtype"] == "int32":
        scale = (layer.weight.scale.reshape(-1) * layer.act.scale.reshape(-1)).astype(np.float32)
        if not bool(np.all(bias.scale.reshape(-1) == scale)):
            yield "the step size of its bias is not the product of those of weight and input"


def _differences(quantizer: Quantizer, said: Mapping[str, Any]) -> Iterator[str]:
    """What a quantizer has otherwise than described."""
    if quantizer.scale.size > 1:
        yield f"quantizer {quantizer.name!r} has a step size for each channel"
        return
    has = {
        "scale": float(quantizer.scale),
        "zero_point": int(quantizer.zero_point),
        "low": quantizer.low,
        "high": quantizer.high,
        "container": quantizer.dtype.name,
    }
    said = {**said, "scale": float(np.float32(said["scale"]))}
    for key, value in has.items():
        if value != said[key]:
            yield f"quantizer {quantizer.name!r} has the {key.replace('_', ' ')} {value}, not {said[key]}"


def _quantizer_problems(
    reference: IntegerReference, described: Mapping[str, Any], known: set[str]
) -> dict[str, list[str]]:
    """Differences between the quantizers of no layer's input in the file and in the description."""
    last = {quantizer.name: quantizer for quantizer in reference.quantizers.values()}
    added = {name.rsplit("/", 1)[0]: q for name, q in last.items() if name not in known}
    found = {name: ["the quantizer is missing"] for name in described if name not in added}
    for name, quantizer in added.items():
        problems = (
            [*_differences(quantizer, described[name])] if name in described else ["it is not in the description"]
        )
        if problems:
            found[name] = problems
    return found


def _float_joins(model: Any, reference: IntegerReference) -> Iterator[str]:
    """Additions and concatenations with an operand that is neither quantized nor constant."""
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type not in _JOINS:
            continue
        for name in node.input:
            while name in producers and producers[name].op_type in _MOVES:
                name = producers[name].input[0]
            quantized = name in producers and producers[name].op_type == "DequantizeLinear"
            if not quantized and reference.constant(name) is None:
                yield node.name or node.output[0]
                break


def _powers_of_two(scale: Array) -> bool:
    return bool(np.all(np.frexp(scale)[0] == 0.5))
