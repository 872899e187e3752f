"""Verification on real files and real runtimes: a good export passes, and whatever is damaged is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from eqnet import cli
from eqnet.checkpoint import save_tensors, write_json
from eqnet.deploy.certificate import Certificate, certificate_path, write_certificate
from eqnet.deploy.export import export_onnx, sidecar_path
from eqnet.deploy.exported import Exported
from eqnet.deploy.subnet import load_subnet
from eqnet.deploy.verify import verify_export
from eqnet.nn.specialize import specialize
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model
from eqnet.settings import Settings, dump_settings
from eqnet.space import LayerConfig, LayerInfo, QuantConfig, QuantFormat
from eqnet.space.hardware import HardwareTarget, load_target

SIZE = (3, 8, 8)
BITS = {"stem": (8, 8), "wide": (4, 3), "deep": (5, 8), "point": (3, 8), "head": (8, 8)}


class Net(nn.Module):
    """Dense, depthwise and pointwise layers, a residual sum, BN with negative gains, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.point, self.bn3 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn2(self.wide(x)))
        x = torch.relu(self.bn3(self.point(self.deep(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Case(NamedTuple):
    """An exported file and what it was made of."""

    path: Path
    subnet: nn.Module
    layers: tuple[LayerInfo, ...]
    target: HardwareTarget

    def verify(self, count: int = 32, rounds: int = 0) -> Certificate:
        generator = torch.Generator().manual_seed(5)
        images, labels = torch.randn(count, *SIZE, generator=generator), torch.arange(count) % 5
        exported = Exported.read(self.path)
        return verify_export(exported, self.subnet, self.layers, self.target, images, labels, rounds=rounds)


def make(name: str, folder: Path, act_symmetric: bool = False, weight_symmetric: bool = True) -> Case:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2, net.bn3):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        net.bn2.weight[0].neg_()
    target = load_target(name)
    supernet = Supernet.from_model(net, SIZE, fixed={}).eval()
    images = torch.randn(64, *SIZE)
    supernet.calibrate(images)
    supernet = specialize(supernet, target)
    chosen = {}
    granularity: Any = "channel"
    for layer, (weight, act) in BITS.items():
        if target.act_rule(supernet.space.info(layer), QuantFormat(8)).bits == (8,):
            act = 8
        weight_format = QuantFormat(weight, weight_symmetric, granularity)
        chosen[layer] = LayerConfig(weight_format, QuantFormat(act, act_symmetric))
    config = QuantConfig(chosen)
    supernet.set_config(config)
    supernet.recalibrate_bn([images])
    subnet, path = supernet.extract(), folder / f"{name}.onnx"
    export_onnx(subnet, config, supernet.space.layers, target, path, input_size=SIZE, images=[images])
    return Case(path, subnet, tuple(supernet.space.layers), target)


@pytest.fixture(scope="module")
def ort_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make("onnxruntime-x86", tmp_path_factory.mktemp("ort"))


@pytest.fixture(scope="module")
def openvino_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make("openvino-cpu", tmp_path_factory.mktemp("openvino"))


@pytest.fixture
def damaged(ort_case: Case, tmp_path: Path) -> Callable[[Callable[[Any], object]], Certificate]:
    """Changes a copy of the file, fits the checksum in its description, and verifies it."""

    def verify(change: Callable[[Any], object]) -> Certificate:
        model = onnx.load(ort_case.path)
        change(model)
        path = tmp_path / "damaged.onnx"
        path.write_bytes(model.SerializeToString())
        facts = json.loads(sidecar_path(ort_case.path).read_text())
        facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        sidecar_path(path).write_text(json.dumps(facts))
        return ort_case._replace(path=path).verify()

    return verify


def constant(model: Any, name: str) -> Any:
    return next(t for t in model.graph.initializer if t.name == name)


def rewrite(model: Any, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Changes an initializer in place."""
    tensor = constant(model, name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def remove_pair(model: Any, prefix: str) -> None:
    """Takes out the quantizer whose nodes begin with a prefix."""
    pair = [node for node in model.graph.node if node.name.startswith(prefix)]
    source, result = pair[0].input[0], pair[-1].output[0]
    for node in pair:
        model.graph.node.remove(node)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == result:
                node.input[i] = source


def named(certificate: Certificate, step: str) -> set[str | None]:
    """Layers with errors in a step."""
    return {line.layer for line in certificate.errors if line.step == step}


# -- what is right ----------------------------------------------------------------------------------------------------


def test_a_good_export_passes_every_step(ort_case: Case) -> None:
    certificate = ort_case.verify(rounds=2)
    assert certificate.errors == []
    passed = [line.step for line in certificate.lines if line.verdict == "pass"]
    assert passed == ["rules", "integers", "unoptimized", "runtime", "runtime"]
    for name in BITS:
        figures = certificate.layers[name]
        assert (figures["input_codes_differ"], figures["accumulators_differ"]) == (0, 0)
        assert figures["kernel"] in ("QLinearConv", "QGemm")
    results = certificate.results
    assert results["reference_and_unoptimized"]["codes"] > 32 * 8 * 8 * 8 * 3
    assert results["reference_and_unoptimized"]["share"] < 1e-3
    assert results["reference_and_runtime"]["largest_step"] <= 1
    assert results["latency_ms"].keys() == {"runtime", "float"}
    assert set(results["permitted"]["bias_rounding"]) <= set(BITS)
    assert results["permitted"]["added_quantizers"]  # convolutions without a quantized output run in floating point


def test_accuracy_and_agreement_are_those_of_the_outputs(ort_case: Case) -> None:
    certificate = ort_case.verify(count=40)
    generator = torch.Generator().manual_seed(5)
    images, labels = torch.randn(40, *SIZE, generator=generator), torch.arange(40) % 5
    with torch.no_grad():
        simulated = ort_case.subnet(images).argmax(1)
    assert certificate.results["accuracy"]["simulation"] == pytest.approx(
        100 * float((simulated == labels).float().mean())
    )
    assert certificate.results["simulation_and_runtime"]["images"] == 40


def test_openvino_passes_with_integer_kernels(openvino_case: Case) -> None:
    certificate = openvino_case.verify()
    assert certificate.errors == []
    between = certificate.results["simulation_and_reference"]["layer_by_layer"]
    assert between["codes"] == sum(32 * n for n in (3 * 64, 8 * 64, 8 * 64, 8 * 16, 12))
    assert between["share"] < 1e-4
    assert all(figures["kernel"].lower().endswith("i8") for figures in certificate.layers.values())


def test_targets_that_do_not_run_here_are_checked_by_their_rules(tmp_path: Path) -> None:
    certificate = make("tensorrt", tmp_path, act_symmetric=True).verify()
    assert certificate.errors == []
    assert [line.step for line in certificate.lines if line.verdict == "pass"] == [
        "rules",
        "integers",
        "integers",
        "unoptimized",
    ]
    assert any("does not run here" in line.text for line in certificate.lines)


def test_an_addition_in_floating_point_is_found_where_the_graph_must_be_integer(
    openvino_case: Case,
) -> None:
    target = openvino_case.target.model_copy(update={"integer_add": True})
    (line,) = openvino_case._replace(target=target).verify().errors
    assert line.step == "rules"
    assert line.layer is not None
    assert line.layer.startswith("node_add")


def test_asymmetric_weights_are_verified_too(tmp_path: Path) -> None:
    certificate = make("onnxruntime-x86", tmp_path, weight_symmetric=False).verify()
    assert certificate.errors == []


def test_the_certificate_is_a_file_beside_the_export(ort_case: Case, tmp_path: Path) -> None:
    certificate = ort_case.verify()
    path = write_certificate(certificate, tmp_path / "net.onnx")
    assert path == certificate_path(tmp_path / "net.onnx")
    written = json.loads(path.read_text())
    assert written["schema"] == "eqnet certificate 1"
    assert written["verdict"] == "pass"
    assert written["sha256"] == hashlib.sha256(ort_case.path.read_bytes()).hexdigest()
    assert len(written["lines"]) == len(certificate.lines)


# -- what is wrong ----------------------------------------------------------------------------------------------------


def test_one_changed_weight_code_is_found(damaged: Any) -> None:
    def change(codes: np.ndarray) -> None:
        codes.flat[7] += 1 if codes.flat[7] < 0 else -1

    certificate = damaged(lambda model: rewrite(model, "wide/weight/codes", change))
    assert named(certificate, "integers") == {"wide"}
    assert any("1 of 576 weight codes differ" in line.text for line in certificate.errors)


def test_one_changed_step_size_of_a_weight_is_found(damaged: Any) -> None:
    def change(scale: np.ndarray) -> None:
        scale[3] *= np.float32(1.0001)

    certificate = damaged(lambda model: rewrite(model, "point/weight/scale", change))
    assert named(certificate, "integers") == {"point"}
    assert named(certificate, "rules") == {"point"}  # the bias no longer has the step size of the sums


def test_codes_on_finer_steps_than_described_are_found(damaged: Any) -> None:
    def change(codes: np.ndarray) -> None:
        codes[0, 0] += 1  # of 3 bits, stored as multiples of 16

    certificate = damaged(lambda model: rewrite(model, "point/weight/codes", change))
    assert named(certificate, "rules") == named(certificate, "integers") == {"point"}
    assert any("no multiples of 16" in line.text for line in certificate.errors)


def test_an_operation_between_two_layers_is_compared_too(openvino_case: Case, tmp_path: Path) -> None:
    """Weights and quantizers are right; what computes from one layer to the next is not."""
    model = onnx.load(openvino_case.path)
    (addition,) = [node for node in model.graph.node if node.op_type == "Add"]
    addition.op_type = "Sub"
    path = tmp_path / "damaged.onnx"
    path.write_bytes(model.SerializeToString())
    facts = json.loads(sidecar_path(openvino_case.path).read_text())
    facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    sidecar_path(path).write_text(json.dumps(facts))
    assert named(openvino_case._replace(path=path).verify(), "integers") == {"deep"}


def test_a_changed_step_size_of_an_input_is_found(damaged: Any) -> None:
    def change(scale: np.ndarray) -> None:
        scale *= np.float32(1.01)

    certificate = damaged(lambda model: rewrite(model, "deep/act/scale", change))
    assert "deep" in named(certificate, "rules")
    assert named(certificate, "integers") == {"deep"}


def test_a_changed_bias_is_found(damaged: Any) -> None:
    def change(codes: np.ndarray) -> None:
        codes[2] += 1

    certificate = damaged(lambda model: rewrite(model, "head/bias/codes", change))
    assert named(certificate, "integers") == {"head"}


def test_a_missing_quantizer_is_found(damaged: Any) -> None:
    certificate = damaged(lambda model: remove_pair(model, "deep/act/"))
    assert "deep" in named(certificate, "rules")
    assert "deep" in named(certificate, "runtime")  # floating point instead


def test_a_missing_added_quantizer_is_found(damaged: Any, ort_case: Case) -> None:
    added = json.loads(sidecar_path(ort_case.path).read_text())["quantizers"]
    name = next(iter(added))
    certificate = damaged(lambda model: remove_pair(model, f"{name}/"))
    assert name in named(certificate, "rules")


def test_codes_in_a_container_that_runs_in_floating_point_are_found(damaged: Any) -> None:
    def change(model: Any) -> None:
        for part in ("codes", "zero_point"):
            tensor = constant(model, f"point/weight/{part}")
            array = numpy_helper.to_array(tensor).astype(ml_dtypes.int4)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        for opset in model.opset_import:
            opset.version = max(opset.version, 21)
        model.ir_version = max(model.ir_version, 10)

    certificate = damaged(change)
    assert named(certificate, "rules") == {"point"}
    assert named(certificate, "runtime") == {"point"}
    assert any("int4" in line.text for line in certificate.errors)


def test_16_bit_quantizers_are_found(damaged: Any) -> None:
    def change(model: Any) -> None:
        tensor = constant(model, "head/act/zero_point")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.uint16), tensor.name))
        for opset in model.opset_import:
            opset.version = max(opset.version, 21)
        model.ir_version = max(model.ir_version, 10)
        del model.graph.value_info[:]

    certificate = damaged(change)
    assert "head" in named(certificate, "rules")
    assert any("container uint16" in line.text for line in certificate.errors)


def test_an_output_quantizer_with_another_zero_point_is_found(damaged: Any, ort_case: Case) -> None:
    added = json.loads(sidecar_path(ort_case.path).read_text())["quantizers"]
    name = next(iter(added))

    def change(zero: np.ndarray) -> None:
        zero[...] = 255 - zero

    certificate = damaged(lambda model: rewrite(model, f"{name}/zero_point", change))
    assert name in named(certificate, "rules")


# -- files that do not fit --------------------------------------------------------------------------------------------


def test_files_that_do_not_belong_together_are_refused(ort_case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        Exported.read(tmp_path / "nothing.onnx")
    path = tmp_path / "net.onnx"
    path.write_bytes(ort_case.path.read_bytes())
    with pytest.raises(ValueError, match=r"cannot read .*net\.onnx\.json"):
        Exported.read(path)
    description = sidecar_path(ort_case.path).read_text()
    sidecar_path(path).write_text(description)
    assert Exported.read(path).input == "images"
    path.write_bytes(ort_case.path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"is not the file that .* describes"):
        Exported.read(path)
    facts = json.loads(description) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    sidecar_path(path).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"net\.onnx is damaged or no ONNX file"):
        Exported.read(path)
    del facts["quantizers"]
    path.write_bytes(ort_case.path.read_bytes())
    facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    sidecar_path(path).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="is incomplete: quantizers missing"):
        Exported.read(path)


def test_a_file_of_another_subnet_is_refused(ort_case: Case) -> None:
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    supernet = Supernet.from_model(other, SIZE).eval()
    supernet.calibrate(torch.randn(8, *SIZE))
    with pytest.raises(ValueError, match=r"was made of another subnet: 0, deep, head, point, stem"):
        ort_case._replace(subnet=supernet.extract()).verify()


def test_an_older_runtime_than_the_facts_is_refused(ort_case: Case) -> None:
    target = ort_case.target.model_copy(update={"runtime": "onnxruntime 99.0"})
    with pytest.raises(ValueError, match=r"is older than 99\.0"):
        ort_case._replace(target=target).verify()


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_verifies_a_file_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.model_validate({"model": {"arguments": {"width": 4}}})
    run = Run(tmp_path / "mine", settings)
    folder = run.path / "search" / "w4-a4"
    folder.mkdir(parents=True)
    (run.path / "settings.yaml").write_text(dump_settings(settings))
    supernet = Supernet.from_model(create_float_model(settings.model, 10, 1), (1, 8, 8)).eval()
    supernet.calibrate(torch.randn(16, 1, 8, 8))
    run.save_supernet(supernet, {"num_classes": 10, "input_size": [1, 8, 8]})
    config = supernet.space.uniform(4, supernet.space.forms[0])
    write_json(folder / "subnet.json", {"layers": config.to_json()})
    save_tensors(folder / "subnet.safetensors", supernet.extract(config).state_dict())
    saved = load_subnet(folder / "subnet.json", run.path)
    path = folder / "generic.onnx"
    target = load_target("generic")
    export_onnx(saved.module, config, saved.layers, target, path, input_size=(1, 8, 8), source=saved.source)

    def eqnet(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["eqnet", "verify", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    code, out, err = eqnet(str(path), "--images", "8")
    assert (code, err) == (0, "")
    assert "verified; certificate: " in out
    written = json.loads(certificate_path(path).read_text())
    assert (written["verdict"], written["split"], written["images"]) == ("pass", "validation", 8)
    moved = tmp_path / "moved.onnx"
    moved.write_bytes(path.read_bytes())
    facts = json.loads(sidecar_path(path).read_text())
    facts["source"]["subnet"] = "elsewhere/subnet.json"
    sidecar_path(moved).write_text(json.dumps(facts))
    code, _, err = eqnet(str(moved))
    assert (code, err.count("\n")) == (2, 1)
    assert "name its run with --run" in err
    assert eqnet(str(moved), "--run", "mine", "--images", "8")[0] == 0
    code, _, err = eqnet("nothing.onnx")
    assert (code, err) == (2, "error: there is no file nothing.onnx.\n")
