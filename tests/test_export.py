"""ONNX files: the same function as the subnet in real runtimes, exact folding, kernels by container, refused input."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from deploy_nets import SmallNet, make_subnet, some_images, without_input_quantizers
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401
from eqnet.deploy.codes import ActGrid, LayerCodes
from eqnet.deploy.export import OnnxOptions, export_onnx, fold_for_export, read_sidecar, sidecar_of
from eqnet.deploy.fold import Affine, fold_batch_norm, integer_bias
from eqnet.deploy.graph import OpGraph, trace
from eqnet.deploy.reference import integer_reference
from eqnet.deploy.runtime import compare, kernels, load, runs_on_integers
from eqnet.space import LayerConfig, QuantConfig, QuantFormat

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIZE = (3, 8, 8)
W8, A8 = QuantFormat(8, True, "channel"), QuantFormat(8, False)


def equal(path: Path, function: Callable[[Tensor], Tensor], size: tuple[int, ...] = SIZE, **kwargs: Any) -> bool:
    """Whether a file computes the same bits, on more images than it was traced with."""
    return compare(path, function, some_images(5, size, 3), tolerance=0.0, **kwargs).max_difference == 0


@functools.cache
def small(seed: int = 0) -> tuple[nn.Module, QuantConfig, OpGraph]:
    """An exact subnet, its config and its graph; shared, so not to be changed."""
    torch.manual_seed(seed)
    subnet, config = make_subnet(SmallNet(), seed=seed, exact=True)
    return subnet, config, trace(subnet, SIZE)


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


# -- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        OnnxOptions(),
        OnnxOptions(act_type="trained", clip="values", zero_points=True),
        OnnxOptions(act_type="int8", opset=18),
        OnnxOptions(fold="none"),
        OnnxOptions(container="int4"),
        OnnxOptions(container="packed", opset=25),
    ],
    ids=lambda o: f"{o.container}-{o.act_type}-{o.fold}-{o.clip}-{o.opset}",
)
def test_a_file_computes_the_bits_of_the_simulation(seed: int, options: OnnxOptions, tmp_path: Path) -> None:
    subnet, config, graph = small(seed)
    report = export_onnx(subnet, config, SIZE, tmp_path / "net.onnx", options, graph=graph)
    assert equal(report.path, subnet, optimized=False)
    assert set(report.layers) == set(config)
    norms = [layer.batch_norm for layer in report.layers.values() if layer.batch_norm]
    assert norms.count("folded") + ops(report.path)["BatchNormalization"] == 3


@pytest.mark.parametrize("seed", range(3))
def test_integer_biases_make_optimized_graphs_exact(seed: int, tmp_path: Path) -> None:
    """ONNX Runtime rounds biases to int32 when it optimizes; a file that says so is run as the integer reference runs it."""
    subnet, config, graph = small(seed)
    options = OnnxOptions(bias="int32")
    report = export_onnx(subnet, config, SIZE, tmp_path / "net.onnx", options, graph=graph)
    reference = fold_for_export(graph, config, options).graph
    for optimized in (False, True):
        assert equal(report.path, lambda x: integer_reference(reference, x), optimized=optimized)
    rounded = [layer for layer in report.layers.values() if layer.bias == "int32"]
    assert len(rounded) == 6
    assert all(layer.bias_error <= layer.bias_bound * (1 + 1e-6) for layer in rounded)
    assert any(layer.bias_error > 0 for layer in rounded)
    assert f"{max(layer.bias_error for layer in rounded):.3g}" in str(report)


@pytest.mark.parametrize("seed", range(3))
def test_openvino_computes_the_same(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    subnet, config, graph = small(seed)
    report = export_onnx(subnet, config, SIZE, tmp_path / "net.onnx", graph=graph)
    assert equal(report.path, subnet, runtime="openvino")


@pytest.mark.parametrize("seed", range(2))
def test_ordinary_step_sizes(seed: int, tmp_path: Path) -> None:
    """Sums in another order may end a code away; with inputs in floating point only the last bits differ."""
    subnet, config = make_subnet(SmallNet(), seed=seed)
    report = export_onnx(subnet, config, SIZE, tmp_path / "net.onnx")
    agreement = compare(report.path, subnet, some_images(64, SIZE, 3), optimized=False)
    assert agreement.differing < 0.1
    assert agreement.top1 > 0.9
    assert agreement.images == 64
    config = without_input_quantizers(subnet, config)
    report = export_onnx(subnet, config, SIZE, tmp_path / "float.onnx")
    for optimized in (False, True):
        assert compare(report.path, subnet, some_images(64, SIZE, 3), optimized=optimized).max_difference < 1e-5
    assert "input stays in floating point" in str(report)


def test_cifar_resnet20_of_mixed_bits(tmp_path: Path) -> None:
    size = (3, 16, 16)
    subnet, config = make_subnet(timm.create_model("cifar_resnet20", width=4), size, exact=True)
    report = export_onnx(subnet, config, size, tmp_path / "net.onnx", OnnxOptions(bias="int32"))
    reference = fold_for_export(trace(subnet, size), config, OnnxOptions(bias="int32")).graph
    for optimized in (False, True):
        assert equal(report.path, lambda x: integer_reference(reference, x), size, optimized=optimized)
    assert {layer.weight_bits for layer in report.layers.values()} == set(range(2, 9))
    assert report.float_ops == {"Add": 9, "GlobalAveragePool": 1, "Pad": 2, "Relu": 19, "Reshape": 1, "Slice": 4}
    assert Counter(kernels(report.path).values()) == {"FusedConv": 10, "QLinearConv": 9, "QGemm": 1}


class Reads(nn.Module):
    """Reads the weight of a linear layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 6)
        self.outer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x.flatten(1), self.inner.weight, self.inner.bias)
        result: Tensor = self.outer(torch.relu(hidden))
        return result


