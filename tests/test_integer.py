"""Integer execution equals the simulation: codes bit for bit, layers to float32 rounding, networks but for rare neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets
from eqnet.nn.functional import code_range
from eqnet.nn.integer import (
    InputGrid,
    PackedWeight,
    WeightCache,
    conv2d,
    dequantize_codes,
    input_grid,
    kernels_available,
    pack_weight,
    quantize_codes,
    runs_on_integers,
)
from eqnet.nn.integer_supernet import IntegerStep, IntegerSupernet
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.nn.supernet import Supernet
from eqnet.space import LayerConfig, QuantConfig, QuantFormat

pytestmark = pytest.mark.skipif(not kernels_available(), reason="this CPU has no integer kernels")
FORMATS = [
    QuantFormat(b, s, g)
    for b in (2, 5, 7, 8)
    for s in (True, False)
    for g in ("tensor", "channel")  # type: ignore[arg-type]
]
ACT_FORMATS = [QuantFormat(b, s) for b in (2, 5, 7, 8) for s in (True, False)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def supernet_of(model: nn.Module, images: Tensor, **choices: Any) -> Supernet:
    """A calibrated supernet in eval mode, BN statistics of the images."""
    choices = {"fixed": {}, **choices}
    supernet = Supernet.from_model(model, images.shape[1:], **choices).eval()
    with torch.no_grad():
        for module in supernet.modules():
            if isinstance(module, nn.BatchNorm2d):  # factors of both signs, no trivial shift
                module.weight.copy_(normal(len(module.weight)) + 0.5)
                module.bias.copy_(0.3 * normal(len(module.bias), seed=1))
    supernet.calibrate(images)
    supernet.recalibrate_bn([images])
    return supernet


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# -- codes ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    signed=st.booleans(),
    scale=st.floats(1e-3, 2.0),
    zero=st.floats(0, 1),  # where in the code range the zero point is
    seed=st.integers(0, 1000),
)
def test_codes_are_those_of_the_simulation(
    bits: int, symmetric: bool, signed: bool, scale: float, zero: float, seed: int
) -> None:
    quantizer = ElasticQuantizer([QuantFormat(bits, symmetric)], signed=signed)
    with torch.no_grad():
        quantizer.scale.fill_(scale)
        qmin, qmax = code_range(bits, signed)
        quantizer.zero_point.fill_(0 if symmetric else round(qmin + zero * (qmax - qmin)))
        x = torch.cat([normal(200, seed=seed), torch.arange(-4, 5) * (scale / 2)])  # ties too
        grid = input_grid(quantizer)
        codes = quantize_codes(x, grid)
        assert torch.equal(dequantize_codes(codes, grid), quantizer(x))
    assert codes.max() <= 2**bits - 1


def test_zero_is_a_code_that_stands_for_zero() -> None:
    quantizer = ElasticQuantizer([QuantFormat(4, False)], signed=False)
    with torch.no_grad():
        quantizer.scale.fill_(0.1)
        quantizer.zero_point.fill_(5)
    grid = input_grid(quantizer)
    assert grid.zero == 5
    assert int(quantize_codes(torch.zeros(1), grid)) == 5  # what padding is filled with


# -- single layers ----------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 9, 9)),
    "strided": (lambda: nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(1, 2), bias=False), (6, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2), (4, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(8, 5, 1, stride=2), (8, 7, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 5, groups=8, padding=2), (8, 6, 6)),
    "standardized": (lambda: timm.layers.ScaledStdConv2d(4, 8, 3, padding=1), (4, 7, 7)),
    "linear": (lambda: nn.Linear(13, 7), (13,)),
    "tokens": (lambda: nn.Linear(16, 9, bias=False), (5, 16)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_layer_equals_its_simulation_in_every_format(name: str, signed: bool) -> None:
    build, size = LAYERS[name]
    x = normal(3, *size) + 0.3
    x = x if signed else x.relu()
    layer = supernet_of(nn.Sequential(build()), normal(3, *size, seed=1) if signed else x).layers["0"]
    layer.weight_quantizer.calibrate(layer.float_weight + 0.05)  # zero points away from the middle
    assert layer.act_quantizer is not None
    layer.act_quantizer.calibrate(x)
    step = IntegerStep(layer, WeightCache())
    with torch.no_grad():
        for weight in layer.weight_quantizer.formats:
            for act in layer.act_quantizer.formats:
                layer.weight_quantizer.select(weight)
                layer.act_quantizer.select(act)
                step.freeze()
                if step.weight is None:
                    assert (weight.bits, weight.symmetric) == (8, False)
                    assert getattr(layer, "groups", 1) > 1
                assert same(step(x), layer(x), 3e-6), (weight, act)  # type: ignore[operator]


def test_nine_bit_differences_are_two_tensors_of_eight() -> None:
    layer = supernet_of(nn.Sequential(nn.Conv2d(4, 8, 3)), normal(2, 4, 6, 6)).layers["0"]
    layer.weight_quantizer.select(QuantFormat(8, False, "tensor"))
    with torch.no_grad():
        layer.latent_weight.uniform_(-0.1, 1.0)
        layer.weight_quantizer.calibrate(layer.latent_weight)
        codes, _, zero = layer.weight_quantizer.quantize(layer.float_weight)
    assert int((codes.int() - zero.int()).max()) > 127
    packed = pack_weight(layer)
    assert packed is not None
    assert packed.doubled


def test_what_has_no_kernel_is_found() -> None:
    kinds = {
        "transposed": nn.ConvTranspose2d(4, 4, 2),
        "one": nn.Conv1d(4, 4, 3),
        "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "same": nn.Conv2d(4, 4, 3, padding="same"),
    }
    size = {"one": (4, 8)}
    for name, module in kinds.items():
        x = normal(2, *size.get(name, (4, 8, 8)))
        supernet = Supernet.from_model(nn.Sequential(module, nn.Flatten()), x.shape[1:], fixed={})
        supernet.calibrate(x)
        assert not runs_on_integers(supernet.layers["0"])
        executor = IntegerSupernet(supernet)
        assert executor.simulated == ["0"]
        with torch.no_grad():
            assert torch.equal(executor.freeze()(x), supernet(x))


def test_results_become_the_next_codes_in_the_kernel() -> None:
    layer = supernet_of(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), normal(2, 4, 8, 8)).layers["0"]
    assert layer.act_quantizer is not None
    weight, grid = pack_weight(layer), input_grid(layer.act_quantizer)
    assert weight is not None
    codes = quantize_codes(normal(2, 4, 8, 8, seed=3), grid)
    bias = layer._parameters["bias"].detach()  # type: ignore[union-attr]
    y = conv2d(codes, grid, weight, bias, layer)
    for out in (InputGrid(0.05, 0, 0, 15), InputGrid(0.02, 100, -100, 155), InputGrid(0.1, 3, -3, 0)):
        for clip in (None, (0.0, float("inf")), (0.0, 0.4)):
            got = conv2d(codes, grid, weight, bias, layer, clip=clip, out_grid=out)
            clipped = y if clip is None else y.clamp(*clip)
            assert torch.equal(got, quantize_codes(clipped, out))


# -- the cache --------------------------------------------------------------------------------------------------------


def make_cache_layers() -> Supernet:
    return supernet_of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), normal(4, 8))


def test_weights_are_packed_once_per_format_until_they_change() -> None:
    layer, cache = make_cache_layers().layers["0"], WeightCache()
    first = cache.get(layer)
    layer.weight_quantizer.select(QuantFormat(2))
    other = cache.get(layer)
    assert other is not first
    assert cache.get(layer) is other
    with torch.no_grad():
        layer.weight_quantizer.scale.mul_(2)
    changed = cache.get(layer)
    assert changed is not other
    assert cache.num_bytes == 2 * 64
    assert isinstance(changed, PackedWeight)
    assert isinstance(other, PackedWeight)
    assert torch.equal(changed.scale, 2 * other.scale)


def test_the_cache_forgets_the_oldest() -> None:
    layer, cache = make_cache_layers().layers["0"], WeightCache(limit_bytes=150)
    formats = [QuantFormat(b) for b in (2, 3, 4)]
    packed = []
    for fmt in formats:
        layer.weight_quantizer.select(fmt)
        packed.append(cache.get(layer))
    assert cache.num_bytes <= 150
    assert cache.get(layer) is packed[2]
    layer.weight_quantizer.select(formats[0])
    assert cache.get(layer) is not packed[0]


# -- networks ---------------------------------------------------------------------------------------------------------


def agree(supernet: Supernet, images: Tensor) -> IntegerSupernet:
    """Checks fused and layer-by-layer execution of random configs against the simulation.

    With few bits and pixels hardly an activation lies where float32 rounding decides about its code; one config may have one.
    """
    executor, rng = IntegerSupernet(supernet), np.random.default_rng(0)
    off: dict[str, int] = {"fused": 0, "layer by layer": 0}
    for i in range(8):
        supernet.set_config(supernet.space.sample(rng) if i else supernet.space.largest())
        with torch.no_grad():
            expected = supernet(images)
            off["fused"] += not same(executor.freeze()(images), expected)
            with executor.layer_by_layer():
                off["layer by layer"] += not same(supernet(images), expected)
            assert torch.equal(supernet(images), expected)  # afterwards as before
    assert max(off.values()) <= 1, off
    return executor


def test_a_small_network_agrees_in_random_configs(cnn: nn.Sequential, images: Callable[..., Tensor]) -> None:
    x = images(4)
    executor = agree(supernet_of(cnn, x, bits=[2, 3, 4]), x)
    assert executor.traced
    assert executor.simulated == []


def test_a_residual_network_agrees_and_is_fused() -> None:
    x = normal(4, 3, 8, 8)
    model = timm.create_model("cifar_resnet20", width=8, shortcut="B")
    executor = agree(supernet_of(model, x, bits=[2, 3]), x)
    steps = executor._fused
    assert executor.traced
    assert len(steps) == len(executor.supernet.layers)
    assert sum(s.norm is not None for s in steps) == 21  # every BN
    assert sum(s.clip is not None for s in steps) == 19  # every ReLU
    assert sum(s.target is not None for s in steps) == 9  # conv1 -> conv2 in each block


class Blocks(nn.Module):
    """A residual that is needed after the add, one that is changed in place, a broadcast one, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.e = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = F.relu(self.b(x) + x) + x
        y = self.c(x)
        x = x.relu_()
        x = y + x
        x = self.d(x) + self.pool(x)
        return torch.relu(self.e(self.e(x)) + x).flatten(1)  # type: ignore[no-any-return]


