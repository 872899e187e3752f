"""Passes over the ONNX graph of a subnet: integers take the places that `trace.py` marked, and BN goes into them.

Order: find the layers, fold BN, absorb clips into input grids, round biases, write quantizers, weights and biases, then quantize
what the target needs quantized besides (`outputs.py`). Each pass is exact, except integer biases (off by at most half a step) and
added quantizers.

Names: the node of a layer has the layer's name (a second call of it `name#2`). What belongs to it begins with that name:
`name/weight/codes|scale|zero_point|dequantize`, `name/act/scale|zero_point|quantize|clip|dequantize`, `name/bias/...`,
`name/output/...` (an added quantizer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import nn

from eqnet.deploy.codes import (
    Floats,
    Grid,
    IntegerBias,
    WeightCodes,
    batch_norm_affine,
    bias_in_finer_steps,
    fold_batch_norm,
    input_grid,
    weight_codes,
)
from eqnet.deploy.trace import DOMAIN, INPUT, LAYER, WEIGHT, quantized_layers
from eqnet.space import LayerConfig, LayerInfo, QuantConfig
from eqnet.space.hardware import HardwareTarget
from eqnet.space.qconfig import MAX_BITS
from eqnet.space.target_rules import CONTAINER_BITS, OpRules

_DTYPES = {"int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4, "int2": ml_dtypes.int2}
_LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass
class Layer:
    """A quantized layer on its way into the file.

    Attributes:
        info, chosen, rules: facts, formats, and what the target says about the operation.
        weight, grid: the integers; no grid where the input stays in floating point.
        nodes: the node of each call.
        bias: float64 [C] after folding, None if there is none.
        batch_norm: "folded", why it was not, or None if there is none.
        rounded: the bias in integers; None where it stays in floating point.
        bias_reason: why the bias is not what the target's rule says.
    """

    info: LayerInfo
    chosen: LayerConfig
    rules: OpRules
    weight: WeightCodes
    grid: Grid | None
    nodes: list[ir.Node] = field(default_factory=list)
    bias: Floats | None = None
    batch_norm: str | None = None
    rounded: IntegerBias | None = None
    bias_reason: str | None = None

    @property
    def name(self) -> str:
        """The layer's name in the subnet."""
        return self.info.name

    @property
    def integer(self) -> bool:
        """Whether the target says that it runs on an integer kernel."""
        return self.grid is not None and self.rules.kernel == "integer" and self.nodes[0].op_type in _LAYER_OPS

    @property
    def can_clip(self) -> bool:
        """Whether the target takes clips of input codes: where it runs codes narrower than their container."""
        return any(min(rule.bits) < CONTAINER_BITS.get(rule.container, MAX_BITS) for rule in self.rules.act)


# -- small things -----------------------------------------------------------------------------------------------------


def constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """An initializer; the one of that name if it exists."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def array_of(value: ir.Value | None) -> Any:
    """The numpy array of a constant, None for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value, once."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def new_node(
    op_type: str, inputs: Sequence[ir.Value | None], name: str, like: ir.Value, dtype: Any, **attrs: Any
) -> ir.Node:
    """A node with one output, in the shape of another value."""
    output = ir.Value(name=f"{name}/value", shape=like.shape, type=ir.TensorType(dtype))
    return ir.node(op_type, list(inputs), attributes=attrs or None, outputs=[output], name=name)


def _per_channel(values: Any) -> Any:
    """A scalar for one value, else a vector."""
    return values.reshape(()) if values.size == 1 else values


