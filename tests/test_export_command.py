"""`eqnet export` as a user meets it: a subnet of a run becomes a file; mistakes are one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from accelerate import Accelerator
from conftest import Eqnet

from eqnet.checkpoint import load_tensors, save_tensors, write_json
from eqnet.deploy.export import read_sidecar
from eqnet.deploy.packed import load_packed
from eqnet.deploy.subnet import load_subnet
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model, open_data
from eqnet.settings import Settings, dump_settings
from eqnet.space import model_size
from eqnet.space.hardware import load_target


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run on the digits with a searched subnet, and one whose tensors are another's."""
    settings = Settings.model_validate({"model": {"name": "cifar_resnet20", "arguments": {"width": 4}}})
    run = Run(tmp_path_factory.mktemp("runs") / "digits", settings)
    run.path.mkdir()
    (run.path / "settings.yaml").write_text(dump_settings(settings))
    data = open_data(run)
    run.store_split(data, Accelerator())
    torch.manual_seed(0)
    supernet = Supernet.from_model(create_float_model(settings.model, data.num_classes, 1), data.input_size)
    supernet.calibrate(torch.randn(16, 1, 8, 8))
    facts = {
        "num_classes": data.num_classes,
        "input_size": list(data.input_size),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    run.save_supernet(supernet, facts)
    space = load_target("onnxruntime-x86").restrict(supernet.space)
    config = space.sample(np.random.default_rng(0))
    for name in ("mixed", "foreign"):
        folder = run.path / "search" / name
        folder.mkdir(parents=True)
        write_json(folder / "subnet.json", {"layers": config.to_json(), "target": None})
        save_tensors(folder / "subnet.safetensors", supernet.extract(config).state_dict())
    tensors = load_tensors(run.path / "search" / "foreign" / "subnet.safetensors")
    del tensors["conv1.weight_codes"]
    save_tensors(run.path / "search" / "foreign" / "subnet.safetensors", tensors)
    return run.path


def test_a_subnet_becomes_a_file(eqnet: Eqnet, run_folder: Path) -> None:
    subnet = run_folder / "search" / "mixed" / "subnet.json"
    code, out, err = eqnet("export", subnet, "--target", "onnxruntime-x86", "--images", "32")
    assert (code, err) == (0, "")
    path = subnet.with_name("onnxruntime-x86.onnx")
    assert f"saved {path} and {path.name}.json" in out
    assert "0 layers in floating point" in out
    description = read_sidecar(path)
    saved = load_subnet(subnet, run_folder)
    weights = subnet.with_name("subnet.safetensors").read_bytes()
    assert description["source"] == {
        "run": str(run_folder),
        "subnet": str(subnet),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert description["input"] == {
        "name": "images",
        "size": [1, 8, 8],
        "mean": saved.facts["mean"],
        "std": saved.facts["std"],
    }
    assert len(description["quantizers"]) >= 3
    x = next(iter(saved.training_images(64)))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"images": x.numpy()})[0]
    expected = saved.module(x).detach().numpy()
    assert np.abs(logits - expected).mean() < 0.1 * np.abs(expected).max()

    before = path.read_bytes()
    code, out, err = eqnet("export", subnet, "--target", "onnxruntime-x86")
    assert (code, out) == (2, "")
    assert err == f"error: {path} already exists; remove it or give another --output.\n"
    assert path.read_bytes() == before

    program = subnet.with_name("subnet.pt2")
    assert eqnet("export", subnet, "--target", "generic", "--format", "torch", "--output", program)[0] == 0
    assert torch.equal(torch.export.load(program).module()(x), saved.module(x))


def test_mistakes_are_one_sentence(eqnet: Eqnet, run_folder: Path, tmp_path: Path) -> None:
    subnet, foreign = (run_folder / "search" / name / "subnet.json" for name in ("mixed", "foreign"))
    outside = tmp_path / "subnet.json"
    outside.write_text(json.dumps({"layers": {}}))
    cases: list[tuple[list[object], str]] = [
        ([subnet, "--target", "onnxruntime-x68"], "unknown target 'onnxruntime-x68'; did you mean 'onnxruntime-x86'?"),
        ([subnet, "--target", "tensorrt"], "tensorrt does not run"),
        ([subnet], "Missing option '--target'"),
        ([subnet, "--target", "generic", "--output", tmp_path / "net.bin"], "must end with .onnx"),
        ([subnet, "--target", "generic", "--format", "tflite"], "'tflite' is not one of 'onnx', 'torch'"),
        ([foreign, "--target", "generic"], "these keys do not fit: conv1.weight_codes"),
        ([outside, "--target", "generic"], "does not lie in the folder of a run"),
        ([outside, "--target", "generic", "--run", run_folder], "the config does not fit the model"),
        ([tmp_path / "none.json", "--target", "generic", "--run", run_folder], "none.json"),
    ]
    for arguments, message in cases:
        code, out, err = eqnet("export", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: "), arguments
        assert err.count("\n") == 1, err
        assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["subnet.json"]


def test_packed_weights_have_the_size_of_their_cost(eqnet: Eqnet, run_folder: Path, tmp_path: Path) -> None:
    subnet, file = run_folder / "search" / "mixed" / "subnet.json", tmp_path / "packed.safetensors"
    words = ("export", str(subnet), "--target", "onnxruntime-x86", "--format", "packed", "--output", str(file))
    code, out, err = eqnet(*words)
    assert (code, err) == (0, "")
    saved = load_subnet(subnet, run_folder)
    supernet, _ = saved.run.load_supernet()
    assert f"{model_size(supernet.space).of(saved.config):.0f} bytes of tensors" in " ".join(out.split())
    settings = saved.run.settings.model
    loaded = load_packed(file, create_float_model(settings, 10, 1))
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(x), saved.module(x))
    assert eqnet(*words)[0] == 2  # never overwritten
