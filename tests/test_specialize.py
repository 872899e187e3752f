"""Specialization: what the target does not execute is gone, what it executes stays as trained, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eqnet.nn.functional import quantize
from eqnet.nn.integer import dequantize_codes, input_grid, kernels_available, quantize_codes
from eqnet.nn.integer_supernet import IntegerSupernet
from eqnet.nn.layers import QuantizedLayer
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.nn.specialize import specialize
from eqnet.nn.supernet import Supernet
from eqnet.space import LayerInfo, QuantConfig, QuantFormat, Slot
from eqnet.space.hardware import HardwareTarget, load_target, target_names

SIZE = (3, 8, 8)
PLAIN = ["generic", "onnxruntime-x86", "onnxruntime-arm"]  # ask for no rule that changes values
INT8 = QuantFormat(8)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def supernet(images: Tensor) -> Supernet:
    """Every layer takes every format; calibrated, in eval mode; not to be changed."""
    return calibrated(images, fixed="none")


def calibrated(images: Tensor, **choices: object) -> Supernet:
    """Dense, depthwise, pointwise convolutions and a linear layer, with signed and unsigned inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 40, 1, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(40 * 64, 5),
    )
    net = Supernet.from_model(model, SIZE, **choices).eval()
    net.calibrate(images)
    net.recalibrate_bn([images])
    return net


def slots(net: Supernet) -> Iterator[tuple[LayerInfo, Slot, ElasticQuantizer]]:
    for name, layer in net.layers.items():
        yield net.space.info(name), "weight", layer.weight_quantizer
        if layer.act_quantizer is not None:
            yield net.space.info(name), "act", layer.act_quantizer


def step(quantizer: ElasticQuantizer, fmt: QuantFormat) -> Tensor:
    return quantizer.scale.detach()[quantizer.index[quantizer.rows[fmt]]]


def is_power_of_two(values: Tensor) -> bool:
    return bool((torch.frexp(values)[0] == 0.5).all())


def random_configs(net: Supernet, n: int) -> list[QuantConfig]:
    rng = np.random.default_rng(0)
    return [net.space.sample(rng) for _ in range(n)]


def target_with(base: str, **changes: object) -> HardwareTarget:
    """A built-in target with other values in every rule of activations ("act_...") or weights ("weight_...")."""
    data = load_target(base).model_dump(mode="json")
    for rules in data["ops"].values():
        for key, value in changes.items():
            slot, _, name = key.partition("_")
            for rule in rules[slot]:
                rule[name] = value
    return HardwareTarget.model_validate_json(json.dumps(data))


# -- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", target_names())
def test_codes_stay_in_the_range_of_the_target(supernet: Supernet, images: Tensor, name: str) -> None:
    target = load_target(name)
    special = specialize(supernet, target)
    for config in [special.space.largest(), special.space.smallest(), *random_configs(special, 3)]:
        assert target.check(config, special.space.layers) == []
        special.set_config(config)
        special(images)
        for info, slot, quantizer in slots(special):
            signed = bool(quantizer.signed)
            low, high = target.code_range(info, slot, quantizer.format, signed or slot == "weight")
            x = special.layers[info.name].float_weight if slot == "weight" else 100 * torch.randn(999).abs()
            x = torch.cat([-100 * x.flatten().abs(), 100 * x.flatten().abs()]) if slot == "act" else 1e3 * x
            codes, _, _ = quantizer.quantize(x)
            assert (int(codes.min()), int(codes.max())) == (low, high)


def test_a_narrow_range_only_clips(supernet: Supernet) -> None:
    special = specialize(supernet, load_target("openvino-cpu"))
    for (info, slot, before), (_, _, after) in zip(slots(supernet), slots(special), strict=True):
        assert torch.equal(before.scale, after.scale)
        for fmt in special.space.choices(info.name, slot):
            narrow = slot == "weight" and fmt.bits == 8
            changed = before.ranges[:, before.rows[fmt]] != after.ranges[:, after.rows[fmt]]
            assert changed.any() == narrow
            if narrow:
                assert after.ranges[1, after.rows[fmt]].tolist() == [-127, 127]


