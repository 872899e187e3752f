"""The supernet: tracing, conversion, configs, calibration, BN statistics, extraction."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqnet.nn.functional import code_range
from eqnet.nn.supernet import Supernet, count_float_numel, recalibrate_bn, trace_layers
from eqnet.space import LayerConfig, QuantConfig, QuantFormat, QuantSpace

SIZE = (3, 8, 8)
Images = Callable[..., Tensor]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def supernet(cnn: nn.Sequential, images: Images) -> Supernet:
    """Calibrated, with BN statistics of its own, in eval mode."""
    net = Supernet.from_model(cnn, SIZE, bits=[2, 4, 8])
    net.calibrate(images(16))
    recalibrate_bn(net, [images(16)])
    return net.eval()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


# -- tracing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "giga_macs", "signed"),
    [
        ("resnet18", 21, 1.814, 1),
        ("resnet50", 54, 4.089, 1),
        ("mobilenetv2_100", 53, 0.3008, 18),
        ("efficientnet_b0", 82, 0.3858, None),
    ],
)
def test_published_layer_counts_macs_and_signed_inputs(name, layers, giga_macs, signed):
    traced = trace_layers(timm.create_model(name), (3, 224, 224))
    assert len(traced) == layers
    assert sum(layer.macs for layer in traced) / 1e9 == pytest.approx(giga_macs, rel=3e-4)
    assert all(layer.calls == 1 for layer in traced)
    if signed is not None:
        assert sum(layer.signed_input for layer in traced) == signed


def test_meta_device_gives_the_same_facts_but_for_signs():
    model = timm.create_model("resnet18")
    facts = trace_layers(model, SIZE_224 := (3, 224, 224))
    on_meta = trace_layers(model.to("meta"), SIZE_224)
    drop = "signed_input"
    assert [{k: v for k, v in a.to_json().items() if k != drop} for a in facts] == [
        {k: v for k, v in a.to_json().items() if k != drop} for a in on_meta
    ]
    assert all(layer.signed_input for layer in on_meta)


def traced_alone(layer: nn.Module, size: tuple[int, ...]) -> tuple[int, int, int]:
    (info,) = trace_layers(nn.Sequential(layer), size)
    return info.macs, info.act_numel, info.channels


@pytest.mark.parametrize(
    ("layer", "size", "macs", "channels"),
    [
        (nn.Linear(6, 5), (6,), 6 * 5, 5),
        (nn.Linear(6, 5), (7, 6), 7 * 6 * 5, 5),
        (nn.Conv1d(4, 6, 3), (4, 10), 8 * 6 * 4 * 3, 6),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 10), 8 * 6 * 2 * 3, 6),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 9, 9), 25 * 8 * 3 * 9, 8),
        (nn.Conv2d(8, 8, 3, groups=8), (8, 5, 5), 9 * 8 * 9, 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 25 * 4 * 6 * 4, 6),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 5, 5), 25 * 4 * 3 * 4, 3),
    ],
)
def test_macs_of_single_layers_by_hand(layer, size, macs, channels):
    numel = int(np.prod(size))
    assert traced_alone(layer, size) == (macs, numel, channels)


class Twice(nn.Module):
    """One convolution called at two resolutions, one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(F.max_pool2d(self.conv(x), 2).flatten(1))


def test_a_layer_called_twice_counts_both_calls():
    conv, fc = trace_layers(Twice(), SIZE)
    assert (conv.calls, fc.calls) == (2, 1)
    assert conv.macs == (64 + 16) * 3 * 3 * 9
    assert conv.act_numel == 3 * (64 + 16)
    assert conv.signed_input


