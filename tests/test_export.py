"""Exported files: integers as trained, the same function in real runtimes, exact folding, integer kernels, refused input."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from eqnet.deploy.codes import Grid, IntegerBias, WeightCodes, bias_in_finer_steps, fold_batch_norm, integer_bias
from eqnet.deploy.export import export_onnx, export_torch, read_sidecar, sidecar_path
from eqnet.nn.layers import QuantizedLayer
from eqnet.nn.supernet import Supernet
from eqnet.space import LayerConfig, QuantConfig, QuantFormat
from eqnet.space.hardware import HardwareTarget, load_target
from eqnet.space.target_rules import BiasRule

SIZE = (3, 8, 8)


class Net(nn.Module):
    """What matters to an exporter: dense, depthwise and pointwise layers, a residual sum, ReLU, ReLU6, max pooling, SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 12, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(12)
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.stem(x))), 2)
        x = torch.relu(x + self.bn2(self.conv(x)))
        x = self.expand(nn.functional.relu6(self.bn3(self.depthwise(x))))
        x = nn.functional.silu(self.bn4(x)).mean((2, 3))
        result: Tensor = self.head(torch.relu(self.hidden(x)))
        return result


def images(n: int, seed: int = 1, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed))


def make_subnet(
    model: nn.Module, target: HardwareTarget, seed: int = 0, size: tuple[int, ...] = SIZE, **choices: Any
) -> tuple[nn.Module, QuantConfig, Supernet]:
    """A subnet of random formats that the target runs, with the codes that it executes."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0, 1)  # half of the gains are negative
            nn.init.normal_(module.bias, 0, 0.5)
            module.running_mean = torch.randn(module.num_features) / 2
            module.running_var = torch.rand(module.num_features) + 0.5
    supernet = Supernet.from_model(model.eval(), size, **choices)
    supernet.calibrate(images(16, size=size))
    space = target.restrict(supernet.space)
    config = space.sample(np.random.default_rng(seed))
    if "expand" in config:  # one layer of 2 bits
        weight = dataclasses.replace(config["expand"].weight, bits=2)
        config = config.replace({"expand": LayerConfig(weight, config["expand"].act)})
    subnet = supernet.extract(config)
    for info in space.layers:
        low, _ = target.code_range(info, "weight", config[info.name].weight)
        layer = subnet.get_submodule(info.name)
        assert isinstance(layer, QuantizedLayer)
        layer.weight_codes.clamp_(min=low)
    return subnet, config, supernet


def export(
    subnet: nn.Module, config: QuantConfig, supernet: Supernet, target: HardwareTarget, path: Path, **options: Any
) -> dict[str, Any]:
    options = {"input_size": SIZE, "images": [images(16)], **options}
    return export_onnx(subnet, config, supernet.space.layers, target, path, **options)


@functools.cache
def exported_net(name: str, folder: Path, seed: int) -> tuple[nn.Module, QuantConfig, Supernet, Path, dict[str, Any]]:
    """`Net` for a target; shared, so not to be changed."""
    target = load_target(name)
    subnet, config, supernet = make_subnet(Net(), target, seed)
    path = folder / f"{name}-{seed}.onnx"
    return subnet, config, supernet, path, export(subnet, config, supernet, target, path)


def exported(name: str, folder: Path, seed: int = 0) -> tuple[nn.Module, QuantConfig, Supernet, Path, dict[str, Any]]:
    """`Net` for a target, written once."""
    return exported_net(name, folder, seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def run_onnxruntime(path: Path, x: Tensor, optimized: bool = False, written: Path | None = None) -> np.ndarray:
    """Outputs; U8xS8 products are kept from saturating on CPUs without VNNI."""
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if written is not None:
        options.optimized_model_filepath = str(written)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"images": x.numpy()})[0]
    return result


def run_openvino(path: Path, x: Tensor) -> tuple[np.ndarray, Counter[str]]:
    """Outputs, and how many layers run in which precision."""
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    precisions: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = {
            key: value.astype(str)
            for key, value in node.get_rt_info().items()
            if key in ("layerType", "runtimePrecision")
        }
        if facts["layerType"] in ("Convolution", "FullyConnected", "MatMul"):
            precisions[facts["runtimePrecision"]] += 1
    return compiled(x.numpy())[0], precisions


def constants(path: Path) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


# -- the same integers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generic", "onnxruntime-x86", "openvino-cpu", "vitis-ai"])
def test_codes_and_step_sizes_are_those_of_the_subnet(name: str, folder: Path) -> None:
    subnet, config, _, path, description = exported(name, folder) if name != "vitis-ai" else power_of_two(folder)
    arrays = constants(path)
    for layer, facts in description["layers"].items():
        module: Any = subnet.get_submodule(layer)
        codes = arrays[f"{layer}/weight/codes"].astype(np.int16)
        zero = arrays[f"{layer}/weight/zero_point"].astype(np.int16).reshape(-1, *[1] * (codes.ndim - 1))
        centred = module.weight_codes.numpy().astype(np.int16) - module.weight_zero_point.numpy().astype(np.int16)
        turned, shift = facts["weight"]["turned"], facts["weight"]["shift"]
        centred[turned] *= -1
        assert np.array_equal(codes - zero, centred * 2**shift), layer
        kept = [c for c in range(len(codes)) if c not in turned]
        if not facts["weight"]["zero_point"] or not turned:
            assert np.array_equal(codes[kept], module.weight_codes.numpy()[kept].astype(np.int16) * 2**shift)
        if facts["batch_norm"] != "folded":
            assert np.array_equal(
                np.broadcast_to(arrays[f"{layer}/weight/scale"].reshape(-1), len(codes)) * 2**shift,
                np.broadcast_to(module.weight_scale.numpy().reshape(-1), len(codes)),
            )
        act = facts["act"]
        assert arrays[f"{layer}/act/scale"] == module.act_scale.numpy() == np.float32(act["scale"])
        assert arrays[f"{layer}/act/zero_point"] == act["zero_point"]
        shift = act["zero_point"] - int(module.act_zero_point)
        assert act["high"] <= int(module.act_qmax) + shift
        assert act["bits"] == config[layer].act.bits  # type: ignore[union-attr]
        assert facts["weight"]["bits"] == config[layer].weight.bits


@functools.cache
def power_of_two(folder: Path) -> tuple[nn.Module, QuantConfig, Supernet, Path, dict[str, Any]]:
    """`Net` with the step sizes and signed codes that Vitis AI executes."""
    target = load_target("vitis-ai")
    subnet, config, supernet = make_subnet(Net(), target)
    for module in subnet.modules():
        if isinstance(module, QuantizedLayer):
            assert module.act_scale is not None
            for scale in (module.weight_scale, module.act_scale):
                scale.copy_(torch.exp2(torch.round(torch.log2(scale))))
            module.act_qmin.fill_(-128)
            module.act_qmax.fill_(127)
    path = folder / "vitis.onnx"
    return subnet, config, supernet, path, export(subnet, config, supernet, target, path)


@pytest.mark.parametrize("seed", range(2))
def test_the_file_computes_the_simulation(seed: int, folder: Path) -> None:
    """Nothing is rounded for the generic target, so only float rounding of sums differs: at most a code here and there."""
    subnet, _, _, path, description = exported("generic", folder, seed)
    assert description["quantizers"] == {}
    x = images(32, 2)
    difference = np.abs(run_onnxruntime(path, x) - subnet(x).detach().numpy())
    assert np.median(difference) < 1e-5
    assert (difference > 1e-4).mean() < 0.05


def test_the_number_of_images_is_open(folder: Path) -> None:
    path = exported("generic", folder)[3]
    assert [len(run_onnxruntime(path, images(n))) for n in (1, 3)] == [1, 3]


def test_onnxruntime_takes_integer_kernels_everywhere(folder: Path, tmp_path: Path) -> None:
    subnet, _, _, path, description = exported("onnxruntime-x86", folder)
    x = images(64, 2)
    plain = run_onnxruntime(path, x)
    optimized = run_onnxruntime(path, x, True, tmp_path / "optimized.onnx")
    kernels = ops(tmp_path / "optimized.onnx")
    assert (kernels["QLinearConv"], kernels["QGemm"]) == (4, 2)
    assert kernels["Conv"] + kernels["FusedConv"] + kernels["Gemm"] + kernels["MatMul"] == 0
    assert {facts["kernel"] for facts in description["layers"].values()} == {"integer"}
    assert set(description["quantizers"]) == {"stem/output", "conv/output", "expand/output"}
    spread = np.abs(plain).max()
    assert np.abs(optimized - plain).max() <= 0.1 * spread
    assert np.abs(plain - subnet(x).detach().numpy()).mean() <= 0.05 * spread


@pytest.mark.parametrize("name", ["vitis-ai", "litert"])
def test_graphs_of_integer_targets_are_all_integer(name: str, folder: Path) -> None:
    """Between an operation and the next there are codes, except inside a fused sequence of layer, BN, ReLU."""
    subnet, _, _, path, description = power_of_two(folder) if name == "vitis-ai" else exported(name, folder)
    graph = onnx.load(path).graph
    producer = {output: node for node in graph.node for output in node.output}
    known = {i.name for i in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip"):
            continue
        for source in (i for i in node.input if i and i not in known):
            before = producer[source]
            fused = node.op_type in ("Relu", "BatchNormalization") and before.op_type in (
                "Conv",
                "Gemm",
                "Add",
                "BatchNormalization",
            )
            assert before.op_type == "DequantizeLinear" or fused, (node.name, before.name)
    assert producer["logits"].op_type == "DequantizeLinear"
    assert "head/output" in description["quantizers"]
    if name == "litert":
        (sigmoid,) = [grid for key, grid in description["quantizers"].items() if "igmoid" in key]
        assert (sigmoid["scale"], sigmoid["zero_point"]) == (1 / 256, -128)
    x = images(64, 2)
    expected = subnet(x).detach().numpy()
    assert np.abs(run_onnxruntime(path, x) - expected).mean() <= 0.1 * np.abs(expected).max()


def test_openvino_takes_integer_kernels_everywhere(folder: Path) -> None:
    subnet, _, _, path, description = exported("openvino-cpu", folder)
    assert description["quantizers"] == {}
    x = images(64, 2)
    expected = subnet(x).detach().numpy()
    out, precisions = run_openvino(path, x)
    assert set(precisions) <= {"i8", "u8"}
    assert precisions.total() == 6
    assert np.abs(out - expected).mean() <= 0.02 * np.abs(expected).max()
    assert np.median(np.abs(run_onnxruntime(path, x) - expected)) < 1e-5


def test_narrow_ranges_are_clipped_on_codes(folder: Path) -> None:
    """Every input whose range is narrower than uint8 saturates where the subnet's does."""
    subnet, config, _, path, description = exported("onnxruntime-x86", folder)
    model = onnx.load(path)
    clips = {node.name: node for node in model.graph.node if node.op_type == "Clip"}
    arrays = constants(path)
    for layer, facts in description["layers"].items():
        act = facts["act"]
        assert act["container"] == "uint8"
        narrow = (act["low"], act["high"]) != (0, 255)
        assert (f"{layer}/act/clip" in clips) == narrow
        if narrow:
            assert [arrays[i] for i in clips[f"{layer}/act/clip"].input[1:]] == [act["low"], act["high"]]
    assert any(layer.act.bits < 8 for layer in config.values() if layer.act is not None)
    x = 1e3 * images(4, 2).sign()
    assert np.array_equal(run_onnxruntime(path, x), run_onnxruntime(path, 1e4 * x))
    assert torch.equal(subnet(x), subnet(1e4 * x))


