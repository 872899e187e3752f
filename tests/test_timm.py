"""Any timm model: conversion, one training step, configs, exact extraction, JSON.

Random weights; no download. By default the two largest models run with fewer blocks, and all models are converted at full
size on the meta device; `-m slow` runs every model at full size and calibrates it.
"""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from eqnet.nn.functional import code_range
from eqnet.nn.supernet import LAYER_TYPES, Supernet, recalibrate_bn
from eqnet.settings import TrainSettings
from eqnet.space import QuantConfig, QuantSpace, SandwichSampler
from eqnet.training.step import supernet_step

FULL: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": {},
    "mobilenetv2_100": {},
    "mobilenetv3_large_100": {},
    "mobilenetv4_conv_small": {},
    "efficientnet_b0": {},
    "regnety_002": {},
    "convnext_atto": {},
    "nf_resnet26": {},
    "deit_tiny_patch16_224": {"img_size": 32},
    "vit_tiny_patch16_224": {"img_size": 32},
    "swinv2_tiny_window8_256": {"img_size": 64},
    "beit_base_patch16_224": {"img_size": 32},
}
SMALLER: dict[str, dict[str, Any]] = {  # what the default run changes
    "swinv2_tiny_window8_256": {"embed_dim": 24, "depths": (1, 2, 1, 1)},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3},
}
READ_DIRECTLY = {"swinv2_tiny_window8_256": "attn.qkv", "beit_base_patch16_224": "attn.qkv"}
NUM_CLASSES = 10


def build(name: str, full: bool) -> tuple[nn.Module, tuple[int, int, int]]:
    """A randomly initialised model in which every layer matters, and a small input size."""
    kwargs = {**FULL[name], **({} if full else SMALLER.get(name, {}))}
    model = timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
    with torch.no_grad():
        for key, p in model.named_parameters():
            is_gain = p.numel() == max(p.shape, default=1) and not key.endswith("bias")
            if is_gain:  # those of the last norm or convolution of a block may start at 0, which switches it off
                p.uniform_(0.5, 1.5)
    side = kwargs.get("img_size", 64)
    return model, (3, side, side)


def fill_tables(supernet: Supernet, x: Tensor) -> None:
    """Tables as a trained checkpoint may have them: weights by their spread, zero points near the middle, inputs calibrated."""
    generator = torch.Generator().manual_seed(0)
    for layer in supernet.layers.values():
        quantizer, spread = layer.weight_quantizer, float(layer.float_weight.detach().std())
        for row, fmt in enumerate(quantizer.formats):
            step = (1.3, 0.4, 0.02)[[2, 4, 8].index(fmt.bits)] * spread
            entries = quantizer.index[row].unique()
            quantizer.scale.data[entries] = step * (0.8 + 0.4 * torch.rand(len(entries), generator=generator))
            if not fmt.symmetric:
                zeros = torch.randint(-1, 1, (len(entries),), generator=generator)
                quantizer.zero_point.data[entries] = zeros.float()

    def calibrate(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer.act_quantizer is not None:
            layer.act_quantizer.calibrate(args[0])

    hooks = [layer.register_forward_pre_hook(calibrate) for layer in supernet.layers.values()]
    with torch.no_grad():
        supernet.train()(x)
    for hook in hooks:
        hook.remove()


def images(n: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed))


