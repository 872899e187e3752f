"""Runtimes that execute exported files on this machine: what they compute, by which kernels, how fast.

`Runtime` is the seam: a target names its runtime ("onnxruntime 1.31.1"), and `RUNTIMES` holds those that run here. Which
kernel a layer gets is read from the runtime's own optimized graph, never assumed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eqnet.deploy.products import PRODUCTS
from eqnet.deploy.reference import IntegerReference
from eqnet.space.hardware import HardwareTarget

Array = NDArray[Any]
_PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64"}  # other names of the same


@dataclass(frozen=True)
class Kernel:
    """What executes a layer.

    Attributes:
        name: of the operation in the optimized graph, e.g. "QLinearConv" or "Convolution brgconv_avx512_vnni_I8".
        integer: whether it computes on the codes.
    """

    name: str
    integer: bool


class Session(Protocol):
    """A loaded file."""

    def run(self, images: Array) -> dict[str, Array]:
        """Outputs by name for float32 images [N, C, H, W]."""

    def kernels(self) -> dict[str, Kernel]:
        """The kernel of every quantized layer that was found in the optimized graph, by the name of its node."""


class Runtime(Protocol):
    """Something that executes ONNX files.

    Attributes:
        name: of its package, as targets call it.
    """

    name: str

    def load(self, model: Any, *, optimized: bool = True, threads: int = 1, outputs: Sequence[str] = ()) -> Session:
        """Loads a model.

        Args:
            model: an `onnx.ModelProto`.
            optimized: let the runtime rewrite the graph.
            threads: of one operation.
            outputs: inner tensors to return besides the outputs of the graph.

        Raises:
            ValueError: the package is missing, or the runtime refuses the model (its reason is given).
        """


def with_outputs(model: Any, names: Sequence[str]) -> Any:
    """A copy of a model that returns inner tensors too."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {output.name for output in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return copy


# -- ONNX Runtime -----------------------------------------------------------------------------------------------------

# Without VNNI instructions ONNX Runtime's products of unsigned and signed codes saturate at 16 bits unless it is told to take
# slower ones; where the CPU has VNNI the option changes nothing.
ORT_EXACT = ("session.x64quantprecision", "1")
_ORT_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")
_ORT_PRODUCTS = (
    *PRODUCTS,
    *_ORT_INTEGER,
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "MatMulNBits",
    "DynamicQuantizeMatMul",
)
ORT_SUFFIX = re.compile(r"(_token_\d+|_nchwc|/MatMulAddFusion)+$")


class _OnnxRuntimeSession:
    def __init__(self, model: Any, optimized: bool, threads: int, outputs: Sequence[str]) -> None:
        import onnxruntime

        self._model, self._names = model, {n.name: n.output[0] for n in model.graph.node}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        options.add_session_config_entry(*ORT_EXACT)
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
            try:
                self._session = onnxruntime.InferenceSession(
                    with_outputs(model, outputs).SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # a class of its own for each kind
                raise ValueError(f"onnxruntime refuses the model: {_first_line(error)}") from error
            self._optimized = Path(options.optimized_model_filepath).read_bytes()
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: Array) -> dict[str, Array]:
        return dict(zip(self._outputs, self._session.run(None, {self._input: images}), strict=True))

    def kernels(self) -> dict[str, Kernel]:
        import onnx

        graph = onnx.ModelProto.FromString(self._optimized).graph
        producers = {name: node for node in graph.node for name in node.output}
        by_name, by_weight = {}, {}
        for node in graph.node:
            if node.op_type in _ORT_PRODUCTS:
                kernel = Kernel(node.op_type, node.op_type in _ORT_INTEGER)
                by_name[ORT_SUFFIX.sub("", node.name)] = kernel
                by_weight.update({_origin(name, producers).removesuffix("_T"): kernel for name in node.input})
        found = {}
        before = {name: node for node in self._model.graph.node for name in node.output}
        for node in self._model.graph.node:
            if node.op_type in PRODUCTS:
                kernel_found = by_name.get(node.name) or by_weight.get(_origin(node.input[1], before))
                if kernel_found is not None:
                    found[node.name] = kernel_found
        return found