@pytest.mark.parametrize(("name", "weights"), [("vitis-ai", True), ("imx500", False)])
def test_step_sizes_are_powers_of_two_near_the_trained_ones(supernet: Supernet, name: str, weights: bool) -> None:
    special = specialize(supernet, load_target(name))
    for (info, slot, before), (_, _, after) in zip(slots(supernet), slots(special), strict=True):
        for fmt in special.space.choices(info.name, slot):
            old, new = step(before, fmt), step(after, fmt)
            if slot == "weight" and not weights:
                assert torch.equal(old, new)
                continue
            assert is_power_of_two(new)
            if name == "vitis-ai" and slot == "act" and not before.signed:
                old = step(before, QuantFormat(7))  # half of the codes is unused
            ratio = new / old
            bound = 2.0 if slot == "weight" else 2**0.5 * (1 + 1e-6)
            assert bool((ratio < bound).all())
            assert bool((ratio > 1 / bound).all())


def test_weights_take_the_power_of_less_error(supernet: Supernet) -> None:
    special = specialize(supernet, target_with("vitis-ai", weight_granularity=["tensor", "channel"]))
    for name, layer in special.layers.items():
        weight, trained = layer.float_weight.detach(), supernet.layers[name].weight_quantizer
        for fmt in special.space.choices(name, "weight"):
            layer.weight_quantizer.select(fmt)
            chosen, zero, low, high = layer.weight_quantizer.qparams()
            grown = chosen > step(trained, fmt).view_as(chosen)
            errors = []
            for scale in (chosen, torch.where(grown, chosen / 2, 2 * chosen)):
                codes, s, _ = quantize(weight, scale, zero, low, high)
                square = (codes * s - weight).square().flatten(1).sum(1)
                errors.append(square if fmt.granularity == "channel" else square.sum())
            assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all()), (name, fmt)


def test_unsigned_inputs_of_a_signed_target_take_the_step_of_one_bit_less(supernet: Supernet) -> None:
    special, kinds = specialize(supernet, load_target("tensorrt")), set()
    for (_, slot, before), (_, _, after) in zip(slots(supernet), slots(special), strict=True):
        if slot == "act":
            kinds.add(signed := bool(before.signed))
            assert torch.equal(step(after, INT8), step(before, INT8 if signed else QuantFormat(7)))
            assert after.ranges[int(signed), after.rows[INT8]].tolist() == [-128, 127]
            before.select(INT8 if signed else QuantFormat(7))
            after.select(INT8)
            x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 200 * float(step(after, INT8)[0])
            assert torch.equal(before(x), after(x)), "the values of 7 unsigned bits"
    assert kinds == {True, False}


def test_without_a_narrower_format_the_step_doubles(images: Tensor) -> None:
    net = calibrated(images, bits=[4, 8])
    special = specialize(net, load_target("tensorrt"))
    unsigned = [
        (a, b) for (_, s, a), (_, _, b) in zip(slots(net), slots(special), strict=True) if s == "act" and not a.signed
    ]
    assert unsigned
    for before, after in unsigned:
        assert torch.equal(step(after, INT8), 2 * step(before, INT8))


def test_every_width_takes_the_trained_step_of_the_next_one(supernet: Supernet) -> None:
    """On a target that packs signed codes, no width has a spare bit."""
    target = target_with("tensorrt", act_bits=[3, 4, 5, 8], act_container="packed")
    special = specialize(supernet, target)
    for (_, slot, before), (_, _, after) in zip(slots(supernet), slots(special), strict=True):
        if slot == "act" and not before.signed and len(before.rows) > 2:
            for bits in (3, 4, 5, 8):
                assert torch.equal(step(after, QuantFormat(bits)), step(before, QuantFormat(bits - 1)))


# -- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_a_target_without_such_rules_changes_nothing(supernet: Supernet, images: Tensor, name: str) -> None:
    special = specialize(supernet, load_target(name))
    assert all(torch.equal(t, special.state_dict()[k]) for k, t in supernet.state_dict().items())
    for config in random_configs(special, 3):
        special.set_config(config)
        supernet.set_config(config)
        assert torch.equal(special(images), supernet(images))


