"""Facts about the installed runtimes that the targets rely on: which kernel runs for which container.

A new version that changes one of them fails here. Kernels, not times. The facts are those that `verified` in
`eqnet/space/targets/onnxruntime-x86.yaml` and `openvino-cpu.yaml` state.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from eqnet.deploy.reference import IntegerReference
from eqnet.deploy.runtime import (
    RUNTIMES,
    Kernel,
    median_latency,
    runtime_of,
    sums_are_exact,
    with_outputs,
    without_quantizers,
)
from eqnet.nn.integer import kernels_available
from eqnet.space.hardware import load_target
from tests.graphs import Graph

Array = NDArray[Any]
ORT, OPENVINO = RUNTIMES["onnxruntime"], RUNTIMES["openvino"]


@dataclass(frozen=True)
class Case:
    """One layer between quantizers: the width and container of its weight codes, and what else varies."""

    op: str = "conv"
    bits: int = 7  # one bit less than the container: products do not saturate on CPUs without VNNI
    container: str = "int8"
    per_channel: bool = True
    weight_zero: bool = False
    act: type[np.generic] = np.uint8
    act_zero: int = 128
    clip: tuple[int, int] | None = None
    bias: bool = True
    integer_bias: bool = True  # behind a matrix product
    quantized_output: bool = True
    zero_point_input: bool = True
    pooled: bool = False  # the strides of op "strided"

    @property
    def size(self) -> tuple[int, ...]:
        return {"linear": (4, 16), "matmul": (2, 4, 16)}.get(self.op, (1, 16, 8, 8))

    def build(self) -> Any:
        rng, n = np.random.default_rng(0), 16
        shape = {
            "conv": (n, 16, 3, 3),
            "strided": (n, 16, 1, 1),
            "depthwise": (n, 1, 3, 3),
            "transposed": (16, n, 3, 3),
        }.get(self.op, (n, 16))
        axis = 1 if self.op in ("transposed", "matmul") else 0
        half = 2 ** (self.bits - 1)
        codes = rng.integers(-half, half, shape).astype(np.int8)
        scale = rng.uniform(0.002, 0.004, n if self.per_channel else 1).astype(np.float32)
        scale = scale if self.per_channel else scale[0]  # type: ignore[assignment]
        zero = np.zeros(np.shape(scale), np.int8)
        if self.weight_zero:
            zero = zero + rng.integers(1, half // 2, np.shape(scale)).astype(np.int8)
        act_scale = np.float32(0.02 if np.iinfo(self.act).bits == 8 else 1e-4)
        g = Graph(25 if self.container == "int2" else 21)
        x = g.quantize("x", "a", act_scale, self.act_zero, self.act, self.clip)  # type: ignore[arg-type]
        w = g.weight("w", codes, scale, zero if self.zero_point_input else None, axis, self.container)
        b = [g.weight("b", rng.integers(-99, 99, n).astype(np.int32), np.broadcast_to(scale * act_scale, n))]
        pads, kernel = [1] * 4, [3, 3]
        if self.op == "linear":
            y = g.node("Gemm", [x, w, *b[: self.bias]], "layer", transB=1)
        elif self.op == "matmul":
            y = g.node("MatMul", [x, w], "layer")
            offset = b[0] if self.integer_bias else g.constant("offset", np.ones(n, np.float32))
            y = g.node("Add", [y, offset], "sum") if self.bias else y
        elif self.op == "strided":
            stride = [1, 1] if self.pooled else [2, 2]
            x = g.node("MaxPool", [x], "pool", kernel_shape=[1, 1], strides=[2, 2]) if self.pooled else x
            y = g.node("Conv", [x, w, *b[: self.bias]], "layer", kernel_shape=[1, 1], strides=stride)
        elif self.op == "transposed":
            y = g.node("ConvTranspose", [x, w, *b[: self.bias]], "layer", pads=pads, kernel_shape=kernel)
        else:
            groups = n if self.op == "depthwise" else 1
            y = g.node("Conv", [x, w, *b[: self.bias]], "layer", pads=pads, kernel_shape=kernel, group=groups)
        if self.quantized_output:
            y = g.quantize(y, "o", 0.02, 128)
        return g.model(self.size, y)


def kernel(runtime: Any, case: Case) -> Kernel:
    return runtime.load(case.build()).kernels()["layer"]  # type: ignore[no-any-return]


def outputs(runtime: Any, model: Any, x: Array) -> Array:
    (y,) = runtime.load(model).run(x).values()
    return y  # type: ignore[no-any-return]


def images(case: Case, spread: float = 1.0) -> Array:
    return np.random.default_rng(1).normal(0, spread, case.size).astype(np.float32)


CONV, LINEAR, MATMUL = Case(), Case("linear"), Case("matmul")
W8 = {"bits": 8}


# -- ONNX Runtime -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (replace(CONV, **W8), "QLinearConv"),
        (replace(CONV, **W8, per_channel=False), "QLinearConv"),
        (replace(CONV, **W8, weight_zero=True), "QLinearConv"),
        (replace(CONV, bits=4), "QLinearConv"),
        (replace(CONV, bits=2), "QLinearConv"),
        (replace(CONV, op="depthwise"), "QLinearConv"),
        (replace(CONV, op="strided"), "QLinearConv"),
        (replace(CONV, clip=(0, 15), act_zero=8), "QLinearConv"),
        (replace(CONV, act=np.int8, act_zero=0), "QLinearConv"),
        (LINEAR, "QGemm"),
        (replace(LINEAR, weight_zero=True), "QGemm"),
        (replace(LINEAR, quantized_output=False), "QGemm"),
        (replace(LINEAR, clip=(0, 15), act_zero=8), "QGemm"),
        (replace(MATMUL, bias=False), "QLinearMatMul"),
        (replace(MATMUL, bias=False, weight_zero=True), "QLinearMatMul"),
        (replace(MATMUL, bias=False, quantized_output=False), "MatMulIntegerToFloat"),
        (MATMUL, "QGemm"),
        (replace(MATMUL, integer_bias=False), "QGemm"),
        (replace(MATMUL, quantized_output=False), "QGemm"),
    ],
    ids=str,
)
def test_onnxruntime_runs_codes_in_int8_on_integers(case: Case, name: str) -> None:
    assert kernel(ORT, case) == Kernel(name, True)


@pytest.mark.parametrize(
    "case",
    [
        replace(CONV, bits=4, container="int4"),
        replace(CONV, act=np.uint16, act_zero=32768),
        replace(CONV, act=np.int16, act_zero=0),
        replace(CONV, quantized_output=False),
        replace(CONV, act=np.int8, act_zero=0, clip=(-8, 7)),
        replace(CONV, op="transposed"),
        replace(MATMUL, quantized_output=False, integer_bias=False),
        replace(LINEAR, zero_point_input=False),
    ],
    ids=str,
)
def test_onnxruntime_runs_these_in_floating_point(case: Case) -> None:
    assert not kernel(ORT, case).integer


def test_onnxruntime_refuses_two_bit_containers() -> None:
    with pytest.raises(ValueError, match=r"^onnxruntime refuses the model: "):
        kernel(ORT, replace(CONV, bits=2, container="int2"))


def test_onnxruntime_computes_low_bit_codes_in_int8_exactly() -> None:
    """The same codes in INT4 (floating point) and in INT8 (integers) give the same output codes but for ties."""
    case = replace(CONV, bits=4)
    x = images(case)
    as_int8 = outputs(ORT, case.build(), x)
    np.testing.assert_allclose(as_int8, outputs(ORT, replace(case, container="int4").build(), x), atol=0.0201)
    exact = IntegerReference(case.build()).run({"x": x})["o_dq"]
    assert float((np.abs(as_int8 - exact) > 1e-6).mean()) < 0.002


def test_onnxruntime_quantizes_float_inputs_of_weight_only_products_by_itself() -> None:
    """With its default options the product is computed in int8: silent, so no export relies on it."""
    rng = np.random.default_rng(0)
    g = Graph()
    w = rng.integers(-127, 128, (64, 64)).astype(np.int8)
    g.node("MatMul", ["x", g.weight("w", w, np.full(64, 0.01, np.float32), axis=1)], "layer")
    model, x = g.model((4, 64), "layer"), rng.normal(size=(4, 64)).astype(np.float32)
    exact = IntegerReference(model).run({"x": x})["layer"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    error = np.abs(session.run(None, {"x": x})[0] - exact).max() / np.abs(exact).max()
    assert 1e-3 < error < 2e-2
    assert not ORT.load(model).kernels()["layer"].integer


# -- OpenVINO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        replace(CONV, **W8),
        replace(CONV, **W8, per_channel=False),
        replace(CONV, bits=4),
        replace(CONV, bits=2),
        replace(CONV, op="depthwise"),
        replace(CONV, clip=(0, 15), act_zero=8),
        replace(CONV, act=np.int8, act_zero=0),
        replace(CONV, quantized_output=False),
        replace(CONV, op="strided", pooled=True),
        LINEAR,
        replace(LINEAR, quantized_output=False),
        replace(MATMUL, quantized_output=False),
        replace(MATMUL, quantized_output=False, integer_bias=False),
        replace(CONV, op="transposed", act=np.int8, act_zero=0),
    ],
    ids=str,
)
def test_openvino_runs_symmetric_codes_in_int8_on_integers(case: Case) -> None:
    assert kernel(OPENVINO, case).integer


@pytest.mark.parametrize(
    "case",
    [
        replace(CONV, **W8, weight_zero=True),
        replace(CONV, bits=4, container="int4"),
        replace(CONV, act=np.uint16, act_zero=32768),
        replace(CONV, op="transposed"),
        replace(CONV, op="strided"),
        replace(LINEAR, bits=4, container="int4"),
    ],
    ids=str,
)
def test_openvino_runs_these_in_floating_point(case: Case) -> None:
    assert not kernel(OPENVINO, case).integer


def test_openvino_refuses_two_bit_containers() -> None:
    with pytest.raises(ValueError, match=r"^openvino refuses the model: "):
        kernel(OPENVINO, replace(CONV, bits=2, container="int2"))


@pytest.mark.parametrize(("dtype", "zero"), [(np.int16, 0), (np.uint16, 32768)])
def test_openvino_drops_16_bit_pairs_and_with_them_the_saturation(dtype: type[np.generic], zero: int) -> None:
    case = replace(CONV, act=dtype, act_zero=zero, quantized_output=False)
    x = images(case, spread=30.0)  # the range of the 16-bit codes is +-3.3
    model = case.build()
    exact = IntegerReference(model).run({"x": x})["layer"]
    dropped = IntegerReference(without_quantizers(model)).run({"x": x})["layer"]
    y = outputs(OPENVINO, model, x)
    np.testing.assert_allclose(y, dropped, atol=1e-3 * float(np.abs(dropped).max()))
    assert float(np.abs(y - exact).max()) > 10 * float(np.abs(exact).max()) / 2
    np.testing.assert_allclose(outputs(ORT, model, x), exact, atol=1e-3 * float(np.abs(exact).max()))


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", [ORT, OPENVINO], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", [CONV, LINEAR, replace(MATMUL, bias=False)], ids=["conv", "linear", "matmul"])
def test_integer_kernels_agree_with_the_reference_to_one_step(runtime: Any, case: Case) -> None:
    """Seven-bit weights, so that no pair of products saturates on any CPU."""
    x = images(case)
    model = case.build()
    exact = IntegerReference(model).run({"x": x})["o_dq"]
    steps = np.abs(outputs(runtime, model, x) - exact) / 0.02
    assert steps.max() < 1.01
    assert (steps > 0.5).mean() < 0.01


@pytest.mark.parametrize("runtime", [ORT, OPENVINO], ids=["onnxruntime", "openvino"])
def test_reading_codes_leaves_the_kernels_as_they_are(runtime: Any) -> None:
    case = CONV
    session = runtime.load(case.build(), outputs=["a_q", "o_q"])
    assert session.kernels() == runtime.load(case.build()).kernels()
    found = session.run(images(case))
    assert {"a_q", "o_q", "o_dq"} <= set(found)
    assert found["o_q"].dtype == np.uint8
    np.testing.assert_allclose((found["o_q"].astype(np.float32) - 128) * np.float32(0.02), found["o_dq"], atol=1e-6)


def test_sums_of_products_are_exact_in_onnxruntime_and_elsewhere_where_the_cpu_has_the_instructions() -> None:
    """The runtime is told to be exact (ORT_EXACT); OpenVINO cannot be told, and does as oneDNN does in torch."""
    assert sums_are_exact(ORT)
    assert sums_are_exact(OPENVINO) == kernels_available()


def test_the_float_network_has_the_same_values_without_quantizers() -> None:
    case = replace(CONV, clip=(0, 255))
    model = case.build()
    plain = without_quantizers(model)
    assert {node.op_type for node in plain.graph.node} == {"Conv", "Identity"}
    reference = IntegerReference(model)
    x = images(case)
    w, b = reference.constant("w_dq"), reference.constant("b_dq")
    g = Graph()
    g.node("Conv", ["x", g.constant("w", w), g.constant("b", b)], "layer", pads=[1] * 4)  # type: ignore[arg-type]
    np.testing.assert_array_equal(outputs(ORT, plain, x), outputs(ORT, g.model(case.size, "layer"), x))


def test_outputs_are_added_to_a_copy() -> None:
    model = CONV.build()
    assert [o.name for o in with_outputs(model, ["a_q", "o_dq"]).graph.output] == ["o_dq", "a_q"]
    assert [o.name for o in model.graph.output] == ["o_dq"]


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    medians = median_latency({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert all(ms >= 0 for ms in medians.values())


def test_a_runtime_on_another_processor_is_not_the_target() -> None:
    assert {runtime_of(load_target(f"onnxruntime-{name}")) for name in ("x86", "arm")} == {ORT, None}


def test_targets_name_their_runtime() -> None:
    assert runtime_of(load_target("onnxruntime-x86")) is ORT
    assert runtime_of(load_target("openvino-cpu")) is OPENVINO
    assert runtime_of(load_target("tensorrt")) is None
    future = load_target("onnxruntime-x86").model_copy(update={"runtime": "onnxruntime 99.1"})
    with pytest.raises(ValueError, match=r"onnxruntime 1\.\S+ is older than 99\.1, .* onnxruntime-x86 .*pip install"):
        runtime_of(future)


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_signals_arrive_after_networks_are_freed_in_any_order(runtime: str, tmp_path: Path) -> None:
    """A handler of Python runs on a stack of its own, which OpenVINO replaces; a lost one would end the process."""
    (tmp_path / "net.onnx").write_bytes(Case().build().SerializeToString())
    script = """
import faulthandler, signal, sys
import onnx
from eqnet.deploy.runtime import RUNTIMES
faulthandler.enable()
arrived = []
signal.signal(signal.SIGTERM, lambda *_: arrived.append("handled"))
model = onnx.load(sys.argv[2])
first, second = (RUNTIMES[sys.argv[1]].load(model) for _ in range(2))
del first
del second
signal.raise_signal(signal.SIGTERM)
print(*arrived)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, runtime, str(tmp_path / "net.onnx")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