def _origin(name: str, producers: Mapping[str, Any]) -> str:
    """The tensor that a value comes from, through what only stores or moves it."""
    while name in producers and producers[name].op_type in ("DequantizeLinear", "Transpose", "Reshape", "Cast"):
        name = producers[name].input[0]
    return name


class OnnxRuntime:
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def load(self, model: Any, *, optimized: bool = True, threads: int = 1, outputs: Sequence[str] = ()) -> Session:
        """See `Runtime.load`."""
        installed_version(self.name)
        return _OnnxRuntimeSession(model, optimized, threads, outputs)


# -- OpenVINO ---------------------------------------------------------------------------------------------------------

_OPENVINO_PRODUCTS = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")


class _SignalStack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def _kept_signal_stack() -> Iterator[None]:
    """Puts this thread's stack for signal handlers back.

    A model that OpenVINO compiles brings a stack of its own, and puts the one before back when it is freed. Of two models the
    first may be freed first; what the second then puts back is gone, and the next signal (Ctrl-C) ends the process.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    known = libc.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            libc.sigaltstack(ctypes.byref(before), None)


def compile_openvino(model: Any, threads: int, **options: Any) -> Any:
    """A model compiled for this CPU in float32 arithmetic where it is not quantized.

    Args:
        model: an ONNX model.
        threads: that it runs on.
        options: of OpenVINO, besides.

    Raises:
        RuntimeError: OpenVINO refuses the model.
    """
    import openvino

    # otherwise what is not quantized runs in bfloat16 on CPUs that have it
    fixed = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    core = openvino.Core()
    with _kept_signal_stack():
        return core.compile_model(core.read_model(model.SerializeToString()), "CPU", {**fixed, **options})


class _OpenVinoSession:
    def __init__(self, model: Any, threads: int, outputs: Sequence[str]) -> None:
        before = {name: node for node in model.graph.node for name in node.output}
        self._layers = {n.name: _origin(n.input[1], before) for n in model.graph.node if n.op_type in PRODUCTS}
        try:
            self._compiled = compile_openvino(with_outputs(model, outputs), threads)
        except RuntimeError as error:
            raise ValueError(f"openvino refuses the model: {_first_line(error)}") from error
        self._request = self._compiled.create_infer_request()

    def run(self, images: Array) -> dict[str, Array]:
        results = self._request.infer([images])
        return {name: np.array(results[port]) for port in self._compiled.outputs for name in port.get_names()}

    def kernels(self) -> dict[str, Kernel]:
        found: dict[str, Kernel] = {}
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            facts = op.get_rt_info()
            kind, primitive, names = (_text(facts, k) for k in ("layerType", "primitiveType", "originalLayersNames"))
            if kind not in _OPENVINO_PRODUCTS:
                continue
            kernel = Kernel(f"{kind} {primitive}", primitive.lower().endswith(("_i8", "_int8")))
            parts, weights = names.split(","), _openvino_constants(op)
            for layer, weight in self._layers.items():
                own = (layer, f"{layer}_original")
                if weight in weights or any(p in own or p.startswith(f"{layer}/WithoutBiases") for p in parts):
                    found[layer] = kernel
        return found


def _openvino_constants(op: Any) -> set[str]:
    """Tensors of the file that an operation reads besides its first input, through what only moves them."""
    found: set[str] = set()
    for i in range(1, op.get_input_size()):
        source = op.input_value(i).get_node()
        while _text(source.get_rt_info(), "layerType") in ("Reshape", "Transpose", "Reorder"):
            source = source.input_value(0).get_node()
        found.update(_text(source.get_rt_info(), "originalLayersNames").split(","))
    return found


def _text(facts: Any, key: str) -> str:
    value = facts[key]
    return str(value.astype(str) if hasattr(value, "astype") else value)


class OpenVino:
    """OpenVINO's CPU plugin. It always optimizes."""

    name = "openvino"

    def load(self, model: Any, *, optimized: bool = True, threads: int = 1, outputs: Sequence[str] = ()) -> Session:
        """See `Runtime.load`."""
        installed_version(self.name)
        if not optimized:
            raise ValueError("openvino cannot run a model without its optimizations.")
        return _OpenVinoSession(model, threads, outputs)


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (OnnxRuntime(), OpenVino())}
_EXTRAS = {"openvino": "openvino"}


