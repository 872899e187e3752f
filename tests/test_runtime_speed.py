"""The benchmark of exported files compares what it says: the same net, on integers, in every file."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import timm
import torch

import eqnet.nn.models  # noqa: F401  registers cifar_resnet20
from benchmarks.runtime_speed import accuracy, measure, write_files
from eqnet.deploy.runtime import RUNTIMES
from eqnet.nn.supernet import Supernet


@pytest.mark.slow
def test_every_file_is_the_same_net(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", width=4).eval()
    images = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        labels = model(images).argmax(1)
    supernet = Supernet.from_model(copy.deepcopy(model), (3, 16, 16)).eval()
    supernet.calibrate(images)
    files = write_files(model, supernet, [images], [images], tmp_path)
    assert accuracy(files["float32"], [(images, labels)]) == 100.0
    assert accuracy(files["float32"], [(images, (labels + 1) % 10)]) == 0.0
    for name in ("8 bits", "mixed 2-8 bits"):
        kernels = RUNTIMES["onnxruntime"].load(onnx.load(files[name])).kernels()
        assert len(kernels) == 20
        assert all(kernel.integer for kernel in kernels.values())
    operations = {node.op_type for node in onnx.load(files["quantize_static"]).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operations
    rows = measure(files, images[:1], rounds=2)
    assert rows.keys() == files.keys()
    assert rows["float32"]["float32 / it"] == rows["quantize_static"]["quantize_static / it"] == 1.0