@pytest.mark.parametrize("name", target_names())
def test_specializing_leaves_the_supernet_and_twice_is_once(supernet: Supernet, images: Tensor, name: str) -> None:
    before = copy.deepcopy(supernet.state_dict())
    ranges = [q.ranges.clone() for _, q in supernet.quantizers()]
    target = load_target(name)
    once = specialize(supernet, target)
    twice = specialize(once, target)
    assert all(torch.equal(t, supernet.state_dict()[k]) for k, t in before.items())
    assert all(torch.equal(r, q.ranges) for r, (_, q) in zip(ranges, supernet.quantizers(), strict=True))
    assert once.space == twice.space == target.restrict(supernet.space)
    assert all(torch.equal(t, twice.state_dict()[k]) for k, t in once.state_dict().items())
    for (_, a), (_, b) in zip(once.quantizers(), twice.quantizers(), strict=True):
        assert torch.equal(a.ranges, b.ranges)


@pytest.mark.parametrize("name", ["tensorrt", "vitis-ai", "openvino-cpu", "imx500"])
def test_extracted_codes_are_those_of_the_target(supernet: Supernet, images: Tensor, name: str) -> None:
    target = load_target(name)
    special = specialize(supernet, target)
    (config,) = random_configs(special, 1)
    special.set_config(config)
    special.recalibrate_bn([images])
    subnet = special.extract()
    assert torch.equal(subnet(images), special(images))
    for layer_name, module in subnet.named_modules():
        if not isinstance(module, QuantizedLayer):
            continue
        info, layer = special.space.info(layer_name), config[layer_name]
        low, high = target.code_range(info, "weight", layer.weight)
        assert low <= int(module.weight_codes.min()) <= int(module.weight_codes.max()) <= high
        assert layer.act is not None
        signed = bool(special.layers[layer_name].act_quantizer.signed)  # type: ignore[union-attr]
        assert (int(module.act_qmin), int(module.act_qmax)) == target.code_range(info, "act", layer.act, signed)
        if target.act_rule(info, layer.act).power_of_two:
            assert is_power_of_two(module.act_scale)  # type: ignore[arg-type]
        if target.weight_rule(info, layer.weight).power_of_two:
            assert is_power_of_two(module.weight_scale)


@pytest.mark.parametrize("name", ["tensorrt", "vitis-ai", "qualcomm-dsp"])
def test_integer_inputs_have_the_values_of_the_simulation(supernet: Supernet, name: str) -> None:
    special = specialize(supernet, load_target(name))
    for _, slot, quantizer in slots(special):
        if slot == "act":
            x = torch.randn(999, generator=torch.Generator().manual_seed(0)) * 100 * float(quantizer.qparams()[0])
            grid = input_grid(quantizer)
            codes = quantize_codes(x, grid)
            assert torch.equal(dequantize_codes(codes, grid), quantizer(x))


@pytest.mark.skipif(not kernels_available(), reason="this CPU has no integer kernels")
@pytest.mark.parametrize("name", ["tensorrt", "vitis-ai", "openvino-cpu"])
def test_integer_execution_agrees(supernet: Supernet, images: Tensor, name: str) -> None:
    special = specialize(supernet, load_target(name))
    integer = IntegerSupernet(special)
    for config in random_configs(special, 2):
        special.set_config(config)
        special.recalibrate_bn([images])
        expected, got = special(images), integer.freeze()(images)
        assert float((got - expected).abs().max()) <= 0.05 * float(expected.std())


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_space_with_nothing_left_names_layer_and_rule(images: Tensor) -> None:
    net = calibrated(images, bits=[4])
    with pytest.raises(ValueError, match=r"layer '3': tensorrt does not run 4-bit activations"):
        specialize(net, load_target("tensorrt"))


def test_an_uncalibrated_supernet_is_refused() -> None:
    net = Supernet.from_model(nn.Sequential(nn.Linear(4, 3)), (4,))
    with pytest.raises(ValueError, match="not calibrated"):
        specialize(net, load_target("generic"))