def runtime_of(target: HardwareTarget) -> Runtime | None:
    """The runtime of a target; None if it does not run here, or runs here on another processor than the target's.

    Raises:
        ValueError: its package is missing (with the extra to install), or older than the target's facts.
    """
    name, _, wanted = (target.runtime or "").partition(" ")
    runtime = RUNTIMES.get(name)
    machine = platform.machine().lower()
    if runtime is None or target.processor not in (None, _PROCESSORS.get(machine, machine)):
        return None
    installed = installed_version(name)
    if _release(installed) < _release(wanted):
        raise ValueError(
            f"{name} {installed} is older than {wanted}, of which the facts of {target.name} are known; "
            f"run: pip install -U {name}."
        )
    return runtime


def installed_version(package: str) -> str:
    """The version of a runtime's package. Raises ValueError that names the extra to install if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError as error:
        extra = _EXTRAS.get(package, "export")
        raise ValueError(f'this needs the package {package}; run: pip install "eqnet[{extra}]".') from error


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("-")[0])[:3])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".") + "."


# -- what this machine does -------------------------------------------------------------------------------------------


def sums_are_exact(runtime: Runtime) -> bool:
    """Whether the runtime sums products of unsigned and signed 8-bit codes exactly on this CPU.

    Without VNNI instructions pairs of products saturate at 16 bits: a pair of 255 * 127 is too large, one of 255 * 64 is not.
    """
    import onnx.parser

    channels = 64
    codes = "{" + ",".join(["127"] * channels) + "}"
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[1,{channels}] x) => (float[1,1] y)
        <float s = {{1.0}}, uint8 z = {{0}}, float t = {{16384.0}}, int8 wz = {{0}}, int8[1,{channels}] w = {codes}>
        {{ q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)  b = DequantizeLinear(w, s, wz)
           c = Gemm<transB = 1>(a, b)  r = QuantizeLinear(c, t, z)  y = DequantizeLinear(r, t, z) }}""")
    images = np.full((1, channels), 255, np.float32)
    (exact,) = IntegerReference(model).run({"x": images}).values()
    return bool(runtime.load(model).run(images)["y"] == exact)


def without_quantizers(model: Any) -> Any:
    """The same network in floating point: weights dequantized, quantizers of activations left out."""
    import onnx
    from onnx import numpy_helper

    reference = IntegerReference(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    aliases: dict[str, str] = {}
    nodes, stored = [], []
    for node in graph.node:
        constant = reference.constant(node.output[0])
        if node.op_type == "DequantizeLinear" and constant is not None:
            stored.append(numpy_helper.from_array(constant, node.output[0]))
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.output[0] in reference.quantizers:
            aliases[node.output[0]] = aliases.get(node.input[0], node.input[0])
        else:
            inputs = [aliases.get(name, name) for name in node.input]
            del node.input[:]
            node.input.extend(inputs)
            nodes.append(node)
    nodes += [onnx.helper.make_node("Identity", [aliases[o.name]], [o.name]) for o in graph.output if o.name in aliases]
    used = {name for node in nodes for name in node.input}
    kept = [t for t in [*graph.initializer, *stored] if t.name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, kept)):
        saved = [type(v).FromString(v.SerializeToString()) for v in values]
        del field[:]
        field.extend(saved)
    del graph.value_info[:]
    return copy


def median_latency(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warm_up: int = 3,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median time of each call in milliseconds, measured in turns so that all meet the same disturbances.

    Args:
        calls: what to time, by name.
        rounds: measurements of each.
        warm_up: calls of each that are not counted.
        progress: called after every round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
        progress()
    return {name: statistics.median(values) for name, values in times.items()}