class Direct(nn.Module):
    """Reads the weight of `qkv` without calling it, as swinv2 and beit do; `never` is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.conv = nn.Linear(8, 6), nn.Conv2d(3, 3, 1, bias=False)
        self.never, self.head = nn.Linear(3, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight)
        return self.head(F.linear(input=x, weight=self.qkv.weight, bias=self.qkv.bias).mean((1, 2)))


def test_directly_read_layers_have_macs_but_no_input():
    layers = {layer.name: layer for layer in trace_layers(Direct(), SIZE)}
    assert next(iter(layers)) == "head"  # layers that are never called come last
    assert {n: layer.calls for n, layer in layers.items()} == {"head": 1, "qkv": 0, "conv": 0, "never": 0}
    assert {n: layer.macs for n, layer in layers.items()} == {
        "head": 12,
        "qkv": 3 * 8 * 8 * 6,
        "conv": 64 * 9,
        "never": 0,
    }
    assert layers["qkv"].act_numel == 0
    space = QuantSpace.from_layers(list(layers.values()), fixed="none")
    config = space.largest()
    assert config["qkv"].act is None
    assert config["head"].act is not None


def test_layers_come_in_order_of_execution():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    assert [layer.name for layer in trace_layers(Reversed(), (3,))] == ["first", "last"]


def test_tracing_leaves_the_model_and_the_random_state_alone(cnn):
    before, state = snapshot(cnn), torch.get_rng_state()
    cnn.train()
    trace_layers(cnn, SIZE)
    assert same(cnn, before)
    assert cnn.training
    assert not any(m._forward_hooks for m in cnn.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_models_without_layers_and_wrong_input_sizes_are_refused(cnn):
    with pytest.raises(ValueError, match="no quantizable layer"):
        trace_layers(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), SIZE)
    for size in ((4, 8, 8), (3, 16, 16), (3, 8)):
        with pytest.raises(ValueError, match=r"input of size"):
            trace_layers(cnn, size)


def test_float_numel_is_everything_but_the_quantized_weights(cnn):
    layers = trace_layers(cnn, SIZE)
    biases, batch_norm = 6 + 5, 4 * (8 + 8 + 12)
    assert count_float_numel(cnn, layers) == biases + batch_norm


# -- conversion -------------------------------------------------------------------------------------------------------


def test_float_checkpoints_fit_before_and_after_conversion(cnn, images):
    state = snapshot(cnn)
    logits = copy.deepcopy(cnn).eval()(images())
    for p in cnn.parameters():
        p.data.zero_()
    supernet = Supernet.from_model(cnn, SIZE)
    assert set(state) <= set(supernet.model.state_dict())
    result = supernet.model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(k.rsplit(".", 2)[-2] in ("weight_quantizer", "act_quantizer") for k in result.missing_keys)
    supernet.set_config(None)
    assert torch.equal(supernet.eval()(images()), logits)


@pytest.mark.parametrize("training", [True, False])
def test_without_a_config_the_model_is_the_float_model(cnn, images, training):
    reference = copy.deepcopy(cnn).train(training)
    supernet = Supernet.from_model(cnn, SIZE).train(training)
    supernet.calibrate(images())
    supernet.set_config(None)
    x, y = images().requires_grad_(), images().requires_grad_()
    out, expected = supernet(x), reference(y)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for name, p in reference.named_parameters():
        assert torch.equal(supernet.model.get_parameter(name).grad, p.grad)


def test_layers_are_still_instances_of_their_types(supernet):
    assert all(isinstance(supernet.layers[n], nn.Conv2d) for n in ("0", "3", "5", "8"))
    assert isinstance(supernet.layers["10"], nn.Linear)
    assert list(supernet.latent_weights()) == ["0", "3", "5", "8", "10"]
    for name, weight in supernet.latent_weights().items():
        assert weight is dict(supernet.model.named_parameters())[f"{name}.weight"]


def test_tables_of_resnet18_have_the_entries_of_the_paper():
    """4 weight slots + 2 input slots x 7 bits: 14 sum(C) + 28 L = 81,788 step sizes with nothing pinned (the paper learns as
    many offsets as half of them besides: 122,682 entries)."""
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    supernet = Supernet.from_model(model, (3, 224, 224), fixed="none")
    assert sum(p.numel() for p in supernet.step_sizes()) == 81_788
    for name, quantizer in supernet.quantizers():
        assert len(quantizer.formats) == (28 if name.endswith("weight") else 14)


def test_step_size_parameters_are_all_that_is_added(cnn):
    before = {id(p) for p in cnn.parameters()}
    supernet = Supernet.from_model(cnn, SIZE)
    added = {id(p) for p in supernet.parameters() if p.requires_grad} - before
    tables = supernet.step_sizes()
    assert added == {id(p) for p in tables if p.requires_grad}
    image = next(iter(supernet.layers.values())).act_quantizer
    assert [id(p) for p in tables if not p.requires_grad] == [id(image.scale)]  # calibrated, not learned


def test_what_stays_in_float_is_listed():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 4, 6))
            self.embed, self.mix = nn.Linear(3, 6), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x) + self.position
            return self.mix(x, x, x)[0]

    supernet = Supernet.from_model(Tokens(), (4, 3))
    assert sorted(supernet.uncovered) == ["mix.in_proj_weight", "position"]
    assert set(supernet.layers) == {"embed", "mix.out_proj"}


def test_attention_modules_count_their_output_projection(images):
    """`nn.MultiheadAttention` reads its output projection; torchvision's transformers are built of it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Linear(3, 6), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.mix(x, x, x, need_weights=False)[0]

    layers = {layer.name: layer for layer in trace_layers(Attention(), (4, 3))}
    assert (layers["mix.out_proj"].macs, layers["mix.out_proj"].calls) == (4 * 6 * 6, 0)
    supernet = Supernet.from_model(Attention(), (4, 3), bits=[2, 8], fixed="none").eval()
    x = images(2, (4, 3))
    supernet.calibrate(x)
    for seed in range(3):
        supernet.set_config(supernet.space.sample(rng(seed)))
        subnet = supernet.extract()
        assert torch.equal(subnet(x), supernet(x))
        with torch.no_grad():  # another kernel of torch
            assert torch.equal(subnet(x), supernet(x))