def quantizer_nodes(graph: ir.Graph, x: ir.Value, grid: Grid, prefix: str, names: str) -> list[ir.Node]:
    """QuantizeLinear, a Clip of codes where the range is narrower than the container, DequantizeLinear.

    Args:
        graph: gets the constants.
        x: what is quantized.
        grid: how.
        prefix: of the nodes' names.
        names: prefix of the constants' names.
    """
    dtype = _DTYPES[grid.container]
    code_type = ir.DataType.from_numpy(np.dtype(dtype))
    scale = constant(graph, f"{names}/scale", np.float32(grid.scale))
    zero = constant(graph, f"{names}/zero_point", dtype(grid.zero_point))
    nodes = [new_node("QuantizeLinear", [x, scale, zero], f"{prefix}/quantize", x, code_type)]
    if grid.clipped:
        ends = [constant(graph, f"{names}/{end}", dtype(getattr(grid, end))) for end in ("low", "high")]
        nodes.append(new_node("Clip", [nodes[-1].outputs[0], *ends], f"{prefix}/clip", x, code_type))
    last = nodes[-1].outputs[0]
    nodes.append(new_node("DequantizeLinear", [last, scale, zero], f"{prefix}/dequantize", x, ir.DataType.FLOAT))
    return nodes


# -- layers -----------------------------------------------------------------------------------------------------------


def integer_layers(
    subnet: nn.Module, config: QuantConfig, layers: Sequence[LayerInfo], target: HardwareTarget
) -> dict[str, Layer]:
    """The quantized layers with their integers in the target's containers.

    Raises:
        ValueError: the target executes other codes than the subnet has.
    """
    modules, found = quantized_layers(subnet), {}
    for info in layers:
        module, chosen, rules, grid = modules[info.name], config[info.name], target.rules(info), None
        assert rules is not None
        if module.act_scale is not None and chosen.act is not None and info.calls > 0:
            grid = input_grid(module, info.name, info, chosen.act, target)
        found[info.name] = Layer(info, chosen, rules, weight_codes(module, info.name, info, chosen, target), grid)
    return found


def find_nodes(graph: ir.Graph, layers: Mapping[str, Layer]) -> None:
    """Finds the nodes that read the layers' weights, and names them after the layers.

    Raises:
        ValueError: a layer's weight is not in the graph.
    """
    for marker in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, WEIGHT)]:
        layer = layers[marker.attributes[LAYER].as_string()]
        for reader in _readers(marker):
            if reader not in layer.nodes:
                layer.nodes.append(reader)
                reader.name = layer.name if len(layer.nodes) == 1 else f"{layer.name}#{len(layer.nodes)}"
        place = _bias_of(layer.nodes[0]) if layer.nodes else None
        bias = None if place is None else array_of(place[0].inputs[place[1]])
        layer.bias = None if bias is None else bias.astype(np.float64)
    for layer in layers.values():
        if not layer.nodes:
            raise ValueError(
                f"layer {layer.name!r} is not part of the exported graph: its output does not reach the model's."
            )


def _readers(marker: ir.Node) -> list[ir.Node]:
    """Nodes that compute with a weight, behind transpositions."""
    nodes = []
    for use in marker.outputs[0].uses():
        nodes += _readers(use.node) if use.node.op_type == "Transpose" else [use.node]
    return nodes


