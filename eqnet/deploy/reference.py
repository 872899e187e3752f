"""The integer reference: runs an ONNX graph of QuantizeLinear and DequantizeLinear nodes on its integers.

Runtimes may compute a dequantized convolution in floating point, or requantize in their own order. Here a Conv,
ConvTranspose, Gemm or MatMul of two dequantized operands is computed as the graph means it (Jacob et al., arXiv 1712.05877,
section 2): codes minus zero points are multiplied and summed exactly, the sums must fit into 32 bits, an integer bias of the
scale of the sums is added in integers, and then comes one multiplication:

    y = float32(S + b) * (s_a * s_w)          S = sum (q_a - z_a)(q_w - z_w), scales and products in float32

A float bias is added after it, in float32. Sums are float64 numbers, exact because whole and below 2^53. Padding with zeros
is padding with the zero point. QuantizeLinear is `saturate(half_even(x / scale) + zero point)` in float32. Operations between
quantized layers run in floating point: pooling by torch, everything else by the reference implementations of onnx.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from eqnet.deploy.products import PRODUCTS, attribute, channel_axis, padding, product

Array = NDArray[Any]
Operation = Callable[[Any, list[Any]], list[Any]]  # (node, inputs) -> outputs
_MOVES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True, eq=False)
class Dequantized:
    """A tensor on a grid, `integers * scale`.

    Attributes:
        integers: codes minus zero point, or sums of products of such; whole numbers in float64.
        scale: float32, [] or [C].
        axis: of the C channels.
    """

    integers: NDArray[np.float64]
    scale: NDArray[np.float32]
    axis: int = 0

    def value(self) -> NDArray[np.float32]:
        """float32, one multiplication."""
        return self.integers.astype(np.float32) * along(self.scale, self.axis, self.integers.ndim)


def along(values: Array, axis: int, ndim: int) -> Array:
    """[] or [C] values as an array that broadcasts along `axis` of `ndim` dimensions."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if d == axis % ndim else 1 for d in range(ndim)])


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A QuantizeLinear and the clips of its codes.

    Attributes:
        name: of the QuantizeLinear node.
        scale, zero_point: [] or [C], float32 and integers.
        axis: of the C channels.
        low, high: smallest and largest code, clips included.
        dtype: container of a code, e.g. uint8.
    """

    name: str
    scale: NDArray[np.float32]
    zero_point: Array
    axis: int
    low: int
    high: int
    dtype: np.dtype[Any]

    def codes(self, x: Array) -> Array:
        """Codes of float32 values, in the container's dtype."""
        zero = along(self.zero_point.astype(np.float32), self.axis, x.ndim)
        rounded = np.round(x.astype(np.float32, copy=False) / along(self.scale, self.axis, x.ndim)) + zero
        return np.clip(rounded, self.low, self.high).astype(self.dtype)

    def from_centred(self, centred: Array) -> Array:
        """Codes, in the container's dtype, of codes minus zero point."""
        return (centred + along(self.zero_point.astype(np.float64), self.axis, centred.ndim)).astype(self.dtype)

    def centred(self, codes: Array) -> NDArray[np.float64]:
        """Codes minus zero point."""
        return codes.astype(np.float64) - along(self.zero_point.astype(np.float64), self.axis, codes.ndim)


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer whose weight is stored as codes.

    Attributes:
        name: of its node; a second call of layer `x` is `x#2`.
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: dequantized codes.
        act: quantizer of the input; None if the input is in floating point.
        codes: name of the tensor of input codes, "" without a quantizer.
        strides: of a pooling of 1x1 kernel between the codes and the node, () for none.
    """

    name: str
    node: Any
    weight: Dequantized
    act: Quantizer | None
    codes: str
    strides: tuple[int, ...] = ()

    def sums(self, centred: NDArray[np.float64]) -> NDArray[np.float64]:
        """Accumulators without bias, exact, of input codes minus zero point.

        Raises:
            ValueError: a sum does not fit into 32 bits.
        """
        cut = [slice(None, None, stride) for stride in self.strides]
        read = centred[(slice(None), slice(None), *cut)] if cut else centred
        return _checked(self.name, product(self.node, read, self.weight.integers))

    @property
    def scale(self) -> NDArray[np.float32]:
        """Step size of the accumulators, broadcastable to the output; needs a quantized input of one step size."""
        assert self.act is not None
        return along(*_sum_scale(self.node, self.act.scale, self.weight), self._ndim)

    @property
    def _ndim(self) -> int:
        return self.weight.integers.ndim


class IntegerReference:
    """Executes a graph on integers.

    Args:
        model: an `onnx.ModelProto`.

    Attributes:
        layers: nodes with integer weights by name.
        quantizers: every QuantizeLinear of an activation by the name of its output.

    Raises:
        ValueError: an operation without an implementation, or a form of quantization that is not known (both named).
    """

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        graph = model.graph
        self.nodes = list(graph.node)
        self.inputs = [i.name for i in graph.input if i.name not in {t.name for t in graph.initializer}]
        self.outputs = [o.name for o in graph.output]
        self._opsets = {o.domain: o.version for o in model.opset_import}
        self._constants: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self._run: dict[int, Operation] = {}
        self._last_use = {name: i for i, node in enumerate(self.nodes) for name in node.input}
        for i, node in enumerate(self.nodes):
            if any(a.g.node or a.graphs for a in node.attribute):
                raise ValueError(
                    f"node {node.name!r}: the integer reference has no {node.op_type}, which holds a graph."
                )
            self._run[i] = self._implementation(node)
            if all(name in self._constants for name in node.input if name):
                self._execute(i, self._constants)
        self._producer = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        self.quantizers = self._find_quantizers()
        self.layers = self._find_layers()

    # -- structure ----------------------------------------------------------------------------------------------------

    def _find_quantizers(self) -> dict[str, Quantizer]:
        found: dict[str, Quantizer] = {}
        for node in self.nodes:
            if node.op_type == "QuantizeLinear":
                found[node.output[0]] = self._quantizer(node)
            elif node.op_type == "Clip" and node.input[0] in found:  # of codes
                low, high = (None if not n else int(self._constants[n]) for n in (*node.input[1:], "", "")[:2])
                old = found[node.input[0]]
                low = old.low if low is None else max(old.low, low)
                high = old.high if high is None else min(old.high, high)
                found[node.output[0]] = Quantizer(old.name, old.scale, old.zero_point, old.axis, low, high, old.dtype)
        return found

    def _quantizer(self, node: Any) -> Quantizer:
        try:
            scale: Array = np.asarray(self._constants[node.input[1]], np.float32)
            given = len(node.input) > 2 and node.input[2] != ""
            zero: Array = self._constants[node.input[2]] if given else np.zeros(scale.shape, np.uint8)
        except KeyError:
            raise ValueError(f"node {node.name!r}: step size and zero point must be constants.") from None
        if attribute(node, "block_size", 0):
            raise ValueError(f"node {node.name!r}: the integer reference has no quantization in blocks.")
        low, high = integer_range(zero.dtype)
        scale, zero = (a.reshape(()) if a.size == 1 else a for a in (scale, zero))
        return Quantizer(node.name, scale, zero, attribute(node, "axis", 1), low, high, zero.dtype)

    def _find_layers(self) -> dict[str, IntegerLayer]:
        found = {}
        for node in self.nodes:
            if node.op_type not in PRODUCTS:
                continue
            weight = self._constants.get(node.input[1])
            if not isinstance(weight, Dequantized):
                continue
            producer, strides = self._producer_of(node), ()
            if (
                producer is not None
                and producer.op_type == "MaxPool"
                and set(attribute(producer, "kernel_shape", [])) == {1}
            ):
                strides = tuple(attribute(producer, "strides", []))
                producer = self._producer_of(producer)
            dequantizes = producer is not None and producer.op_type == "DequantizeLinear"
            codes = producer.input[0] if dequantizes else ""
            name = node.name or node.output[0]
            found[name] = IntegerLayer(name, node, weight, self.quantizers.get(codes), codes, strides)
        return found

    def _producer_of(self, node: Any) -> Any:
        """The node that makes the first input of another, None for inputs of the graph and constants."""
        return self.nodes[self._producer[node.input[0]]] if node.input[0] in self._producer else None

    def constant(self, name: str) -> Array | None:
        """The value of a tensor that no input changes, None for any other; float32 if it is on a grid."""
        return _array(self._constants.get(name))  # type: ignore[no-any-return]

    def on_grid(self, name: str) -> Dequantized | None:
        """A constant tensor that is stored as integers, None for any other."""
        value = self._constants.get(name)
        return value if isinstance(value, Dequantized) else None

    def bias_of(self, node: Any) -> str:
        """The bias of a product, "" if it has none; behind a matrix product, what an addition gives it."""
        if len(node.input) > 2:
            return str(node.input[2])
        readers = [n for n in self.nodes if node.output[0] in n.input]
        if node.op_type != "MatMul" or len(readers) != 1 or readers[0].op_type != "Add":
            return ""
        return next((str(name) for name in readers[0].input if name != node.output[0]), "")

    # -- execution ----------------------------------------------------------------------------------------------------

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        forced: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Tensors by name.

        Args:
            feeds: inputs of the graph.
            outputs: names of any tensors of the graph; default: its outputs. Tensors on a grid come as float32 values.
            forced: values that take the place of computed tensors for what follows, e.g. the codes that a runtime has there,
                so that its operations are compared one by one.

        Raises:
            ValueError: a sum of products does not fit into 32 bits; the layer is named.
        """
        wanted = self.outputs if outputs is None else list(outputs)
        values: dict[str, Any] = {**self._constants, **{name: np.asarray(feeds[name]) for name in self.inputs}}
        found: dict[str, Array] = {name: _array(values[name]) for name in wanted if name in values}
        for i, node in enumerate(self.nodes):
            if node.output[0] not in self._constants:
                self._execute(i, values)
            found.update({name: _array(values[name]) for name in node.output if name in wanted})
            values.update({name: (forced or {})[name] for name in node.output if name in (forced or {})})
            for name in node.input:
                if self._last_use[name] == i and name not in self._constants:
                    values.pop(name, None)
        return found

    def _execute(self, i: int, values: dict[str, Any]) -> None:
        node = self.nodes[i]
        results = self._run[i](node, [values[name] if name else None for name in node.input])
        values.update({name: result for name, result in zip(node.output, results, strict=False) if name})

    def _implementation(self, node: Any) -> Operation:
        if node.op_type == "QuantizeLinear":
            return lambda _, inputs: [self._quantizer(node).codes(_array(inputs[0]))]
        own = _OWN.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if own is not None:
            return own
        by_onnx = _by_onnx(node, self._opsets)
        return functools.partial(_move, by_onnx) if node.op_type in _MOVES else by_onnx