@pytest.mark.parametrize("container", ["int2", "int4", "int8"])
def test_packed_targets_use_the_narrowest_container(container: str, folder: Path) -> None:
    found = []
    for seed in range(2):
        _, config, _, path, description = exported("generic", folder, seed)
        types = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
        for layer, facts in description["layers"].items():
            bits = config[layer].weight.bits
            assert facts["weight"]["container"] == ("int2" if bits == 2 else "int4" if bits <= 4 else "int8")
            name = facts["weight"]["container"].upper()
            assert types[f"{layer}/weight/codes"] == getattr(onnx.TensorProto, name)
            found.append(facts["weight"]["container"])
    assert container in found


# -- folding ----------------------------------------------------------------------------------------------------------


def some_codes(rng: np.random.Generator, zero_points: bool = False) -> WeightCodes:
    zero = rng.integers(-128, 128, 6) if zero_points else np.zeros(6)
    codes = rng.integers(-128, 128, (6, 4, 3, 3)).astype(np.int8)
    return WeightCodes(codes, rng.uniform(0.01, 0.1, 6).astype(np.float32), zero.astype(np.int8), 0, "int8")


@pytest.mark.parametrize("zero_points", [False, True])
def test_folding_keeps_the_integers(zero_points: bool) -> None:
    """Codes minus zero points only change their sign; the step size takes the whole factor, rounded once."""
    weight = some_codes(np.random.default_rng(0), zero_points)
    weight.codes[2, 0, 0, 0] = -128
    factor = np.array([2.5, -0.3, -1.7, 0.0, 1e-44, 1.0])
    folded = fold_batch_norm(weight, factor, zero_points=True)
    assert isinstance(folded, WeightCodes)
    sign = np.array([1, -1, -1, 0, 0, 1]).reshape(-1, 1, 1, 1)
    assert np.array_equal(folded.centred, weight.centred * sign)
    product = np.abs(factor) * weight.scale.astype(np.float64)
    assert np.array_equal(folded.scale, np.where(np.abs(factor) > 1e-30, product, weight.scale).astype(np.float32))
    assert (folded.scale > 0).all()
    assert folded.turned == (1, 2)