def _bias_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and the input that hold the bias of a layer: behind a matrix product an addition of one constant per channel."""
    if node.op_type != "MatMul":
        has_bias = node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2
        return (node, 2) if has_bias else None
    following = only_consumer(node.outputs[0])
    if following is None or following.op_type != "Add":
        return None
    position = 1 - list(following.inputs).index(node.outputs[0])
    array = array_of(following.inputs[position])
    return (following, position) if array is not None and array.ndim == 1 else None


def fold_norms(graph: ir.Graph, layers: Mapping[str, Layer], target: HardwareTarget) -> None:
    """Puts BN behind a layer into its step sizes and bias, where the target has a step size for each channel."""
    for layer in layers.values():
        node = layer.nodes[0]
        norm = only_consumer(node.outputs[0])
        if norm is None or norm.op_type != "BatchNormalization":
            continue
        layer.batch_norm = _fold(layer, node, norm, target)
        if layer.batch_norm == "folded":
            norm.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
            graph.remove(norm, safe=True)


def _fold(layer: Layer, node: ir.Node, norm: ir.Node, target: HardwareTarget) -> str:
    rule = target.weight_rule(layer.info, layer.chosen.weight)
    values = [array_of(value) for value in norm.inputs[1:5]]
    if len(layer.nodes) > 1:
        return "the layer is called more than once"
    if node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) > 1:
        return "groups of a transposed convolution share step sizes"
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or any(value is None for value in values):
        return "it does not normalise the channels of the layer"
    if "channel" not in rule.granularity:
        return f"{target.name} has one step size per tensor"
    if rule.power_of_two:
        return f"{target.name} has power-of-two step sizes"
    gain, shift, mean, var = (value.astype(np.float64) for value in values)
    factor, offset = batch_norm_affine(gain, shift, mean, var, norm.attributes.get_float("epsilon", 1e-5))
    lowest = -(2 ** (rule.container_bits(layer.chosen.weight) - 1)) + rule.narrow_range
    folded = fold_batch_norm(layer.weight, factor, False in rule.symmetric, lowest)
    if isinstance(folded, str):
        return folded
    layer.weight = folded
    layer.bias = offset if layer.bias is None else factor * layer.bias + offset
    return "folded"


# -- clips ------------------------------------------------------------------------------------------------------------


def absorb_clips(graph: ir.Graph, value: ir.Value, grid: Grid, can_clip: bool) -> tuple[ir.Value, Grid]:
    """Takes ReLU and clips before a quantizer into its codes, exactly, where runtimes would not fuse them otherwise.

    A ReLU whose zero is the container's lowest code stays: runtimes fuse it.

    Returns:
        What the quantizer reads now, and its grid.
    """
    node = value.producer()
    while node is not None and node.op_type in ("Relu", "Clip") and len(list(value.uses())) <= 1:
        low, high = constant_bounds(node)
        inner = node.inputs[0]
        if low is None or high is None or inner is None or value.is_graph_output():
            break
        bounded = grid.bounded(low, high)
        stays = node.op_type == "Relu" and (bounded == grid and not bounded.clipped)
        if stays or (bounded.clipped and not can_clip):
            break
        value.replace_all_uses_with(inner)
        graph.remove(node, safe=True)
        value, grid, node = inner, bounded, inner.producer()
    return value, grid


def constant_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Ends of a ReLU or Clip; None where they are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    ends = [*node.inputs[1:3], None, None][:2]
    arrays = [array_of(end) for end in ends]
    if any(end is not None and array is None for end, array in zip(ends, arrays, strict=True)):
        return None, None
    low, high = arrays
    return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))


# -- writing ----------------------------------------------------------------------------------------------------------


def write_inputs(graph: ir.Graph, layers: Mapping[str, Layer]) -> None:
    """Replaces the marked inputs by quantizers."""
    calls: dict[str, int] = {}
    for marker in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, INPUT)]:
        layer = layers[marker.attributes[LAYER].as_string()]
        x, output = marker.inputs[0], marker.outputs[0]
        assert x is not None
        assert layer.grid is not None
        calls[layer.name] = calls.get(layer.name, 0) + 1
        number = calls[layer.name]
        if layer.info.calls == 1:
            x, layer.grid = absorb_clips(graph, x, layer.grid, layer.can_clip)
        prefix = f"{layer.name}/act" if number == 1 else f"{layer.name}#{number}/act"
        nodes = quantizer_nodes(graph, x, layer.grid, prefix, f"{layer.name}/act")
        graph.insert_before(marker, nodes)
        output.replace_all_uses_with(nodes[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(marker, safe=True)


def pool_strides(graph: ir.Graph, layers: Mapping[str, Layer]) -> None:
    """Gives the strides of 1x1 convolutions to a pooling of 1x1 in front of them, where the target asks for it."""
    for layer in layers.values():
        if layer.rules.pointwise_stride != "pooled" or not layer.integer:
            continue
        for node in layer.nodes:
            ones = [1] * len(layer.info.weight_shape[2:])
            strides = list(node.attributes.get_ints("strides", ones))
            if node.op_type != "Conv" or list(layer.info.weight_shape[2:]) != ones or strides == ones:
                continue
            if any(node.attributes.get_ints("pads", [0])):
                continue
            x = node.inputs[0]
            assert x is not None
            pool = new_node(
                "MaxPool", [x], f"{node.name}/act/pool", node.outputs[0], x.dtype, kernel_shape=ones, strides=strides
            )
            pool.outputs[0].shape = None
            graph.insert_before(node, [pool])
            node.replace_input_with(0, pool.outputs[0])
            node.attributes["strides"] = ir.AttrInt64s("strides", ones)


def write_weights(graph: ir.Graph, layers: Mapping[str, Layer]) -> None:
    """Replaces the marked weights by DequantizeLinear of the codes; a transposition goes into the codes."""
    for marker in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, WEIGHT)]:
        layer, value = layers[marker.attributes[LAYER].as_string()], marker.outputs[0]
        transposes = [use.node for use in value.uses() if use.node.op_type == "Transpose"]
        for transpose in transposes:
            dequantize = _weight_node(graph, layer, marker, transposed=True)
            graph.insert_before(transpose, [dequantize])
            transpose.outputs[0].replace_all_uses_with(dequantize.outputs[0])
            graph.remove(transpose, safe=True)
        if value.uses():
            dequantize = _weight_node(graph, layer, marker, transposed=False)
            graph.insert_before(marker, [dequantize])
            value.replace_all_uses_with(dequantize.outputs[0])
        graph.remove(marker, safe=True)


def _weight_node(graph: ir.Graph, layer: Layer, marker: ir.Node, transposed: bool) -> ir.Node:
    weight, name = layer.weight, f"{layer.name}/weight"
    dtype = _DTYPES[weight.container]
    codes, axis = (weight.codes.T, 1 - weight.axis) if transposed else (weight.codes, weight.axis)
    stem = f"{name}/codes_transposed" if transposed else f"{name}/codes"
    inputs = [
        constant(graph, stem, np.ascontiguousarray(codes).astype(dtype)),
        constant(graph, f"{name}/scale", _per_channel(weight.scale)),
        constant(graph, f"{name}/zero_point", _per_channel(weight.zero_point).astype(dtype)),
    ]
    number = 1 + sum(node.name.startswith(f"{name}/dequantize") for node in graph if node.name)
    suffix = "" if number == 1 else f"#{number}"
    node = new_node("DequantizeLinear", inputs, f"{name}/dequantize{suffix}", inputs[0], ir.DataType.FLOAT, axis=axis)
    if weight.scale.size == 1:
        del node.attributes["axis"]
    return node


def round_biases(layers: Mapping[str, Layer]) -> None:
    """Biases in integers where the target's rule says so; low-bit weights get finer step sizes for them, at the same values."""
    for layer in layers.values():
        rule, bits = layer.rules.bias, layer.chosen.weight.bits
        if layer.bias is None or layer.grid is None or not layer.integer or rule.dtype == "float32":
            continue
        layer.weight, number = bias_in_finer_steps(layer.bias, layer.weight, bits, layer.grid, rule)
        if isinstance(number, str):
            layer.bias_reason = number
        else:
            layer.rounded = number