def integer_range(dtype: Any) -> tuple[int, int]:
    """Smallest and largest number of an integer dtype, those of 2 and 4 bits included."""
    import ml_dtypes

    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)


def _array(value: Any) -> Any:
    return value.value() if isinstance(value, Dequantized) else value


# -- integers ---------------------------------------------------------------------------------------------------------


def _dequantize(node: Any, inputs: list[Any]) -> list[Any]:
    codes, scale, zero = (*inputs, None)[:3]
    if attribute(node, "block_size", 0):
        raise ValueError(f"node {node.name!r}: the integer reference has no quantization in blocks.")
    scale = np.asarray(scale, np.float32)
    axis = attribute(node, "axis", 1)
    centred = codes.astype(np.float64)
    if zero is not None:
        centred = centred - along(np.asarray(zero).astype(np.float64), axis, codes.ndim)
    return [Dequantized(centred, scale.reshape(()) if scale.size == 1 else scale, axis % max(codes.ndim, 1))]


def _move(by_onnx: Operation, node: Any, inputs: list[Any]) -> list[Any]:
    """Moves the integers of a tensor on a grid; one with a scale per channel only if its axis is known afterwards."""
    x = inputs[0]
    if not isinstance(x, Dequantized) or (x.scale.size > 1 and node.op_type != "Transpose"):
        return by_onnx(node, inputs)
    (moved,) = by_onnx(node, [x.integers, *inputs[1:]])
    order = list(attribute(node, "perm", range(x.integers.ndim)[::-1]))
    axis = order.index(x.axis % x.integers.ndim) if node.op_type == "Transpose" else 0
    return [Dequantized(moved, x.scale, axis)]