def test_a_model_is_converted_once(cnn, images):
    supernet = Supernet.from_model(cnn, SIZE)
    for model in (supernet.model, supernet.extract()):
        with pytest.raises(ValueError, match="already"):
            Supernet(model, supernet.space)
    with pytest.raises(ValueError, match="already"):
        Supernet.from_model(cnn, SIZE)
    assert supernet(images()).isfinite().all()


@pytest.mark.parametrize("change", ["missing", "foreign", "other model", "other width"])
def test_a_space_of_another_model_is_refused(cnn, change):
    layers = trace_layers(cnn, SIZE)
    if change == "missing":
        layers = layers[1:]
    elif change == "foreign":
        layers = [*layers, *trace_layers(Twice(), SIZE)[1:]]
    elif change == "other width":
        layers = [*layers[:-1], trace_layers(nn.Sequential(*cnn[:10], nn.Linear(96, 7)), SIZE)[-1]]
    else:
        layers = trace_layers(Twice(), SIZE)
    with pytest.raises(ValueError, match="does not belong to this model"):
        Supernet(cnn, QuantSpace.from_layers(layers))
    assert type(cnn[0]) is nn.Conv2d  # nothing was converted


# -- configs ----------------------------------------------------------------------------------------------------------


def test_setting_a_config_changes_outputs_but_no_stored_tensor(supernet, images):
    before = snapshot(supernet)
    outputs = []
    for config in (supernet.space.smallest(), supernet.space.sample(rng()), supernet.space.largest(), None):
        supernet.set_config(config)
        assert supernet.config == config
        outputs.append(supernet(images()))
    assert same(supernet, before)
    for i in range(4):
        assert not any(torch.equal(outputs[i], outputs[j]) for j in range(i))


