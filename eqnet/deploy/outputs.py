"""Quantizers that a target needs besides those of the subnet: which tensors get one, and how it is written.

Where an integer kernel only runs with a quantized output (ONNX Runtime's convolutions), outputs of layers that no input
quantizer reads alone get one. Where a graph must be all integer (`integer_add`), every tensor does, except inside sequences
that run as one kernel; operations that only move values keep the grid of their input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir

from eqnet.deploy.codes import LIMITS, Container, Grid
from eqnet.deploy.graph import Layer, absorb_clips, array_of, constant_bounds, new_node, only_consumer, quantizer_nodes
from eqnet.space.hardware import HardwareTarget
from eqnet.space.target_rules import ActRule

MOVES_VALUES = (
    "MaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
)  # commute with quantizers
_FIXED = {"Softmax": "softmax", "Sigmoid": "logistic", "Tanh": "tanh"}  # names in `HardwareTarget.fixed_outputs`


@dataclass(frozen=True)
class Place:
    """A tensor that gets an 8-bit quantizer by a rule of activations; its grid where the target gives it."""

    value: ir.Value
    rule: ActRule
    can_clip: bool
    grid: Grid | None = None


def places(graph: ir.Graph, layers: Mapping[str, Layer], target: HardwareTarget) -> dict[str, Place]:
    """The tensors that need a quantizer, by the name that it gets."""
    found = dict(_layer_outputs(layers))
    if target.integer_add:
        taken = {id(place.value) for place in found.values()}
        found |= {name: place for name, place in _all_tensors(graph, layers, target) if id(place.value) not in taken}
    return found


def _layer_outputs(layers: Mapping[str, Layer]) -> Iterator[tuple[str, Place]]:
    """Outputs, behind fused ReLU and clips, of layers whose integer kernel needs a quantized output and that have none."""
    for layer in layers.values():
        if not layer.integer or layer.rules.output != "quantized":
            continue
        for node in layer.nodes:
            value = _after_clips(node.outputs[0])
            if not _is_quantized(value):
                yield f"{node.name}/output", Place(value, layer.rules.act[0], layer.can_clip)


def _after_clips(value: ir.Value) -> ir.Value:
    while (following := only_consumer(value)) is not None and _is_clip(following):
        value = following.outputs[0]
    return value


def _is_clip(node: ir.Node) -> bool:
    return node.op_type in ("Relu", "Clip") and constant_bounds(node)[0] is not None


def _is_quantized(value: ir.Value) -> bool:
    """Whether a quantizer alone reads the value, if need be behind operations that commute with it."""
    reader = only_consumer(value)
    while reader is not None and reader.op_type in MOVES_VALUES:
        reader = only_consumer(reader.outputs[0])
    return reader is not None and reader.op_type == "QuantizeLinear"


def _all_tensors(graph: ir.Graph, layers: Mapping[str, Layer], target: HardwareTarget) -> Iterator[tuple[str, Place]]:
    """Floating-point tensors outside fused sequences that depend on the image and that no quantizer reads alone."""
    own = {id(node): layer for layer in layers.values() for node in layer.nodes}
    rule = next(rules.act[0] for _, rules in target.ops if rules is not None)
    fixed = {output.op: output for output in target.fixed_outputs}
    dynamic = {id(value) for value in graph.inputs}
    for node in graph:
        if not any(id(value) in dynamic for value in node.inputs):
            continue
        dynamic |= {id(value) for value in node.outputs}
        if node.op_type in ("DequantizeLinear", "QuantizeLinear", *MOVES_VALUES):
            continue
        for value in node.outputs:
            following = only_consumer(value)
            fused = following is not None and (_is_clip(following) or _continues_layer(node, following, own))
            if value.dtype != ir.DataType.FLOAT or fused or _is_quantized(value) or not _is_read(value):
                continue
            layer, grid = own.get(id(node)), None
            known = fixed.get(_FIXED.get(node.op_type, ""))
            if known is not None:
                low = -128 if rule.signed[0] == "signed" else 0
                grid = Grid(
                    known.scale, known.zero_point + (0 if low else 128), low, low + 255, "int8" if low else "uint8"
                )
            yield (
                f"{node.name}/output",
                Place(value, rule if layer is None else layer.rules.act[0], layer is not None and layer.can_clip, grid),
            )


def _continues_layer(node: ir.Node, following: ir.Node, own: Mapping[int, Layer]) -> bool:
    """Whether a node is BN or the bias behind a layer."""
    bias = following.op_type == "Add" and any(array_of(value) is not None for value in following.inputs)
    return id(node) in own and (following.op_type == "BatchNormalization" or (node.op_type == "MatMul" and bias))


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def write_outputs(graph: ir.Graph, found: Mapping[str, Place], grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """Quantizes tensors. Returns the grids as written, bounded by the clips they took in."""
    written = {}
    for name, place in found.items():
        value, producer = place.value, place.value.producer()
        assert producer is not None
        marker = new_node("Output", [value], name, value, ir.DataType.FLOAT)
        graph.insert_after(producer, [marker])
        _redirect(graph, value, marker)
        x, written[name] = absorb_clips(graph, value, grids[name], place.can_clip)
        nodes = quantizer_nodes(graph, x, written[name], name, name)
        graph.insert_before(marker, nodes)
        marker.outputs[0].replace_all_uses_with(nodes[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(marker, safe=True)
    return written


def _redirect(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Lets everything but `node` read the output of `node` instead of a value."""
    for use in list(value.uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, node.outputs[0])
    if value.is_graph_output():
        graph.outputs[list(graph.outputs).index(value)] = node.outputs[0]


def keep_grids(graph: ir.Graph) -> dict[str, Grid]:
    """Quantizes the outputs of operations that only move values, with the constants of their inputs' quantizers.

    No value changes. Returns the grids by the names of the quantizers.
    """
    kept = {}
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type in MOVES_VALUES and node.inputs[0] is not None else None
        value = node.outputs[0]
        if source is None or source.op_type != "DequantizeLinear" or _is_quantized(value):
            continue
        codes, scale, zero = source.inputs[:3]
        assert codes is not None
        name = f"{node.name}/output"
        zero_point = array_of(zero)
        container = cast(Container, zero_point.dtype.name)
        kept[name] = Grid(float(array_of(scale)), int(zero_point), *LIMITS[container], container)
        quantize = new_node("QuantizeLinear", [value, scale, zero], f"{name}/quantize", value, codes.dtype)
        dequantize = new_node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero], f"{name}/dequantize", value, ir.DataType.FLOAT
        )
        graph.insert_after(node, [quantize, dequantize])
        for use in list(value.uses()):
            if use.node is not quantize:
                use.node.replace_input_with(use.idx, dequantize.outputs[0])
        if value.is_graph_output():
            graph.outputs[list(graph.outputs).index(value)] = dequantize.outputs[0]
    return kept
