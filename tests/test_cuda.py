"""What runs on a GPU: kernels, batches, the CUDA graph of a training step, and the two commands. Skipped without one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets
from eqnet.batches import ArrayData, Batches
from eqnet.nn.compiled import compiled_kernels, traced_kernels
from eqnet.nn.kernels import EAGER, Kernels
from eqnet.nn.supernet import Supernet
from eqnet.scoring.evaluation import exact_convolutions
from eqnet.settings import TrainSettings
from eqnet.space import SandwichSampler
from eqnet.training.cuda_graph import WARM_UP_STEPS, GraphedGradients
from eqnet.training.step import supernet_step
from tests.commands import FAST, ROOT, TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STEPS = WARM_UP_STEPS + 4
Found = tuple[dict[str, float], dict[str, Tensor]]  # loss parts and gradients of a step


def found(graph: bool, kernels: Kernels = EAGER, precision: str = "no", network: bool = False) -> list[Found]:
    """Loss parts and gradients of some steps of a small ResNet, each with other images and other configs; no updates."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", num_classes=10, width=8).cuda().to(memory_format=torch.channels_last)
    supernet = Supernet.from_model(model, (3, 16, 16)).cuda()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, 32, 3, 16, 16, generator=generator).cuda()
    labels = torch.randint(0, 10, (STEPS, 32), generator=generator).cuda()
    supernet.calibrate(images[0])
    supernet.use_kernels(kernels)
    supernet.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision)
    prepared = accelerator.prepare(supernet)
    if network:
        prepared = torch.compile(prepared, dynamic=False)
    settings, sampler = TrainSettings(), SandwichSampler(supernet.space, num_random=1, form_per="layer")

    def gradients(model: nn.Module, x: Tensor, y: Tensor, configs: object) -> dict[str, Tensor]:
        return supernet_step(accelerator, model, supernet, x, y, configs, F.cross_entropy, settings)  # type: ignore[arg-type]

    compute = GraphedGradients(supernet, gradients) if graph else gradients
    steps = []
    for step in range(STEPS):
        configs = sampler.sample(np.random.default_rng(step))
        parts = compute(prepared, images[step], labels[step], configs)
        grads = {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}
        steps.append(({name: float(value) for name, value in parts.items()}, grads))
        supernet.zero_grad()
        assert supernet.config == configs[-1]
    return steps


def assert_same(ours: list[Found], theirs: list[Found], tolerance: float) -> None:
    """A wrong config, or an image or a gradient of another step, would be off by about the size of a gradient."""
    for step, ((parts, grads), (other_parts, others)) in enumerate(zip(ours, theirs, strict=True)):
        assert parts == pytest.approx(other_parts, rel=tolerance, abs=tolerance), step
        assert grads.keys() == others.keys()
        whole, other = (torch.cat([g.flatten() for g in of.values()]) for of in (grads, others))
        assert float((whole - other).norm() / other.norm()) < tolerance, step


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_step_is_the_step(compiled: bool, precision: str) -> None:
    kernels = compiled_kernels() if compiled else EAGER
    # the same kernels, some of which add up in an order of their own; a value at a rounding boundary may go the other way
    assert_same(found(True, kernels, precision), found(False, kernels, precision), 5e-3)


def test_a_recorded_step_of_a_compiled_network_is_the_step() -> None:
    # fused layers round to bf16 elsewhere
    assert_same(found(True, traced_kernels(), "bf16", network=True), found(False, compiled_kernels(), "bf16"), 0.2)


def test_the_compiled_quantizer_is_the_eager_one() -> None:
    results = {}
    for name, kernels in (("eager", EAGER), ("compiled", compiled_kernels())):
        torch.manual_seed(0)
        supernet = Supernet.from_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), (3, 16, 16))
        supernet.cuda().use_kernels(kernels)
        x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(2)).cuda()
        supernet.calibrate(x)
        quantizer = supernet.layers["2"].act_quantizer
        assert quantizer is not None
        for fmt in quantizer.formats:
            quantizer.select(fmt)
            leaf = (
                torch.relu(torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(3))).cuda().requires_grad_()
            )
            out = quantizer(leaf)
            quantizer.zero_grad()
            (out * out).sum().backward()
            results[name, fmt] = out.detach(), leaf.grad, quantizer.scale.grad.clone()
    for (name, fmt), found in results.items():
        if name == "compiled":
            expected = results["eager", fmt]
            assert torch.equal(found[0], expected[0])
            for a, b in zip(found[1:], expected[1:], strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), fmt


def test_batches_on_the_gpu_are_those_of_the_cpu() -> None:
    rng = np.random.default_rng(0)
    data = ArrayData(rng.integers(0, 256, (96, 16, 16, 3), dtype=np.uint8), rng.integers(0, 10, 96))
    options = {"seed": 3, "train": True, "augment": "shift_flip", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    ours, theirs = (Batches(data, 32, device=device, **options) for device in ("cuda", "cpu"))  # type: ignore[arg-type]
    for (x, y), (u, v) in zip(ours.epoch(2), theirs.epoch(2), strict=True):
        assert torch.allclose(x.cpu(), u, atol=1e-6)
        assert torch.equal(y.cpu(), v)


def test_subnets_are_measured_in_float32() -> None:
    convolution = nn.Conv2d(16, 16, 3)
    x = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(4))
    exact = copy.deepcopy(convolution).double()(x.double())
    convolution.cuda()
    before = torch.backends.cudnn.allow_tf32
    with exact_convolutions():
        out = convolution(x.cuda()).cpu()
    assert float((out - exact).norm() / exact.norm()) < 1e-6
    assert torch.backends.cudnn.allow_tf32 == before


def run(script: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_two_commands(tmp_path: Path, precision: str) -> None:
    out = run("train.py", tmp_path, "output=run", *TINY, f"train.precision={precision}")
    assert "on cuda" in out
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [f["supernet/task/largest"] for f in figures if "supernet/task/largest" in f]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    run("search.py", tmp_path, "--run", "run", "--budget", "4", *FAST)
    (subnet,) = (tmp_path / "run" / "search").glob("*/subnet.json")
    assert json.loads(subnet.read_text())["accuracy"]["test"] > 0