def _add(node: Any, inputs: list[Any]) -> list[Any]:
    """Integer addition of an integer bias behind a matrix product, else floating point."""
    first, second = inputs
    if isinstance(first, Dequantized) and isinstance(second, Dequantized):
        for sums, bias in ((first, second), (second, first)):
            if bias.integers.ndim == 1 and sums.axis == sums.integers.ndim - 1:
                return [_add_bias(node.name, sums, bias)]
    return [_array(first) + _array(second)]


def _layer(node: Any, inputs: list[Any]) -> list[Any]:
    """A product in integers if both operands are on grids whose scales factor out, else in float64, rounded once."""
    x, w, bias = (*inputs, None)[:3]
    name = node.name or node.output[0]
    on_grid = isinstance(x, Dequantized) and isinstance(w, Dequantized) and x.scale.size == 1
    if not on_grid or not (w.scale.size == 1 or w.axis == channel_axis(node, w.integers.ndim)):
        out = product(node, _array(x).astype(np.float64), _array(w).astype(np.float64))
        return [_plus(out.astype(np.float32), node, bias)]
    integers = _checked(name, product(node, x.integers, w.integers))
    scale, _ = _sum_scale(node, x.scale, w)
    sums = Dequantized(integers, scale, integers.ndim - 1 if node.op_type in ("Gemm", "MatMul") else 1)
    if isinstance(bias, Dequantized):
        return [_add_bias(name, sums, bias)]
    return [sums if bias is None else _plus(sums.value(), node, bias)]