def test_every_quantizer_takes_the_format_of_the_config(supernet):
    for seed in range(5):
        config = supernet.space.sample(rng(seed))
        supernet.set_config(config)
        for name, layer in supernet.layers.items():
            assert LayerConfig(layer.weight_quantizer.format, layer.act_quantizer.format) == config[name]


def test_only_the_tables_rows_of_the_config_are_trained(supernet, images):
    config = supernet.space.sample(rng(3))
    supernet.train().set_config(config)
    supernet(images(8)).square().sum().backward()
    for name, quantizer in supernet.quantizers():
        if not quantizer.scale.requires_grad:  # that of the image
            continue
        row = quantizer.rows[quantizer.format]
        assert set(quantizer.scale.grad.nonzero().flatten().tolist()) <= set(quantizer.index[row].tolist()), name
        assert quantizer.scale.grad.any(), name


def bad_configs(space: QuantSpace) -> dict[str, QuantConfig]:
    largest = space.largest()
    odd = QuantFormat(3)
    return {
        "missing": QuantConfig({n: c for n, c in largest.items() if n != "5"}),
        "foreign": QuantConfig({**largest, "extra": largest["5"]}),
        "weight bits": largest.replace({"5": LayerConfig(odd, largest["5"].act)}),
        "input bits": largest.replace({"5": LayerConfig(largest["5"].weight, odd)}),
        "float input": largest.replace({"5": LayerConfig(largest["5"].weight, None)}),
        "last layer": largest.replace({"10": LayerConfig(QuantFormat(4), largest["10"].act)}),
    }


@pytest.mark.parametrize("active", ["smallest", "none"])
@pytest.mark.parametrize("name", ["missing", "foreign", "weight bits", "input bits", "float input", "last layer"])
def test_a_config_outside_the_space_is_refused_and_the_active_one_kept(supernet, images, name, active):
    before = supernet.space.smallest() if active == "smallest" else None
    supernet.set_config(before)
    logits = supernet(images())
    layer = {"missing": "5", "foreign": "extra", "last layer": "10"}.get(name, "5")
    with pytest.raises(ValueError, match=layer):
        supernet.set_config(bad_configs(supernet.space)[name])
    assert supernet.config == before
    assert torch.equal(supernet(images()), logits)
    with pytest.raises(ValueError, match=layer):
        supernet.extract(bad_configs(supernet.space)[name])
    assert torch.equal(supernet(images()), logits)


def test_tied_layers_share_their_format(cnn, images):
    supernet = Supernet.from_model(cnn, SIZE, bits=[2, 4, 8], ties=[("3", "5")])
    supernet.calibrate(images())
    for seed in range(5):
        config = supernet.space.sample(rng(seed))
        assert config["3"] == config["5"]
        supernet.set_config(config)
    apart = config.replace({"3": LayerConfig(QuantFormat(2), config["3"].act)}).replace(
        {"5": LayerConfig(QuantFormat(4), config["5"].act)}
    )
    with pytest.raises(ValueError, match="tied"):
        supernet.set_config(apart)
    assert supernet.config == config


def test_layers_may_share_one_parameter(images):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu())

    x = images(6, (8,))
    supernet = Supernet.from_model(Shared(), (8,), bits=[2, 8], ties=[("a", "b")], fixed="none").eval()
    supernet.calibrate(x)
    weights = supernet.latent_weights()
    assert weights["a"] is weights["b"]
    assert supernet.uncovered == []
    for config in (supernet.space.smallest(), supernet.space.sample(rng())):
        supernet.set_config(config)
        assert torch.equal(supernet.layers["a"].weight, supernet.layers["b"].weight)
        assert torch.equal(supernet.extract()(x), supernet(x))


