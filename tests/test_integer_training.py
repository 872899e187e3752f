"""Training with integer forward passes: outputs and gradients of the simulation, less memory, the same curve."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.std_conv import ScaledStdConv2d
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets
from eqnet.nn.compiled import compiled_kernels
from eqnet.nn.integer import kernels_available
from eqnet.nn.integer_training import use_integers
from eqnet.nn.kernels import EAGER
from eqnet.nn.supernet import Supernet
from eqnet.training.metamix import selected_by
from tests.commands import TINY, one_sentence, train

needs_kernels = pytest.mark.skipif(not kernels_available(), reason="this CPU has no integer kernels")
KERNELS = {"eager": lambda: EAGER, "compiled": compiled_kernels}
LAYERS = {  # layer, shape of its input
    "convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1, bias=False), (4, 16, 9, 9)),
    "with bias and stride": (lambda: nn.Conv2d(8, 16, 3, 2, padding=1), (4, 8, 9, 9)),
    "dilated": (lambda: nn.Conv2d(8, 16, 3, padding=2, dilation=2), (4, 8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(16, 32, 3, groups=4), (4, 16, 9, 9)),
    "depth-wise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), (4, 16, 9, 9)),
    "standardized": (lambda: ScaledStdConv2d(8, 16, 3, padding=1), (4, 8, 9, 9)),
    "linear": (lambda: nn.Linear(32, 10), (6, 32)),
    "linear on tokens": (lambda: nn.Linear(32, 16, bias=False), (3, 7, 32)),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def single(name: str) -> tuple[Supernet, Tensor]:
    """A supernet of one layer, calibrated, whose input is not the image, and an input with negative values or without."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    x = normal(*shape)
    supernet = Supernet.from_model(nn.Sequential(nn.Identity(), make()), shape[1:], fixed={})
    supernet.layers["1"].act_quantizer.requires_grad_(True)  # not frozen, as inputs of a first layer are
    supernet.calibrate(x)
    return supernet, x


def results(supernet: Supernet, x: Tensor, u: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    supernet.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = supernet(leaf)
    out.backward(u.to(out.dtype))
    grads = {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": leaf.grad, **grads}


@needs_kernels
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_simulation(name, kernels):
    """For formats of both symmetries and granularities: nothing differs by more than float32 rounds."""
    supernet, x = single(name)
    supernet.use_kernels(KERNELS[kernels]())
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = supernet.layers["1"]
    u = normal(*supernet(x).shape, seed=1)
    for bits in (2, 4, 8):
        for form in supernet.space.forms:
            supernet.set_config(supernet.space.uniform(bits, form))
            layer.trained_forward = None
            expected = results(supernet, x, u)
            use_integers(supernet)
            found = results(supernet, x, u)
            assert found.keys() == expected.keys()
            for what, value in expected.items():
                assert found[what].dtype == value.dtype
                largest = value.abs().max()
                assert (found[what] - value).abs().max() <= 2e-5 * largest, f"{what}, {bits} bits, {form}"


@needs_kernels
@pytest.mark.parametrize("name", ["convolution", "linear on tokens"])
def test_under_autocast_the_output_is_nearer_to_the_exact_one_than_the_simulation(name):
    """The simulation rounds each fake-quantized value to bf16, codes are exact."""
    supernet, x = single(name)
    supernet.set_config(supernet.space.uniform(7, supernet.space.forms[0]))
    exact = supernet(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        simulated = supernet(x).detach()
        use_integers(supernet)
        found = supernet(x).detach()
    assert found.dtype == simulated.dtype == torch.bfloat16
    assert (found - exact).square().mean() <= (simulated - exact).square().mean()
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()


@needs_kernels
def test_without_gradients_or_in_floating_point_nothing_changes():
    """Measuring is always the simulation; phases with weights in floating point train as before."""
    supernet, x = single("convolution")
    before, floating = supernet(x).detach(), supernet.model[1]
    use_integers(supernet)
    with torch.no_grad():
        assert torch.equal(supernet(x), before)
    with supernet.float_weights():
        expected = F.conv2d(floating.act_quantizer(x), floating.latent_weight, padding=1)
        assert torch.equal(supernet(x), expected)
    supernet.set_config(None)
    assert torch.equal(supernet(x), F.conv2d(x, floating.latent_weight, padding=1))


@needs_kernels
def test_the_backward_pass_keeps_no_quantized_copy():
    """The simulation keeps the fake-quantized input of every layer besides the input itself."""
    model = timm.create_model("cifar_resnet20", num_classes=10)
    supernet = Supernet.from_model(model, (3, 32, 32)).train()
    images = normal(8, 3, 32, 32)
    supernet.calibrate(images)

    def kept() -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = supernet(images)
        del out
        return sum(seen.values())

    simulated = kept()
    use_integers(supernet)
    assert kept() < 0.8 * simulated


@needs_kernels
def test_extracted_subnets_forget_how_they_were_trained():
    supernet, x = single("convolution")
    use_integers(supernet)
    subnet = supernet.eval().extract()
    assert not any("trained_forward" in vars(m) for m in subnet.modules())
    torch.testing.assert_close(subnet(x), supernet(x).detach(), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_training_on_integers_has_the_same_curve(tmp_path):
    curves = []
    for switch in ("off", "on"):
        done = train(tmp_path / switch, *TINY, "train.evaluate_epochs=0", f"train.integer={switch}")
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / switch / "metrics.jsonl").read_text().splitlines()]
        curves.append(torch.tensor([row["supernet/total"] for row in rows if "supernet/total" in row]))
    assert len(curves[0]) == len(curves[1]) > 4
    assert not torch.equal(*curves)  # sums are rounded otherwise, so something ran on integers
    torch.testing.assert_close(curves[0][0], curves[1][0], rtol=0.02, atol=0)
    torch.testing.assert_close(curves[0].mean(), curves[1].mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("setting", ["train.precision=fp16", "train.compile=network"])
def test_integers_that_cannot_be_had_are_refused(tmp_path, setting):
    failed = train(tmp_path / "run", *TINY, "train.integer=on", setting)
    assert failed.returncode == 2
    assert "train.integer=off" in one_sentence(failed.stderr)


@needs_kernels
def test_logits_of_metamix_have_the_gradients_of_the_simulation():
    """They come from hooks on the quantizers, so layers whose quantizers are hooked must call them."""
    supernet = Supernet.from_model(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), (3, 8, 8),
        bits=[2, 4, 8], symmetric=[True], granularity=["channel"], fixed={},
    )  # fmt: skip
    x = normal(4, 3, 8, 8)
    supernet.calibrate(x)
    space = supernet.space
    found = []
    for switch in (lambda _: None, use_integers):
        switch(supernet)
        choice = torch.zeros(space.bits.shape)
        choice[torch.arange(space.num_genes), torch.tensor(space.encode(space.largest()), dtype=torch.int64)] = 1
        choice.requires_grad_()
        with selected_by(supernet, choice):
            supernet.set_config(space.largest())
            supernet(x).square().mean().backward()
        found.append(choice.grad)
    assert found[0] is not None
    assert found[0].abs().sum() > 0
    assert torch.equal(found[0], found[1])