class Tokens(nn.Module):
    """A linear layer on [N, T, C] between reshapes, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, stride=2)
        self.mix = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = self.mix(torch.relu(self.mix(x)))
        result: Tensor = self.head(x[:, 0])
        return result


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "same padding, odd": (lambda: nn.Sequential(Conv2dSame(3, 4, 3, stride=2), nn.Conv2d(4, 4, 1)), (3, 9, 8)),
    "padding='same'": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same", dilation=2), nn.ReLU()), (3, 8, 8)),
    "padding='valid'": (lambda: nn.Sequential(nn.Conv2d(3, 4, (3, 1), padding="valid")), (3, 8, 8)),
    "reflection": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), (3, 8, 8)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), nn.ReLU()), (3, 5, 5)),
    "transposed, groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)),
        (4, 4, 4),
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.Conv1d(4, 2, 1)), (3, 16)),
    "linear with BN": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6)), (2, 2, 2)),
    "weight read directly": (Reads, (2, 2, 2)),
    "tokens": (Tokens, (3, 4, 4)),
    "clamp with bounds inside": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardtanh(-0.5, 0.25), nn.Conv2d(4, 4, 1)),
        SIZE,
    ),
}


@pytest.mark.parametrize("clip", ["codes", "values"])
@pytest.mark.parametrize("case", CASES)
def test_layers_of_all_kinds(case: str, clip: Any, tmp_path: Path) -> None:
    make, size = CASES[case]
    subnet, config = make_subnet(make(), size, exact=True)
    report = export_onnx(subnet, config, size, tmp_path / "net.onnx", OnnxOptions(clip=clip, zero_points=True))
    assert equal(report.path, subnet, size, optimized=False)


def test_the_batch_size_may_be_open_or_fixed(tmp_path: Path) -> None:
    subnet, config, graph = small()
    x = some_images(4, SIZE, 3)
    opened = load(export_onnx(subnet, config, SIZE, tmp_path / "open.onnx", graph=graph).path)
    assert [len(opened(x[:n])) for n in (1, 2, 4)] == [1, 2, 4]
    fixed = export_onnx(subnet, config, SIZE, tmp_path / "one.onnx", batch=1).path
    assert [d.dim_value for d in onnx.load(str(fixed)).graph.input[0].type.tensor_type.shape.dim] == [1, *SIZE]
    assert torch.equal(torch.cat([load(fixed, optimized=False)(x[i : i + 1]) for i in range(4)]), subnet(x))
    assert compare(fixed, subnet, x, optimized=False).images == 4


# -- folding ----------------------------------------------------------------------------------------------------------


def some_layer(rng: np.random.Generator, zero_points: bool = False, bits: int = 8) -> LayerCodes:
    half = 2 ** (bits - 1)
    zero = rng.integers(-half, half, 6) if zero_points else np.zeros(6)
    return LayerCodes(
        kind="conv",
        codes=rng.integers(-half, half, (6, 4, 3, 3)).astype(np.int8),
        scale=rng.uniform(0.01, 0.1, 6).astype(np.float32),
        zero_point=zero.astype(np.int8),
        axis=0,
        act=ActGrid(0.02, 3, 0, 255),
        bias=rng.standard_normal(6).astype(np.float32),
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_folding_is_exact_on_codes(bits: int, zero_points: bool) -> None:
    """Centred codes keep their values up to the sign of the factor; the step sizes take the whole factor, rounded once."""
    rng = np.random.default_rng(bits)
    layer = some_layer(rng, zero_points, bits)
    layer.codes[2, 0, 0, 0] = -(2 ** (bits - 1))
    factor, shift = np.array([2.5, -0.3, -1.7, 0.0, 1e-44, 1.0]), rng.standard_normal(6)
    folded = fold_batch_norm(layer, Affine(factor, shift), bits, zero_points=True)
    assert isinstance(folded, LayerCodes)
    sign = np.array([1, -1, -1, 0, 0, 1]).reshape(-1, 1, 1, 1)
    assert np.array_equal(folded.centred, layer.centred * sign)
    expected = np.where(np.abs(factor) > 1e-30, np.abs(factor) * layer.scale.astype(np.float64), layer.scale)
    assert np.array_equal(folded.scale, expected.astype(np.float32))
    assert (folded.scale > 0).all()
    assert folded.codes.min() >= -(2 ** (bits - 1))
    assert folded.codes.max() < 2 ** (bits - 1)
    assert layer.bias is not None
    assert np.array_equal(folded.bias, (factor * layer.bias.astype(np.float64) + shift).astype(np.float32))
    assert layer.codes[2, 0, 0, 0] == -(2 ** (bits - 1)), "the layer itself is left alone"


def test_the_smallest_code_has_no_negative() -> None:
    layer = some_layer(np.random.default_rng(0))
    layer.codes[:] = np.maximum(layer.codes, -127)
    layer.codes[4, 1, 2, 0] = -128
    factor = np.array([1, 1, 1, 1, -2.0, -1])
    refused = fold_batch_norm(layer, Affine(factor, np.zeros(6)), 8, zero_points=False)
    assert isinstance(refused, str)
    assert "channel 4" in refused
    assert "-128" in refused
    accepted = fold_batch_norm(layer, Affine(factor, np.zeros(6)), 8, zero_points=True)
    assert isinstance(accepted, LayerCodes)
    assert accepted.zero_point.tolist() == [0, 0, 0, 0, -1, 0], "only where it is needed"
    assert accepted.codes[4, 1, 2, 0] == 127
    assert np.array_equal(accepted.centred[4], -layer.centred[4])


def test_batch_norm_that_cannot_be_folded_stays_a_node(tmp_path: Path) -> None:
    subnet, config = make_subnet(SmallNet(), exact=True, symmetric=[True], granularity=["channel"])
    bits = config["pointwise"].weight.bits
    channel = int((subnet.bn3.weight < 0).nonzero()[0])
    subnet.pointwise.weight_codes[channel, 0] = -(2 ** (bits - 1))
    options = OnnxOptions(container="packed", opset=25)
    packed = export_onnx(subnet, config, SIZE, tmp_path / "packed.onnx", replace(options, container="packed"))
    if bits in (2, 4, 8):
        assert f"channel {channel}" in str(packed.layers["pointwise"].batch_norm)
    wide = export_onnx(subnet, config, SIZE, tmp_path / "wide.onnx")
    kept = bits == 8
    assert (wide.layers["pointwise"].batch_norm == "folded") != kept
    for report in (packed, wide):
        assert equal(report.path, subnet, optimized=False)
        assert (f"channel {channel}" in str(report)) == (report.layers["pointwise"].batch_norm != "folded")


def test_biases_beyond_int32() -> None:
    layer = some_layer(np.random.default_rng(0))
    assert layer.bias is not None
    layer.bias[2] = 1e9
    with pytest.raises(ValueError, match=r"layer 'stem'.*channel 2 is out of the range of int32.*bias='float'"):
        integer_bias("stem", layer)
    layer.scale[2] = 1e-12  # the convolution of a dead channel is lost in a float32 bias
    rounded = integer_bias("stem", layer)
    assert not rounded.centred[2].any()
    assert np.array_equal(rounded.codes[[0, 1, 3, 4, 5]], layer.codes[[0, 1, 3, 4, 5]])
    assert rounded.bias is not None
    assert np.abs(rounded.bias - layer.bias)[2] <= 1e9 * 2**-23
    others = [0, 1, 3, 4, 5]
    assert (np.abs(rounded.bias - layer.bias)[others] <= layer.bias_scale[others] / 2 * 1.0001).all()


# -- what runs on which kernel ----------------------------------------------------------------------------------------


def pair(weight: QuantFormat, act: QuantFormat, path: Path, linear: bool = False, **options: Any) -> Path:
    """Two layers with a ReLU between them, the first in the given formats; the second reads quantized values."""
    if linear:
        model, size = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), (4, 32)
    else:
        model, size = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), (16, 8, 8)  # type: ignore[assignment]
    with torch.no_grad():  # so that asymmetric formats have zero points
        model[0].weight.add_(model[0].weight.max() / 2)  # type: ignore[arg-type, operator, union-attr]
    fixed = {"0": LayerConfig(weight, act), "2": LayerConfig(W8, A8)}
    subnet, config = make_subnet(model, size, exact=True, fixed=fixed)
    report = export_onnx(subnet, config, size, path, OnnxOptions(**options))
    assert equal(report.path, subnet, size, optimized=False) or options.get("bias") == "int32"
    return report.path


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_any_width_in_int8_run_on_integers(bits: int, tmp_path: Path) -> None:
    symmetric = QuantFormat(bits, True, "channel")
    conv = pair(symmetric, QuantFormat(bits, False), tmp_path / "conv.onnx", bias="int32")
    assert kernels(conv)["0"] == "QLinearConv"
    linear = pair(symmetric, QuantFormat(bits, False), tmp_path / "linear.onnx", linear=True)
    assert kernels(linear) == {"0": "MatMulIntegerToFloat", "2": "MatMulIntegerToFloat"}
    pytest.importorskip("openvino")
    for path in (conv, linear):
        assert all(runs_on_integers(kernel) for kernel in kernels(path, "openvino").values())


def test_a_convolution_without_a_quantized_output_runs_in_float(tmp_path: Path) -> None:
    """ONNX Runtime needs QuantizeLinear behind a convolution, not behind a product of matrices."""
    assert kernels(pair(W8, A8, tmp_path / "conv.onnx"))["2"] == "Conv"


def test_zero_points_of_weights(tmp_path: Path) -> None:
    """ONNX Runtime has integer kernels for them, OpenVINO has not."""
    paths = [pair(QuantFormat(8, False, "channel"), A8, tmp_path / f"{kind}.onnx", kind) for kind in (False, True)]
    assert [kernels(path)["0"] for path in paths] == ["QLinearConv", "MatMulIntegerToFloat"]
    pytest.importorskip("openvino")
    assert not any(runs_on_integers(kernels(path, "openvino")["0"]) for path in paths)


@pytest.mark.parametrize("linear", [False, True])
def test_int4_containers_run_in_float(linear: bool, tmp_path: Path) -> None:
    path = pair(QuantFormat(4, True, "channel"), A8, tmp_path / "net.onnx", linear, container="int4")
    types = {i.name: i.data_type for i in onnx.load(str(path)).graph.initializer}
    assert types["0/codes"] == onnx.TensorProto.INT4
    assert types["2/codes"] == onnx.TensorProto.INT8
    assert kernels(path)["0"] in ("Conv", "FusedConv", "MatMul")
    pytest.importorskip("openvino")
    assert not runs_on_integers(kernels(path, "openvino")["0"])


def test_int2_containers_are_for_storage(tmp_path: Path) -> None:
    path = pair(QuantFormat(2, True, "channel"), A8, tmp_path / "net.onnx", container="packed", opset=25)
    assert path.stat().st_size < pair(QuantFormat(2, True, "channel"), A8, tmp_path / "int8.onnx").stat().st_size
    linear = pair(QuantFormat(2, True, "channel"), A8, tmp_path / "linear.onnx", True, container="packed", opset=25)
    with pytest.raises(ValueError, match=r"ONNX Runtime .* cannot load"):
        load(linear)
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match=r"OpenVINO .* cannot load"):
        load(path, "openvino")


def test_one_clip_of_codes_keeps_relu6_and_narrow_inputs_on_integers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    fixed = {name: LayerConfig(W8, QuantFormat(b, False)) for name, b in (("0", 8), ("2", 8), ("4", 3))}
    subnet, config = make_subnet(model, (16, 8, 8), exact=True, fixed=fixed)
    subnet.get_submodule("2").act_scale.fill_(0.125)  # codes would go on to 31.9
    for clip, expected in (("codes", "QLinearConv"), ("values", "FusedConv")):
        options = OnnxOptions(clip=clip)  # type: ignore[arg-type]
        report = export_onnx(subnet, config, (16, 8, 8), tmp_path / f"{clip}.onnx", options)
        assert equal(report.path, subnet, (16, 8, 8), optimized=False)
        assert [kernels(report.path)[name] for name in ("0", "2")] == [expected, expected]


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_sidecar_says_what_was_written(tmp_path: Path) -> None:
    subnet, config, graph = small()
    options = OnnxOptions(bias="int32", zero_points=True)
    report = export_onnx(
        subnet, config, SIZE, tmp_path / "net.onnx", options, graph=graph, source={"run": "runs/digits"}
    )
    content = read_sidecar(report.path)
    assert content == json.loads((tmp_path / "net.onnx.json").read_text())
    assert QuantConfig.from_json(content["config"]) == config
    assert content["sha256"] == hashlib.sha256(report.path.read_bytes()).hexdigest() == report.sha256
    assert content["source"] == {"run": "runs/digits"}
    assert OnnxOptions(**content["options"]) == options
    assert (content["input_size"], content["batch"]) == ([3, 8, 8], None)
    assert content["versions"]["onnx"] == onnx.__version__
    for name, layer in content["layers"].items():
        act = config[name].act
        assert layer["weight_bits"] == config[name].weight.bits
        assert act is not None
        assert layer["act"]["qmax"] - layer["act"]["qmin"] == 2**act.bits - 1
        assert 0 <= layer["act"]["qmin"] <= layer["act"]["zero_point"] <= layer["act"]["qmax"] <= 255
    assert all(path.suffix in (".onnx", ".json") for path in tmp_path.iterdir()), "no temporary files are left"


def test_a_file_that_was_changed_is_not_what_the_sidecar_describes(tmp_path: Path) -> None:
    subnet, config, graph = small()
    path = export_onnx(subnet, config, SIZE, tmp_path / "net.onnx", graph=graph).path
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is not the file that"):
        read_sidecar(path)
    sidecar_of(path).write_text("{}")
    with pytest.raises(ValueError, match="not the description of an export"):
        read_sidecar(path)
    export_onnx(subnet, config, SIZE, path, graph=graph, overwrite=True)
    sidecar_of(path).unlink()
    with pytest.raises(ValueError, match="no such file"):
        kernels(path)


@pytest.mark.parametrize("existing", ["net.onnx", "net.onnx.json"])
def test_existing_files_are_kept(existing: str, tmp_path: Path) -> None:
    subnet, config, graph = small()
    (tmp_path / existing).write_text("mine")
    with pytest.raises(ValueError, match=rf"{existing}' exists; choose another name.*overwrite=True"):
        export_onnx(subnet, config, SIZE, tmp_path / "net.onnx")
    assert (tmp_path / existing).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1
    export_onnx(subnet, config, SIZE, tmp_path / "net.onnx", graph=graph, overwrite=True)
    assert read_sidecar(tmp_path / "net.onnx")["file"] == "net.onnx"


class Cumulative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.sums = nn.Sequential(nn.Identity(), _CumSum())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.sums(self.conv(x))
        return result


class _CumSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


class _OddPool(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(3))


class _TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return x, x + 1


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Cumulative, r"module 'sums.1': aten.cumsum.default has no ONNX export"),
        (_OddPool, r"module '1': aten.adaptive_avg_pool2d.default with windows of unequal size .* has no ONNX export"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), r"module '0'.*no ONNX export"),
        (_TwoOutputs, "the model returns 2 values"),
        (
            lambda: nn.Sequential(nn.Flatten(), _Doubled(192, 2)),
            r"layer '1' \(_Doubled\) computes something of its own",
        ),
    ],
)
def test_what_has_no_export_is_named(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    subnet, config = make_subnet(make())
    with pytest.raises(ValueError, match=message):
        export_onnx(subnet, config, SIZE, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subnet, config = make_subnet(SmallNet())
    path = tmp_path / "net.onnx"
    for opset in (17, 99):
        with pytest.raises(ValueError, match=f"opset {opset} cannot be written: choose 18 to"):
            export_onnx(subnet, config, SIZE, path, OnnxOptions(opset=opset))
    with pytest.raises(ValueError, match="INT4 needs opset 21; got opset 20"):
        export_onnx(subnet, config, SIZE, path, OnnxOptions(opset=20, container="int4"))
    with pytest.raises(ValueError, match=r"must end with \.onnx"):
        export_onnx(subnet, config, SIZE, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="in a directory that exists"):
        export_onnx(subnet, config, SIZE, tmp_path / "missing" / "net.onnx")
    with pytest.raises(ValueError, match=r"bias must be one of 'float', 'int32'; got 'int16'"):
        OnnxOptions(bias="int16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be traced for inputs of size"):
        export_onnx(subnet, config, (4, 8, 8), path)
    with pytest.raises(ValueError, match="no quantized layer"):
        export_onnx(SmallNet().eval(), config, SIZE, path)
    with pytest.raises(ValueError, match="training mode"):
        export_onnx(subnet.train(), config, SIZE, path)
    subnet.eval()
    with pytest.raises(ValueError, match="unknown runtime 'tensorrt'"):
        load(path, "tensorrt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such file"):
        load(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"ONNX Runtime .* cannot load"):
        load(path)
    path.unlink()
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r'needs the package onnx; run: pip install "eqnet\[export\]"'):
        export_onnx(subnet, config, SIZE, path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path.touch()
    with pytest.raises(ValueError, match=r'needs onnxruntime; run: pip install "eqnet\[export\]"'):
        load(path)


@functools.cache
def eight_bit() -> tuple[nn.Module, QuantConfig, OpGraph]:
    subnet, config = make_subnet(SmallNet(), bits=[8], symmetric=[False], granularity=["channel"])
    return subnet, config, trace(subnet, SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: LayerConfig(QuantFormat(2, False, "channel"), layer.act), "need more than 2 bits"),
        (
            lambda layer: LayerConfig(replace(layer.weight, granularity="tensor"), layer.act),
            "a step size for each channel",
        ),
        (lambda layer: LayerConfig(replace(layer.weight, symmetric=True), layer.act), "has a zero point"),
        (lambda layer: LayerConfig(layer.weight, None), "its input is quantized"),
        (lambda layer: LayerConfig(layer.weight, QuantFormat(3, False)), "its input needs more than 3 bits"),
    ],
)
def test_the_config_must_be_the_one_of_the_subnet(
    change: Callable[[LayerConfig], LayerConfig], message: str, tmp_path: Path
) -> None:
    subnet, config, graph = eight_bit()
    wrong = config.replace({"down": change(config["down"])})
    with pytest.raises(ValueError, match=rf"does not belong to this subnet: layer 'down'.*{message}"):
        export_onnx(subnet, wrong, SIZE, tmp_path / "net.onnx", graph=graph)
    fewer = QuantConfig({name: layer for name, layer in config.items() if name != "down"})
    with pytest.raises(ValueError, match="does not belong to this subnet: down missing on one side"):
        export_onnx(subnet, fewer, SIZE, tmp_path / "net.onnx", graph=graph)


# -- whole models -----------------------------------------------------------------------------------------------------

ZOO: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({}, 64),
    "mobilenetv2_100": ({}, 64),
    "efficientnet_b0": ({}, 64),
    "tf_efficientnet_b0": ({}, 65),
    "mobilenetv3_small_050": ({}, 64),
    "deit_tiny_patch16_224": ({"img_size": 48}, 48),
    "swin_tiny_patch4_window7_224": ({"depths": (2, 2)}, 224),
    "convnext_atto": ({}, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_whole_models_bit_by_bit(name: str, tmp_path: Path) -> None:
    size = (3, 64, 64)
    subnet, config = make_subnet(timm.create_model(name), size, exact=True)
    report = export_onnx(subnet, config, size, tmp_path / "net.onnx")
    assert equal(report.path, subnet, size, optimized=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_whole_models(name: str, tmp_path: Path) -> None:
    """Mixed bits load and run. With inputs in floating point, where no rounding turns the last bit into a step, outputs are as
    close to those in float64 as the simulation in float32 is (some networks amplify the last bit a thousand times)."""
    arguments, side = ZOO[name]
    size = (3, side, side)
    subnet, config = make_subnet(timm.create_model(name, **arguments), size)
    mixed = export_onnx(subnet, config, size, tmp_path / "mixed.onnx").path
    x = some_images(3, size, 5)
    taken = kernels(mixed)
    assert set(taken) == set(config)
    assert "missing" not in taken.values()
    config = without_input_quantizers(subnet, config)
    path = export_onnx(subnet, config, size, tmp_path / "float.onnx").path
    with torch.no_grad():
        exact = copy.deepcopy(subnet).double()(x.double())
        rounding = float((subnet(x) - exact).abs().max())
    has_openvino = importlib.util.find_spec("openvino") is not None
    for runtime in ("onnxruntime", "openvino") if has_openvino else ("onnxruntime",):
        for optimized in (False, True):
            assert load(mixed, runtime, optimized)(x).isfinite().all()  # type: ignore[arg-type]
            error = float((load(path, runtime, optimized)(x) - exact).abs().max())  # type: ignore[arg-type]
            assert error <= 10 * rounding


@pytest.mark.slow
def test_torchvision_resnet18(tmp_path: Path) -> None:
    import torchvision

    size = (3, 64, 64)
    subnet, config = make_subnet(torchvision.models.resnet18(), size, exact=True)
    report = export_onnx(subnet, config, size, tmp_path / "net.onnx")
    assert equal(report.path, subnet, size, optimized=False)