def test_a_copy_is_independent(supernet, images):
    config = supernet.space.sample(rng())
    supernet.set_config(config)
    logits = supernet(images())
    twin = copy.deepcopy(supernet)
    assert twin.config == config
    assert torch.equal(twin(images()), logits)
    for p in twin.parameters():
        p.data.add_(1)
    twin.set_config(supernet.space.smallest())
    recalibrate_bn(twin, [images(8, seed=5)])
    assert supernet.config == config
    assert torch.equal(supernet(images()), logits)
    assert twin.layers["0"] is not supernet.layers["0"]
    assert twin.layers["0"] is twin.model[0]
    twin.set_config(config)
    supernet.set_config(supernet.space.smallest())
    assert twin.layers["5"].weight_quantizer.format == config["5"].weight


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_leaves_bn_statistics_modes_and_the_config(cnn, images):
    supernet = Supernet.from_model(cnn, SIZE, bits=[2, 8])
    recalibrate_bn(supernet, [images(8)])
    supernet.train()
    supernet.model[1].eval()
    config = supernet.space.smallest()
    before = {k: v for k, v in snapshot(supernet).items() if "quantizer" not in k}
    modes = [m.training for m in supernet.modules()]
    for active in (config, None):
        supernet.set_config(active)
        supernet.calibrate(images(8, seed=1))
        assert supernet.config == active
        assert all(q.enabled == (active is not None) for _, q in supernet.quantizers())
    after = supernet.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [m.training for m in supernet.modules()] == modes


def test_calibration_does_not_depend_on_what_was_active_and_can_be_repeated(cnn, images):
    supernet = Supernet.from_model(cnn, SIZE, bits=[2, 8])
    assert not supernet.calibrated
    supernet.calibrate(images(8))
    assert supernet.calibrated
    first = snapshot(supernet)
    supernet.set_config(supernet.space.smallest())
    supernet.calibrate(images(8, seed=9))
    assert not same(supernet, first)
    supernet.calibrate(images(8))
    assert same(supernet, first)


def test_calibration_that_fails_leaves_the_supernet_usable(cnn, images):
    supernet = Supernet.from_model(cnn, SIZE, bits=[2, 8])
    supernet.calibrate(images(8))
    config = supernet.space.smallest()
    supernet.set_config(config)
    batch_norm = {k: v for k, v in snapshot(supernet).items() if "running" in k}
    with pytest.raises(RuntimeError):
        supernet.calibrate(images(8, (3, 16, 16)))
    assert supernet.config == config
    assert not any(q.observing for _, q in supernet.quantizers())
    assert all(torch.equal(supernet.state_dict()[k], v) for k, v in batch_norm.items())


def test_inputs_are_calibrated_behind_quantized_layers(cnn, images):
    """The second layer sees what the first one computes at 8 bits, and ReLU inputs become unsigned."""
    supernet = Supernet.from_model(cnn, SIZE, bits=[2, 8])
    supernet.calibrate(images(16))
    signs = {name: bool(layer.act_quantizer.signed) for name, layer in supernet.layers.items()}
    assert signs == {"0": True, "3": False, "5": True, "8": False, "10": True}
    supernet.set_config(supernet.space.largest())
    seen = {}
    hook = supernet.layers["3"].register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    supernet.train()(images(16))
    hook.remove()
    reference = copy.deepcopy(supernet.layers["3"].act_quantizer)
    reference.calibrate(seen["x"])
    torch.testing.assert_close(reference.scale, supernet.layers["3"].act_quantizer.scale)


def test_calibration_on_many_values_sees_every_channel():
    """4 million values are thinned; a plain stride of 2 would see the even channels of the last axis only."""
    x = torch.randn(256, 1024, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, ::2] *= 0.1
    supernet = Supernet.from_model(nn.Sequential(nn.Linear(16, 2)), (1024, 16), bits=[2], fixed="none").eval()
    supernet.calibrate(x)
    thinned = supernet.layers["0"].act_quantizer
    whole = copy.deepcopy(thinned)
    whole.calibrate(x)
    torch.testing.assert_close(thinned.scale, whole.scale, rtol=0.02, atol=0)
    whole.calibrate(x[:, :, ::2])
    assert (whole.scale < 0.5 * thinned.scale).all()


