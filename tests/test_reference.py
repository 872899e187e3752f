"""The integer reference against brute force, closed forms, and ONNX Runtime without optimizations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from eqnet.deploy.reference import IntegerReference
from tests.graphs import Graph

Array = NDArray[Any]


def unoptimized(model: ModelProto, x: Array, outputs: list[str] | None = None) -> list[Array]:
    """ONNX Runtime, every node as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(outputs, {"x": x})  # type: ignore[no-any-return]


def brute_force(x: Array, w: Array, stride: int, pad: int, groups: int) -> Array:
    """Integer convolution by its definition."""
    n, c, h, _ = x.shape
    o, ci, k, _ = w.shape
    padded = np.zeros((n, c, h + 2 * pad, h + 2 * pad), np.int64)
    padded[:, :, pad : pad + h, pad : pad + h] = x
    size = (h + 2 * pad - k) // stride + 1
    out = np.zeros((n, o, size, size), np.int64)
    for b, oc, i, j in itertools.product(range(n), range(o), range(size), range(size)):
        first = oc // (o // groups) * ci
        window = padded[b, first : first + ci, i * stride : i * stride + k, j * stride : j * stride + k]
        out[b, oc, i, j] = int((window * w[oc].astype(np.int64)).sum())
    return out


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("stride", "pad", "groups", "zero"), [(1, 1, 1, 0), (2, 1, 2, 37), (1, 2, 6, 255), (2, 0, 3, 128)]
)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_convolution_is_the_exact_sum_of_codes_minus_zero_points(
    rng: np.random.Generator, stride: int, pad: int, groups: int, zero: int, asymmetric: bool
) -> None:
    w = rng.integers(-128, 128, (6, 6 // groups, 3, 3)).astype(np.int8)
    wz = rng.integers(-128, 128, 6).astype(np.int8) if asymmetric else np.zeros(6, np.int8)
    ws = rng.uniform(0.001, 0.1, 6).astype(np.float32)
    x = rng.normal(0, 3, (2, 6, 7, 7)).astype(np.float32)
    g = Graph()
    operands = [g.quantize("x", "a", 0.05, zero), g.weight("w", w, ws, wz)]
    out = g.node("Conv", operands, "conv", strides=[stride] * 2, pads=[pad] * 4, group=groups, kernel_shape=[3, 3])
    reference = IntegerReference(g.model(x.shape, out))

    layer = reference.layers["conv"]
    assert layer.act is not None
    codes = layer.act.codes(x)
    np.testing.assert_array_equal(codes, unoptimized_codes(g, x, "a_q"))
    centred = w.astype(np.int64) - wz.astype(np.int64).reshape(-1, 1, 1, 1)
    sums = brute_force(codes.astype(np.int64) - zero, centred, stride, pad, groups)
    np.testing.assert_array_equal(layer.sums(layer.act.centred(codes)), sums)

    y = reference.run({"x": x})["conv"]
    scale = (np.float32(0.05) * ws).reshape(-1, 1, 1)
    np.testing.assert_array_equal(y, sums.astype(np.float32) * scale)
    (by_ort,) = unoptimized(g.model(x.shape, out), x)
    np.testing.assert_allclose(y, by_ort, rtol=0, atol=2e-6 * float(np.abs(by_ort).max()))


def unoptimized_codes(g: Graph, x: Array, name: str) -> Array:
    return unoptimized(g.model(x.shape, name, TensorProto.UINT8), x)[0]


def test_an_integer_bias_is_added_before_the_only_multiplication(rng: np.random.Generator) -> None:
    w, b = rng.integers(-128, 128, (5, 300)).astype(np.int8), rng.integers(-(2**24), 2**24, 5).astype(np.int32)
    x = rng.uniform(0, 255, (4, 300)).astype(np.float32)
    g = Graph()
    ws = rng.uniform(0.001, 0.1, 5).astype(np.float32)
    bias = g.weight("b", b, ws * np.float32(1.0))
    g.node("Gemm", [g.quantize("x", "a", 1.0, 0), g.weight("w", w, ws), bias], "fc", transB=1)
    y = IntegerReference(g.model(x.shape, "fc")).run({"x": x})["fc"]
    sums = np.round(x).astype(np.int64) @ w.astype(np.int64).T + b
    np.testing.assert_array_equal(y, sums.astype(np.float32) * ws)


def test_a_matrix_product_and_the_addition_behind_it(rng: np.random.Generator) -> None:
    """The weight may be stored transposed, as torch writes it, and the bias is an addition."""
    w, b = rng.integers(-8, 8, (5, 12)).astype(np.int8), rng.integers(-999, 999, 5).astype(np.int32)
    ws = rng.uniform(0.01, 0.1, 5).astype(np.float32)
    x = rng.normal(0, 40, (2, 3, 12)).astype(np.float32)
    g = Graph()
    a = g.quantize("x", "a", 1.0, 128)
    transposed = g.node("Transpose", [g.weight("w", w, ws)], "wt", perm=[1, 0])
    product = g.node("MatMul", [a, transposed], "fc")
    g.node("Add", [g.weight("b", b, ws), product], "y")
    model = g.model(x.shape, "y")
    reference = IntegerReference(model)
    y = reference.run({"x": x})["y"]
    codes = np.clip(np.round(x), -128, 127).astype(np.int64)
    np.testing.assert_array_equal(y, (codes @ w.astype(np.int64).T + b).astype(np.float32) * ws)
    np.testing.assert_array_equal(reference.layers["fc"].sums(codes.astype(np.float64)), codes @ w.astype(np.int64).T)
    np.testing.assert_allclose(y, unoptimized(model, x)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_equals_that_of_torch(rng: np.random.Generator, groups: int) -> None:
    w = rng.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8)
    ws = rng.uniform(0.01, 0.1, 3).astype(np.float32)
    x = rng.normal(0, 3, (2, 4, 5, 5)).astype(np.float32)
    g = Graph()
    operands = [g.quantize("x", "a", 0.05, 100), g.weight("w", w, ws, axis=1)]
    geometry = {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1], "kernel_shape": [3, 3]}
    g.node("ConvTranspose", operands, "up", group=groups, **geometry)
    model = g.model(x.shape, "up")
    reference = IntegerReference(model)
    layer = reference.layers["up"]
    assert layer.act is not None
    centred = layer.act.centred(layer.act.codes(x))
    args = (torch.from_numpy(centred), torch.from_numpy(w).double(), None, 2, 1, 1, groups)
    sums = F.conv_transpose2d(*args).numpy()  # type: ignore[arg-type]
    np.testing.assert_array_equal(layer.sums(centred), sums)
    y = reference.run({"x": x})["up"]
    np.testing.assert_array_equal(
        y, sums.astype(np.float32) * (np.tile(ws, groups) * np.float32(0.05)).reshape(-1, 1, 1)
    )
    np.testing.assert_allclose(y, unoptimized(model, x)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_rule_and_to_one_side(rng: np.random.Generator, auto_pad: str) -> None:
    w = rng.integers(-128, 128, (4, 2, 4, 4)).astype(np.int8)
    x = rng.normal(0, 3, (2, 2, 7, 7)).astype(np.float32)
    g = Graph()
    operands = [g.quantize("x", "a", 0.05, 90), g.weight("w", w, 0.02)]
    g.node("Conv", operands, "conv", strides=[2, 2], auto_pad=auto_pad, kernel_shape=[4, 4])
    model = g.model(x.shape, "conv")
    y = IntegerReference(model).run({"x": x})["conv"]
    np.testing.assert_allclose(y, unoptimized(model, x)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_codes_are_clipped_to_their_width_and_rounded_half_to_even(bits: int) -> None:
    x = np.arange(-6, 6, 0.25, dtype=np.float32)[None]
    g = Graph()
    high = 2**bits - 1
    g.quantize("x", "a", 0.5, 1, clip=(0, high))
    y = IntegerReference(g.model(x.shape, "a_dq")).run({"x": x}, ["a_c", "a_dq"])
    codes = [min(max(round(float(v) / 0.5) + 1, 0), high) for v in x[0]]  # Python rounds half to even
    assert y["a_c"][0].tolist() == codes
    np.testing.assert_array_equal(y["a_dq"], (np.array([codes]) - 1) * np.float32(0.5))


def test_a_sum_that_needs_more_than_32_bits_is_an_error_that_names_the_layer() -> None:
    g = Graph()
    w = np.full((1, 2**17), 127, np.int8)
    g.node("Gemm", [g.quantize("x", "a", 1.0, 0), g.weight("w", w, 1.0)], "head", transB=1)
    reference = IntegerReference(g.model((1, 2**17), "head"))
    with pytest.raises(ValueError, match=r"layer 'head': the accumulator reaches 4244766720, .* 32 bits"):
        reference.run({"x": np.full((1, 2**17), 255, np.float32)})


def test_an_operation_without_an_implementation_is_named() -> None:
    g = Graph()
    g.nodes.append(helper.make_node("Wavelet", ["x"], ["y"], name="odd", domain="elsewhere"))
    with pytest.raises(ValueError, match=r"node 'odd': the integer reference has no operation elsewhere\.Wavelet"):
        IntegerReference(g.model((1, 2), "y"))


def test_a_block_of_a_network_equals_the_runtime_without_optimizations(rng: np.random.Generator) -> None:
    """Pooling, residual addition, activation functions, normalisation, a product of two activations."""
    g = Graph()
    shape = (3, 4, 8, 8)
    w = [rng.integers(-128, 128, (4, 4, 3, 3)).astype(np.int8) for _ in range(2)]
    first = g.node("Conv", [g.quantize("x", "a", 0.02, 128), g.weight("w0", w[0], 0.003)], "c0", pads=[1] * 4)
    relu = g.node("Relu", [first], "relu")
    pooled = g.node("MaxPool", [relu], "pool", kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    second = g.node("Conv", [g.quantize(pooled, "b", 0.01, 0), g.weight("w1", w[1], 0.003)], "c1", pads=[1] * 4)
    total = g.node("Add", [second, relu], "sum")
    average = g.node("AveragePool", [total], "avg", kernel_shape=[2, 2], strides=[2, 2])
    erf = g.node("Erf", [average], "erf")
    flat = g.node("Reshape", [erf, g.constant("shape", np.array([3, 4, 16]))], "flat")
    turned = g.node("Transpose", [flat], "turned", perm=[0, 2, 1])
    product = g.node("MatMul", [g.quantize(flat, "q", 0.01, 128), g.quantize(turned, "k", 0.01, 128)], "qk")
    scores = g.node("Softmax", [product], "softmax", axis=-1)
    scale = g.constant("gain", np.ones(4, np.float32))
    g.node("LayerNormalization", [scores, scale], "norm", axis=-1)
    model = g.model(shape, "norm")
    x = rng.normal(0, 1, shape).astype(np.float32)
    np.testing.assert_allclose(
        IntegerReference(model).run({"x": x})["norm"], unoptimized(model, x)[0], rtol=1e-4, atol=1e-4
    )