def test_fusion_keeps_what_is_read_later() -> None:
    x = normal(2, 4, 6, 6)
    executor = agree(supernet_of(Blocks(), x, bits=[2, 3]), x)
    assert executor.traced
    assert len(executor._fused) == 6


class Untraceable(nn.Module):
    """Its path depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = -x
        return self.b(x)  # type: ignore[no-any-return]


def test_models_that_cannot_be_traced_run_layer_by_layer() -> None:
    x = normal(8, 6)
    executor = agree(supernet_of(Untraceable(), x, bits=[2, 4]), x)
    assert not executor.traced


def test_a_timm_model_agrees_layer_by_layer() -> None:
    """Every layer on the input that it gets in the simulation: single roundings cannot grow."""
    x = normal(2, 3, 32, 32)
    model = timm.create_model("mobilenetv3_small_050")  # depthwise, squeeze-and-excite, BN with activations
    supernet = Supernet.from_model(model, (3, 32, 32), bits=[3, 8]).eval()
    supernet.calibrate(x)
    executor = IntegerSupernet(supernet)
    assert executor.traced
    steps = {id(s.layer): s for s in executor._single}
    checked = []

    def check(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert same(steps[id(layer)](args[0]), out)
        checked.append(layer)

    for step in executor._single:
        step.layer.register_forward_hook(check)  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    supernet.set_config(supernet.space.sample(rng))
    for step in executor._single:
        step.freeze()
    with torch.no_grad():
        supernet(x)
    assert len(checked) + len(executor.simulated) >= len(supernet.layers)


# -- BN ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [True, False])
def test_recalibrated_statistics_are_those_of_the_simulation(
    cnn: nn.Sequential, images: Callable[..., Tensor], traced: bool
) -> None:
    batches = [images(8, seed=s) for s in range(3)]
    supernet = supernet_of(cnn, batches[0], bits=[2, 3, 4])
    executor = IntegerSupernet(supernet)
    if not traced:
        executor._graph = None
    norms = [m for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]
    rng = np.random.default_rng(0)
    for _ in range(4):
        supernet.set_config(supernet.space.sample(rng))
        supernet.recalibrate_bn(batches)
        expected = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]  # type: ignore[union-attr]
        executor.recalibrate_bn(batches)
        for norm, (mean, var) in zip(norms, expected, strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert torch.allclose(norm.running_var, var, rtol=1e-4)
            assert bool(((norm.running_mean - mean).abs() <= 1e-4 * var.sqrt()).all())
            assert int(norm.num_batches_tracked) == 3  # type: ignore[arg-type]
        assert [(m.training, m.momentum) for m in norms] == [(False, 0.1)] * 3


def test_a_frozen_network_has_the_statistics_of_when_it_was_frozen(
    cnn: nn.Sequential, images: Callable[..., Tensor]
) -> None:
    x = images(4)
    supernet = supernet_of(cnn, x)
    executor = IntegerSupernet(supernet)
    before = executor.freeze()(x).clone()
    supernet.recalibrate_bn([3 * x])
    assert torch.equal(executor.freeze()(x), before) is False
    supernet.recalibrate_bn([x])
    assert same(executor.freeze()(x), before)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_failure_leaves_the_layers_as_they_were(cnn: nn.Sequential, images: Callable[..., Tensor]) -> None:
    x = images(4)
    supernet = supernet_of(cnn, x)
    executor = IntegerSupernet(supernet)
    with pytest.raises(RuntimeError), executor.layer_by_layer():
        supernet(x[:, :2])
    assert not any("forward" in layer.__dict__ for layer in supernet.layers.values())


def test_floating_point_has_no_integers(cnn: nn.Sequential, images: Callable[..., Tensor]) -> None:
    supernet = supernet_of(cnn, images(4))
    executor = IntegerSupernet(supernet)
    supernet.set_config(None)
    with pytest.raises(ValueError, match="quantization is off"):
        executor.freeze()
    with pytest.raises(ValueError, match="quantization is off"):
        executor.recalibrate_bn([images(4)])


def test_other_devices_are_refused(cnn: nn.Sequential, images: Callable[..., Tensor]) -> None:
    supernet = supernet_of(cnn, images(4)).to("meta")
    with pytest.raises(ValueError, match="CPU only"):
        IntegerSupernet(supernet)


def test_configs_share_packed_weights(cnn: nn.Sequential, images: Callable[..., Tensor]) -> None:
    supernet = supernet_of(cnn, images(4))
    executor = IntegerSupernet(supernet)
    executor.freeze()
    before = executor.cache.num_bytes
    assert before == sum(w.numel() for w in supernet.latent_weights().values())
    name = list(supernet.layers)[1]
    changed = {**supernet.space.largest(), name: LayerConfig(QuantFormat(3), QuantFormat(3))}
    supernet.set_config(QuantConfig(changed))
    executor.freeze()
    assert executor.cache.num_bytes - before == supernet.layers[name].latent_weight.numel()


def test_looking_for_kernels_leaves_random_numbers_alone():
    """A run whose settings ask for it would otherwise start from other weights."""
    before = torch.get_rng_state()
    assert kernels_available.__wrapped__() == kernels_available()
    assert torch.equal(torch.get_rng_state(), before)