def test_a_layer_called_twice_is_calibrated_on_both_inputs(images):
    supernet = Supernet.from_model(Twice(), SIZE, bits=[8], symmetric=[True], fixed="none").eval()
    inputs = []
    hook = supernet.layers["conv"].register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten()))
    supernet.calibrate(images(4))
    hook.remove()
    assert len(inputs) == 2
    reference = copy.deepcopy(supernet.layers["conv"].act_quantizer)
    reference.calibrate(torch.cat(inputs))
    torch.testing.assert_close(reference.scale, supernet.layers["conv"].act_quantizer.scale)


def test_a_stored_supernet_needs_no_calibration(supernet, make_cnn, images, tmp_path):
    config = supernet.space.sample(rng())
    torch.save(supernet.state_dict(), tmp_path / "supernet.pt")
    other = Supernet(make_cnn(), QuantSpace.from_json(supernet.space.to_json())).eval()
    assert not other.calibrated
    other.load_state_dict(torch.load(tmp_path / "supernet.pt", weights_only=True))
    assert other.calibrated
    for c in (config, supernet.space.smallest()):
        supernet.set_config(c)
        other.set_config(QuantConfig.from_json(c.to_json()))
        assert torch.equal(other(images()), supernet(images()))


# -- BN statistics ----------------------------------------------------------------------------------------------------


def bn_layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_bn_statistics_are_the_exact_average_over_the_batches(supernet, images):
    batches = [images(8, seed=s) * (1 + s) + s for s in range(4)]
    supernet.set_config(supernet.space.smallest())
    recalibrate_bn(supernet, batches)
    for m in bn_layers(supernet).values():
        seen: list[Tensor] = []
        hook = m.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach().double()))
        with torch.no_grad():
            for b in batches:  # each BN layer normalises with the batch's own statistics
                twin_modes(supernet, b)
        hook.remove()
        means = torch.stack([x.mean((0, 2, 3)) for x in seen])
        variances = torch.stack([x.var((0, 2, 3), unbiased=True) for x in seen])
        torch.testing.assert_close(m.running_mean.double(), means.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m.running_var.double(), variances.mean(0), rtol=1e-4, atol=1e-5)


def twin_modes(supernet: Supernet, x: Tensor) -> None:
    """Runs a batch with BN in train mode, without moving its statistics."""
    layers = list(bn_layers(supernet).values())
    saved = [m.momentum for m in layers]
    supernet.train()
    for m in layers:
        m.momentum = 0.0
    supernet(x)
    for m, momentum in zip(layers, saved, strict=True):
        m.momentum = momentum
    supernet.eval()


def statistics(supernet: Supernet) -> list[Tensor]:
    return [t.clone() for m in bn_layers(supernet).values() for t in (m.running_mean, m.running_var)]


def test_bn_statistics_do_not_depend_on_the_config_before_and_are_deterministic(supernet, images):
    batches = [images(8, seed=s) for s in range(3)]
    config = supernet.space.sample(rng())
    results = []
    for earlier in (supernet.space.largest(), supernet.space.smallest(), None):
        supernet.set_config(earlier)
        recalibrate_bn(supernet, [10 * images(8, seed=7)])
        supernet.set_config(config)
        supernet.recalibrate_bn(batches)
        results.append((statistics(supernet), supernet(images())))
    for stats, logits in results[1:]:
        assert torch.equal(logits, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(stats, results[0][0], strict=True))


def test_skipping_recalibration_changes_outputs_visibly(supernet, images):
    batches = [images(16, seed=s) for s in range(3)]
    supernet.set_config(supernet.space.largest())
    recalibrate_bn(supernet, batches)
    supernet.set_config(supernet.space.smallest())
    stale = supernet(images(32))
    recalibrate_bn(supernet, batches)
    fresh = supernet(images(32))
    assert (stale - fresh).norm() > 0.05 * fresh.norm()