def _plus(out: Array, node: Any, bias: Any) -> Array:
    if bias is None:
        return out
    axis = out.ndim - 1 if node.op_type == "Gemm" else 1
    return out + along(_array(bias), axis, out.ndim) if _array(bias).ndim == 1 else out + _array(bias)


def _add_bias(name: str, sums: Dequantized, bias: Dequantized) -> Any:
    """Adds an integer bias [C] of the scale of the sums in integers, any other in float32."""
    ndim = sums.integers.ndim
    if sums.scale.size >= bias.scale.size and bool(np.all(sums.scale == bias.scale)):
        total = _checked(name, sums.integers + along(bias.integers, sums.axis, ndim))
        return Dequantized(total, sums.scale, sums.axis)
    return sums.value() + along(bias.value(), sums.axis, ndim)


def _checked(name: str, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums. Raises ValueError if one does not fit into 32 bits."""
    low, high = (sums.min(), sums.max()) if sums.size else (0, 0)
    if low < _INT32[0] or high > _INT32[1]:
        worst = int(low if low < _INT32[0] else high)
        raise ValueError(f"layer {name!r}: the accumulator reaches {worst}, which does not fit into 32 bits.")
    return sums


def _sum_scale(node: Any, act: NDArray[np.float32], weight: Dequantized) -> tuple[NDArray[np.float32], int]:
    """Step sizes of the sums, [] or one per output channel, and the axis of the channels in the output."""
    scale = np.asarray(act * weight.scale, np.float32)
    if node.op_type == "ConvTranspose" and scale.size > 1:
        scale = np.tile(scale, attribute(node, "group", 1))
    return scale, -1 if node.op_type in ("Gemm", "MatMul") else 1


# -- other operations -------------------------------------------------------------------------------------------------


def _by_onnx(node: Any, opsets: Mapping[str, int]) -> Operation:
    """The reference implementation of onnx."""
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(node, opsets=dict(opsets))
    except Exception as error:  # of many kinds
        domain = f"{node.domain}." * (node.domain not in ("", "ai.onnx"))
        raise ValueError(
            f"node {node.name!r}: the integer reference has no operation {domain}{node.op_type}."
        ) from error

    def run(_: Any, inputs: list[Any]) -> list[Any]:
        return list(evaluator.run(None, {n: _array(x) for n, x in zip(node.input, inputs, strict=True) if n}))

    return run


def _max_pool(node: Any, inputs: list[Any]) -> list[Any]:
    """The largest integers of a tensor on a grid are the largest values."""
    x = inputs[0]
    if not isinstance(x, Dequantized) or x.scale.size > 1:
        return _pool(node, inputs)
    return [Dequantized(_pool(node, [x.integers])[0], x.scale, x.axis)]


def _pool(node: Any, inputs: list[Any]) -> list[Any]:
    x = _array(inputs[0])
    dims = x.ndim - 2
    kernel = list(attribute(node, "kernel_shape", []))
    stride, dilation = (list(attribute(node, a, [1] * dims)) for a in ("strides", "dilations"))
    begin, end = padding(node, x.shape[2:], kernel, stride, dilation)
    ceil, largest = bool(attribute(node, "ceil_mode", 0)), node.op_type == "MaxPool"
    supported = dims == 2 and begin == end and all(2 * p <= k for p, k in zip(begin, kernel, strict=True))
    if not supported or (not largest and max(dilation) > 1):
        raise ValueError(
            f"node {node.name!r}: the integer reference has no {node.op_type} of this padding or dilation."
        )
    # float32 holds 16-bit codes exactly, float64 all sums
    values = torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.float64 else x.astype(np.float32)))
    if largest:
        out = F.max_pool2d(values, kernel, stride, begin, dilation, ceil)
    else:
        out = F.avg_pool2d(values, kernel, stride, begin, ceil, bool(attribute(node, "count_include_pad", 0)))
    return [out.numpy().astype(x.dtype)]


def _global_average(node: Any, inputs: list[Any]) -> list[Any]:
    x = _array(inputs[0])
    return [x.mean(axis=tuple(range(2, x.ndim)), keepdims=True, dtype=np.float64).astype(np.float32)]


def _erf(node: Any, inputs: list[Any]) -> list[Any]:
    return [torch.erf(torch.from_numpy(np.ascontiguousarray(_array(inputs[0])))).numpy()]


def _gelu(node: Any, inputs: list[Any]) -> list[Any]:
    x = torch.from_numpy(np.ascontiguousarray(_array(inputs[0])))
    return [F.gelu(x, approximate=attribute(node, "approximate", "none")).numpy()]


_OWN: dict[str, Operation] = {
    "DequantizeLinear": _dequantize,
    "Add": _add,
    **dict.fromkeys(PRODUCTS, _layer),
    "MaxPool": _max_pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_average,
    "Erf": _erf,
    "Gelu": _gelu,
}