def check_step(supernet: Supernet, size: tuple[int, int, int]) -> None:
    """One step: finite parts and gradients; every weight and the rows of the largest subnet are trained, no idle row."""
    accelerator = Accelerator(cpu=True)
    supernet.train()
    rng = np.random.default_rng(0)
    configs = SandwichSampler(supernet.space).sample(rng)
    model = accelerator.prepare(supernet)
    labels = torch.tensor([3, 7])
    parts = supernet_step(
        accelerator, model, supernet, images(2, size), labels, configs, nn.CrossEntropyLoss(), TrainSettings()
    )
    assert all(value.isfinite() for value in parts.values())
    for name, p in supernet.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    for name, weight in supernet.latent_weights().items():
        assert weight.grad.any(), name
    for name, quantizer in supernet.quantizers():
        layer, slot = name.rsplit(".", 1)
        if not quantizer.scale.requires_grad:  # that of the image is calibrated, not learned
            assert supernet.space.info(layer).reads_images
            continue
        rows = [quantizer.rows[getattr(config[layer], slot)] for config in configs]
        trained = set(quantizer.scale.grad.nonzero().flatten().tolist())
        assert trained <= set(quantizer.index[rows].flatten().tolist()), name
        # an untrained 2-bit subnet may round all of a layer's input to zero, the largest one never does
        assert trained & set(quantizer.index[rows[0]].tolist()), name
    supernet.zero_grad()


def check_extraction(supernet: Supernet, size: tuple[int, int, int]) -> None:
    """Two random configs: equal outputs, integer codes in range, JSON round trips of config and space."""
    space = QuantSpace.from_json(supernet.space.to_json())
    assert space == supernet.space
    supernet.eval()
    x = images(2, size, seed=1)
    outputs = []
    for seed in (1, 2):
        config = space.sample(np.random.default_rng(seed))
        assert QuantConfig.from_json(config.to_json()) == config
        supernet.set_config(config)
        recalibrate_bn(supernet, [images(2, size, seed=2)])
        with torch.no_grad():
            outputs.append(supernet(x))
            subnet = supernet.extract()
            assert torch.equal(subnet(x), outputs[-1])
        assert outputs[-1].isfinite().all()
        for name, chosen in config.items():
            codes = subnet.get_submodule(name).weight_codes
            assert codes.dtype == torch.int8
            low, high = code_range(chosen.weight.bits, signed=True)
            assert low <= codes.min()
            assert codes.max() <= high
    assert not torch.equal(*outputs)


def check_model(name: str, full: bool) -> None:
    model, size = build(name, full)
    state = {k: v.shape for k, v in model.state_dict().items()}
    reference = model.eval()(images(1, size)).detach() if name not in READ_DIRECTLY else None
    supernet = Supernet.from_model(model, size, bits=[2, 4, 8])
    converted = supernet.model.state_dict()
    assert all(converted[k].shape == shape for k, shape in state.items())
    if reference is not None:
        supernet.eval().set_config(None)
        assert torch.equal(supernet(images(1, size)), reference)
    if full:
        supernet.calibrate(images(2, size))
    else:
        fill_tables(supernet, images(2, size))
    check_step(supernet, size)
    check_extraction(supernet, size)


@pytest.mark.parametrize("name", FULL)
def test_model_trains_one_step_and_extracts_exactly(name):
    check_model(name, full=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_model_calibrates_trains_one_step_and_extracts_exactly(name):
    check_model(name, full=True)


@pytest.mark.parametrize("name", FULL)
def test_full_size_model_is_covered_and_takes_configs_on_the_meta_device(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, LAYER_TYPES)]
    matrices = {n for n, p in model.named_parameters() if sum(d > 1 for d in p.shape) > 1}
    size = model.pretrained_cfg["input_size"]
    supernet = Supernet.from_model(model, size)
    assert set(supernet.layers) == set(layers)
    # every matrix is quantized or reported
    assert matrices == {f"{n}.weight" for n in layers} | set(supernet.uncovered)
    assert all(".attn." in n or "embed" in n or "token" in n for n in supernet.uncovered)
    space = supernet.space
    assert all(space.info(n).macs > 0 for n in layers)
    unread = {n for n in layers if space.info(n).calls == 0}
    assert unread == {n for n in layers if name in READ_DIRECTLY and READ_DIRECTLY[name] in n}
    for config in (space.smallest(), space.sample(np.random.default_rng(0)), None):
        supernet.set_config(config)
        assert supernet(torch.empty(2, *size, device="meta")).shape == (2, 1000)
    config = space.sample(np.random.default_rng(1))
    assert QuantConfig.from_json(config.to_json()) == config
    assert QuantSpace.from_json(space.to_json()) == space