def test_the_smallest_code_has_no_negative() -> None:
    weight = some_codes(np.random.default_rng(0))
    weight.codes[:] = np.maximum(weight.codes, -127)
    weight.codes[4, 1, 2, 0] = -128
    factor = np.array([1, 1, 1, 1, -2.0, -1])
    refused = fold_batch_norm(weight, factor, zero_points=False)
    assert refused == "channel 4 has a negative gain, and the code -128 has no negative"
    accepted = fold_batch_norm(weight, factor, zero_points=True)
    assert isinstance(accepted, WeightCodes)
    assert accepted.zero_point.tolist() == [0, 0, 0, 0, -1, 0]
    assert accepted.codes[4, 1, 2, 0] == 127


def test_folding_is_exact_in_float64() -> None:
    """The layer and BN, against the folded layer with the step sizes before they are rounded to float32."""
    subnet, config, _ = make_subnet(Net(), load_target("onnxruntime-x86"), fixed="none")
    layer: Any = subnet.get_submodule("stem")
    norm: Any = subnet.get_submodule("bn1")
    x = images(4).double()
    trained = (layer.weight_codes.double() - layer.weight_zero_point.double()) * layer.weight_scale.double()
    expected = norm.double()(nn.functional.conv2d(x, trained, padding=1))
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    scale = layer.weight_scale.numpy().reshape(-1)
    weight = WeightCodes(layer.weight_codes.numpy(), scale, layer.weight_zero_point.numpy().reshape(-1), 0, "int8")
    folded = fold_batch_norm(weight, factor, zero_points=True)
    assert isinstance(folded, WeightCodes)
    kernel = torch.from_numpy(folded.centred.astype(np.float64) * (np.abs(factor) * scale).reshape(-1, 1, 1, 1))
    shift = norm.bias - norm.running_mean * torch.from_numpy(factor)
    assert torch.allclose(nn.functional.conv2d(x, kernel, shift, padding=1), expected, rtol=0, atol=1e-13)
    assert config["stem"].weight.bits >= 2