def test_recalibration_restores_modes_and_momenta_and_trains_nothing(supernet, images):
    supernet.train()
    layers = list(bn_layers(supernet).values())
    layers[0].momentum, layers[1].momentum = 0.3, None
    layers[1].eval()
    modes = [m.training for m in supernet.modules()]
    before = {k: v for k, v in snapshot(supernet).items() if "running" not in k and "tracked" not in k}
    recalibrate_bn(supernet, [images()])
    assert [m.momentum for m in layers] == [0.3, None, 0.1]
    assert [m.training for m in supernet.modules()] == modes
    assert all(torch.equal(supernet.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(RuntimeError):
        recalibrate_bn(supernet, [images(4, (3, 16, 16))])
    assert [m.momentum for m in layers] == [0.3, None, 0.1]
    assert [m.training for m in supernet.modules()] == modes


def test_recalibration_without_a_batch_is_refused(supernet, images):
    batches = (images(seed=s) for s in range(2))
    recalibrate_bn(supernet, batches)
    with pytest.raises(ValueError, match="no batch"):
        recalibrate_bn(supernet, batches)  # has run out


def test_dropout_stays_off_while_bn_is_recalibrated(images):
    model = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    recalibrate_bn(model, [images()])
    expected = model[1](images()).mean((0, 2, 3))
    torch.testing.assert_close(model[2].running_mean, expected)


def test_models_without_bn_are_left_alone(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    before = snapshot(model)
    recalibrate_bn(model, [images()])
    assert same(model, before)


# -- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_an_extracted_subnet_equals_the_supernet_exactly(supernet, images, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, q in supernet.quantizers():  # step sizes as after training
        q.scale.data.mul_(1 + 0.1 * torch.randn(q.scale.shape, generator=generator))
    config = supernet.space.sample(rng(seed))
    supernet.set_config(config)
    recalibrate_bn(supernet, [images(8)])
    expected = supernet(images(8, seed=2))
    supernet.set_config(None)
    subnet = supernet.extract(config)
    assert supernet.config is None
    assert torch.equal(subnet(images(8, seed=2)), expected)
    assert not subnet.training


def test_an_extracted_subnet_stores_integer_codes_and_no_latent_weight(supernet):
    for config in (supernet.space.smallest(), supernet.space.sample(rng()), supernet.space.largest()):
        subnet = supernet.extract(config)
        trained = dict(subnet.named_parameters())
        assert not any(n.endswith(".weight") and p.ndim > 1 for n, p in trained.items())
        for name, c in config.items():
            layer = subnet.get_submodule(name)
            assert layer.weight_codes.dtype == torch.int8
            assert layer.weight_codes.shape == supernet.latent_weights()[name].shape
            low, high = code_range(c.weight.bits, signed=True)
            assert low <= layer.weight_codes.min()
            assert layer.weight_codes.max() <= high
            assert low <= layer.weight_zero_point.min() <= layer.weight_zero_point.max() <= high
            if c.weight.symmetric:
                assert not layer.weight_zero_point.any()
            qmin, qmax = int(layer.act_qmin), int(layer.act_qmax)
            assert qmax - qmin + 1 == 2**c.act.bits
            assert qmin <= int(layer.act_zero_point) <= qmax
            assert not c.act.symmetric or int(layer.act_zero_point) == 0


def test_an_extracted_subnet_is_independent_of_the_supernet(supernet, images):
    subnet = supernet.extract(supernet.space.smallest())
    expected = subnet(images())
    for t in supernet.state_dict().values():
        t.zero_()
    assert torch.equal(subnet(images()), expected)


def test_an_extracted_subnet_can_be_stored_and_copied(supernet, images):
    subnet = supernet.extract(supernet.space.sample(rng()))
    twin = copy.deepcopy(subnet)
    for b in twin.buffers():
        b.zero_()
    twin.load_state_dict(subnet.state_dict())
    assert torch.equal(twin(images()), subnet(images()))


def test_extraction_needs_a_config(supernet, images):
    config = supernet.space.sample(rng())
    supernet.set_config(config)
    assert torch.equal(supernet.extract()(images()), supernet(images()))
    supernet.set_config(None)
    with pytest.raises(ValueError, match="config"):
        supernet.extract()


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), (4, 12)),
    "conv_transpose": (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5)),
    "grouped conv_transpose": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    "dilated conv": (nn.Conv2d(4, 6, 3, dilation=2, padding="same", padding_mode="circular"), (4, 6, 6)),
    "linear on tokens": (nn.Linear(12, 6), (4, 12)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_quantized_per_output_channel_and_extracted_exactly(name, images):
    layer, size = LAYERS[name]
    x = images(4, size)
    supernet = Supernet.from_model(nn.Sequential(copy.deepcopy(layer)), size, bits=[3], fixed="none").eval()
    supernet.calibrate(x)
    axis = 1 if "transpose" in name else 0
    for seed in range(4):
        config = supernet.space.sample(rng(seed))
        supernet.set_config(config)
        weight = supernet.layers["0"].weight
        assert weight.shape == layer.weight.shape
        for channel in weight.unbind(axis):
            assert len(channel.unique()) <= 8
        if config["0"].weight.granularity == "tensor":
            assert len(weight.unique()) <= 8
        assert torch.equal(supernet.extract()(x), supernet(x))
    supernet.set_config(None)
    assert torch.equal(supernet(x), layer(x))


def test_weights_that_are_read_directly_are_quantized_too(images):
    supernet = Supernet.from_model(Direct(), SIZE, bits=[2], fixed="none").eval()
    reference = Direct()
    reference.load_state_dict(supernet.model.state_dict(), strict=False)
    supernet.calibrate(images())
    assert supernet.layers["qkv"].act_quantizer is None
    expected = supernet(images())
    subnet = supernet.extract()
    assert torch.equal(subnet(images()), expected)
    assert len(subnet.qkv.weight_codes.unique()) <= 4
    assert len(supernet.model.qkv.weight.unique()) <= 4
    supernet.set_config(None)
    assert torch.equal(supernet(images()), reference(images()))


@pytest.mark.parametrize("layer", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_standardized_convolutions_are_quantized_after_standardization(layer, images):
    from timm.layers import std_conv

    conv = getattr(std_conv, layer)(3, 4, 3, stride=2, bias=True)
    with torch.no_grad():
        conv.weight.mul_(torch.tensor([1e-3, 1.0, 10.0, 100.0]).view(4, 1, 1, 1))  # undone by standardization
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(conv(images(1)).numel(), 2))
    reference = copy.deepcopy(model)
    supernet = Supernet.from_model(model, SIZE, bits=[2, 8], fixed="none").eval()
    supernet.set_config(None)
    assert torch.equal(supernet(images()), reference(images()))
    supernet.calibrate(images())
    for seed in range(4):
        supernet.set_config(supernet.space.sample(rng(seed)))
        assert torch.equal(supernet.extract()(images()), supernet(images()))
    config = supernet.space.largest()
    supernet.set_config(config)
    torch.testing.assert_close(supernet(images()), reference(images()), rtol=0.05, atol=0.05)
    supernet(images()).sum().backward()
    assert supernet.latent_weights()["0"].grad.abs().sum() > 0


def test_a_config_is_activated_by_its_rows(supernet: Supernet, images: Images) -> None:
    x = images(2)
    for seed in range(3):
        config = supernet.space.sample(rng(seed))
        supernet.set_config(config)
        expected = supernet(x)
        supernet.set_config(None)
        supernet.set_rows(torch.tensor(supernet.rows(config)))
        assert torch.equal(supernet(x), expected)
    with pytest.raises(ValueError, match="misses"):
        supernet.rows(QuantConfig({}))