def write_biases(graph: ir.Graph, layers: Mapping[str, Layer]) -> None:
    """Writes the biases, in integers or in floating point."""
    for layer in layers.values():
        for node in layer.nodes if layer.bias is not None else []:
            place, value = _bias_of(node), _bias_value(graph, layer, node)
            if place is None:  # BN gave the layer its bias
                node.resize_inputs(3)
            reader, position = place or (node, 2)
            reader.replace_input_with(position, value)


def _bias_value(graph: ir.Graph, layer: Layer, node: ir.Node) -> ir.Value:
    name, number = f"{layer.name}/bias", layer.rounded
    assert layer.bias is not None
    if number is None:
        return constant(graph, name, layer.bias.astype(np.float32))
    zero = np.zeros(_per_channel(number.scale).shape, number.codes.dtype)
    inputs = [
        constant(graph, f"{name}/codes", number.codes),
        constant(graph, f"{name}/scale", _per_channel(number.scale)),
        constant(graph, f"{name}/zero_point", zero),
    ]
    axis = {} if number.scale.size == 1 else {"axis": 0}
    dequantize = new_node(
        "DequantizeLinear", inputs, f"{node.name}/bias/dequantize", inputs[0], ir.DataType.FLOAT, **axis
    )
    graph.insert_before(node, [dequantize])
    return dequantize.outputs[0]