def test_batch_norm_stays_where_step_sizes_are_per_tensor(folder: Path) -> None:
    _, _, _, path, description = power_of_two(folder)
    reasons = {layer: facts["batch_norm"] for layer, facts in description["layers"].items()}
    assert reasons["stem"] == "vitis-ai has one step size per tensor"
    assert ops(path)["BatchNormalization"] == 4
    assert {facts["weight"]["granularity"] for facts in description["layers"].values()} == {"tensor"}


@pytest.mark.parametrize("dtype", ["int32", "int8"])
def test_integer_biases_are_off_by_half_a_step_at_most(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    weight, grid = some_codes(rng), Grid(0.02, 3, 0, 255, "uint8")
    bias = rng.standard_normal(6)
    rule = BiasRule(dtype=dtype, scale="weight_times_act" if dtype == "int32" else "power_of_two")
    number = integer_bias(bias, weight, grid, rule)
    assert not isinstance(number, str)
    error = np.abs(number.codes * number.scale.astype(np.float64) - bias)
    assert (error <= number.scale / 2 * (1 + 1e-6)).all()
    assert number.error == error.max()
    assert number.codes.dtype == np.dtype(dtype)
    if dtype == "int32":
        assert integer_bias(1e9 * bias, weight, grid, rule) == "it is out of the range of int32"


@pytest.mark.parametrize("bits", range(2, 9))
def test_room_in_the_container_makes_biases_finer(bits: int) -> None:
    """The weight is the same, bit for bit; its bias is off by half a step of the finer sums at most."""
    rng, half = np.random.default_rng(bits), 2 ** (bits - 1)
    codes = rng.integers(-half, half, (6, 4, 3, 3)).astype(np.int8)
    scale, zero = rng.uniform(0.01, 0.1, 6).astype(np.float32), rng.integers(-half, half, 6).astype(np.int8)
    weight, grid = WeightCodes(codes, scale, zero, 0, "int8"), Grid(0.3, 3, 0, 3, "uint8")
    bias, rule = rng.standard_normal(6), BiasRule(dtype="int32", scale="weight_times_act")
    finer, number = bias_in_finer_steps(bias, weight, bits, grid, rule)
    assert isinstance(number, IntegerBias)
    assert finer.shift == max(7 - bits, 0)
    along = (-1, 1, 1, 1)
    values = weight.centred * weight.scale.reshape(along)
    assert np.array_equal(finer.centred * finer.scale.reshape(along), values)
    assert int(np.abs(finer.codes.astype(int)).max()) <= (64 if bits < 8 else 128)
    assert (np.abs(number.codes * number.scale - bias) <= 0.5001 * scale * 0.3 / 2.0**finer.shift).all()


def test_a_bias_takes_as_much_room_as_fits_into_32_bits() -> None:
    weight = dataclasses.replace(some_codes(np.random.default_rng(0)), codes=np.ones((6, 4, 3, 3), np.int8))
    bias = 2.0**29 * weight.scale.astype(np.float64)
    rule = BiasRule(dtype="int32", scale="weight_times_act")
    finer, number = bias_in_finer_steps(bias, weight, 2, Grid(1.0, 0, 0, 3, "uint8"), rule)
    assert (finer.shift, number.error if isinstance(number, IntegerBias) else number) == (1, 0.0)
    kept, reason = bias_in_finer_steps(8 * bias, weight, 2, Grid(1.0, 0, 0, 3, "uint8"), rule)
    assert (kept, reason) == (weight, "it is out of the range of int32")


@pytest.mark.parametrize("batch", [None, 2])
def test_biased_products_of_three_dimensions_run_on_integers(batch: int | None, tmp_path: Path) -> None:
    """Whether the number of images is open or not; onnxruntime writes the product differently then."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(torch.tanh(self.first(x.flatten(1, 2))))
            return result

    target = load_target("onnxruntime-x86")
    subnet, config, supernet = make_subnet(Tokens(), target)
    path = tmp_path / "net.onnx"
    description = export(subnet, config, supernet, target, path, batch=batch)
    assert [layer["bias"]["dtype"] for layer in description["layers"].values()] == ["int32"] * 2
    x = images(2, 2)
    out = run_onnxruntime(path, x, True, tmp_path / "optimized.onnx")
    kernels = ops(tmp_path / "optimized.onnx")
    assert kernels["QGemm"] + kernels["MatMulIntegerToFloat"] == 2
    assert kernels["Gemm"] + kernels["MatMul"] == 0
    assert np.abs(out - subnet(x).detach().numpy()).max() < 0.05 * np.abs(out).max()


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_description_says_what_was_written(folder: Path) -> None:
    _, config, _, path, description = exported("onnxruntime-x86", folder)
    assert read_sidecar(path) == description == json.loads(sidecar_path(path).read_text())
    assert QuantConfig.from_json(description["config"]) == config
    assert description["schema"] == "eqnet export 1"
    assert description["input"]["size"] == list(SIZE)
    names = {node.name for node in onnx.load(path).graph.node}
    for layer, facts in description["layers"].items():
        assert facts["nodes"] == [layer]
        assert {layer, f"{layer}/act/quantize", f"{layer}/act/dequantize", f"{layer}/weight/dequantize"} <= names
        assert facts["bias"]["dtype"] == "int32"
        assert (facts["batch_norm"] == "folded") == (layer not in ("hidden", "head"))
    for name in description["quantizers"]:
        assert f"{name}/quantize" in names
    text = path.read_bytes()
    assert b"site-packages" not in text
    assert str(Path(__file__).parent.parent).encode() not in text
    onnx.checker.check_model(path, full_check=True)


def test_a_changed_file_is_noticed(folder: Path, tmp_path: Path) -> None:
    _, _, _, path, _ = exported("generic", folder)
    copy = tmp_path / "net.onnx"
    copy.write_bytes(path.read_bytes() + b"\0")
    sidecar_path(copy).write_text(sidecar_path(path).read_text())
    with pytest.raises(ValueError, match="is not the file that"):
        read_sidecar(copy)
    sidecar_path(copy).write_text("{}")
    with pytest.raises(ValueError, match="not the description of an export"):
        read_sidecar(copy)


@pytest.mark.slow
def test_exports_are_reproducible(folder: Path, tmp_path: Path) -> None:
    subnet, config, supernet, path, _ = exported("onnxruntime-x86", folder)
    export(subnet, config, supernet, load_target("onnxruntime-x86"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_torch_programs_compute_the_same_bits(tmp_path: Path) -> None:
    subnet, _, _ = make_subnet(Net(), load_target("generic"))
    export_torch(subnet, tmp_path / "net.pt2", input_size=SIZE)
    program = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 3):
        assert torch.equal(program(images(n, 2)), subnet(images(n, 2)))
    with pytest.raises(ValueError, match="already exists"):
        export_torch(subnet, tmp_path / "net.pt2", input_size=SIZE)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", ["net.onnx", "net.onnx.json"])
def test_existing_files_are_kept(existing: str, folder: Path, tmp_path: Path) -> None:
    subnet, config, supernet, _, _ = exported("generic", folder)
    (tmp_path / existing).write_text("mine")
    with pytest.raises(ValueError, match=rf"{existing} already exists"):
        export(subnet, config, supernet, load_target("generic"), tmp_path / "net.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(existing, "mine")]


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.conv(x)).sum((1, 2))


def test_what_cannot_be_written_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generic, runtime = load_target("generic"), load_target("onnxruntime-x86")
    subnet, config, supernet, _, _ = exported("generic", folder)
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"must end with \.onnx"):
        export(subnet, config, supernet, generic, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="does not exist"):
        export(subnet, config, supernet, generic, tmp_path / "missing" / "net.onnx")
    with pytest.raises(ValueError, match="layer 'conv': tensorrt does not run"):
        export(subnet, config, supernet, load_target("tensorrt"), path)
    other = QuantConfig({name: layer for name, layer in config.items() if name != "conv"})
    with pytest.raises(ValueError, match="conv on one side only"):
        export(subnet, other, supernet, generic, path)
    form = supernet.space.forms[0]
    wrong = config.replace({"conv": LayerConfig(QuantFormat(2, True, "tensor"), form.act_format(8))})
    with pytest.raises(ValueError, match="does not belong to this subnet: layer 'conv'"):
        export(subnet, wrong, supernet, generic, path)
    subnet, config, supernet, _, _ = exported("onnxruntime-x86", folder)
    with pytest.raises(ValueError, match="needs 3 more tensors quantized; give images"):
        export(subnet, config, supernet, runtime, path, images=None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r'needs the package onnxscript; run: pip install "eqnet\[export\]"'):
        export(subnet, config, supernet, runtime, path)
    assert not list(tmp_path.iterdir())


def test_operations_without_export_are_named(tmp_path: Path) -> None:
    target = load_target("generic")
    subnet, config, supernet = make_subnet(Fourier(), target)
    with pytest.raises(ValueError, match=r"cannot export this model to ONNX.*svd"):
        export(subnet, config, supernet, target, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_other_codes_than_the_target_executes_are_refused(tmp_path: Path) -> None:
    target = load_target("openvino-cpu")
    subnet, config, supernet = make_subnet(Net(), target, bits=[2, 8])
    subnet.get_submodule("stem").weight_codes[0, 0, 0, 0] = -128  # type: ignore[index, operator]
    with pytest.raises(
        ValueError, match=r"layer 'stem': openvino-cpu executes weight codes -127 to 127.*--target openvino-cpu"
    ):
        export(subnet, config, supernet, target, tmp_path / "net.onnx")
    target = load_target("tensorrt")  # unsigned codes become signed ones there
    subnet, config, supernet = make_subnet(Net(), target, bits=[2, 8])
    with pytest.raises(ValueError, match="executes input codes -128 to 127, but the subnet has 0 to 255"):
        export(subnet, config, supernet, target, tmp_path / "net.onnx")


def test_layers_in_floating_point_are_reported(tmp_path: Path) -> None:
    """Transposed convolutions have no integer kernel in ONNX Runtime; weights read directly have float inputs."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2, 2)
            self.inner = nn.Linear(16, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.linear(self.up(x).mean(1), self.inner.weight, self.inner.bias)
            result: Tensor = self.head(hidden.mean(1))
            return result

    target = load_target("onnxruntime-x86")
    subnet, config, supernet = make_subnet(Reads(), target)
    description = export(subnet, config, supernet, target, tmp_path / "net.onnx", batch=2)
    dims = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [description["batch"], *(d.dim_value for d in dims)] == [2, 2, *SIZE]
    layers = description["layers"]
    assert [layers[name]["kernel"] for name in ("up", "inner", "head")] == ["float", "float", "integer"]
    assert layers["up"]["reason"] == "the target has no integer kernel for this operation"
    assert layers["inner"]["reason"] == "its weight is read directly"
    x = images(2, 2)
    out = run_onnxruntime(tmp_path / "net.onnx", x)
    assert np.abs(out - subnet(x).detach().numpy()).max() < 1e-3
