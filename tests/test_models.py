"""Networks for CIFAR: the published architecture, the public checkpoints' names and timm's interface."""

import pytest
import timm
import torch
from torch import nn

import eqnet.nn.models  # noqa: F401  (registers the models)
from eqnet.nn.models import PaddedShortcut

PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018}  # published, option A, 10 classes
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def weighted_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def expected_keys(blocks: int, shortcut: str) -> set[str]:
    keys = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{k}" for k in BATCH_NORM}
    for stage in (1, 2, 3):
        for block in range(blocks):
            for i in (1, 2):
                keys.add(f"layer{stage}.{block}.conv{i}.weight")
                keys |= {f"layer{stage}.{block}.bn{i}.{k}" for k in BATCH_NORM}
    if shortcut == "B":
        for stage in (2, 3):
            keys.add(f"layer{stage}.0.shortcut.0.weight")
            keys |= {f"layer{stage}.0.shortcut.1.{k}" for k in BATCH_NORM}
    return keys


@pytest.mark.parametrize("depth", PARAMETERS)
def test_depth_and_parameter_count_are_the_published_ones(depth):
    model = timm.create_model(f"cifar_resnet{depth}")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[depth]
    assert len(weighted_layers(model)) == depth


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("depth", PARAMETERS)
def test_state_dict_has_the_names_of_the_public_checkpoints(depth, shortcut):
    model = timm.create_model(f"cifar_resnet{depth}", shortcut=shortcut)
    assert set(model.state_dict()) == expected_keys((depth - 2) // 6, shortcut)


def test_resnet20_with_option_b_has_the_22_layers_of_the_paper():
    layers = weighted_layers(timm.create_model("cifar_resnet20", shortcut="B"))
    assert len(layers) == 22
    assert [name for name in layers if "shortcut" in name] == ["layer2.0.shortcut.0", "layer3.0.shortcut.0"]


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 7)])
def test_shapes(channels, size, shortcut):
    model = timm.create_model("cifar_resnet20", num_classes=7, in_chans=channels, shortcut=shortcut, width=8).eval()
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(x)
    assert features.shape == (2, 32, -(-size // 4), -(-size // 4))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(model(x), model.linear(pooled))


@pytest.mark.parametrize(("channels", "out", "size"), [(4, 8, 6), (16, 32, 8), (3, 6, 5)])
def test_option_a_takes_every_second_pixel_and_pads_zeros_half_on_each_side(channels, out, size):
    shortcut = PaddedShortcut(channels, out)
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    before = (out - channels) // 2
    expected = torch.zeros(2, out, (size + 1) // 2, (size + 1) // 2)
    for row in range(expected.shape[2]):
        for column in range(expected.shape[3]):
            expected[:, before : before + channels, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(shortcut(x), expected)
    assert not list(shortcut.parameters())


def test_forward_is_the_residual_recursion():
    model = timm.create_model("cifar_resnet20", width=4).eval()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def batch_norm(y, m):
        return nn.functional.batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias)

    y = batch_norm(nn.functional.conv2d(x, model.conv1.weight, padding=1), model.bn1).relu()
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
        for i, block in enumerate(getattr(model, stage)):
            s = stride if i == 0 else 1
            out = batch_norm(nn.functional.conv2d(y, block.conv1.weight, stride=s, padding=1), block.bn1).relu()
            out = batch_norm(nn.functional.conv2d(out, block.conv2.weight, padding=1), block.bn2)
            if s == 2:
                half = y.shape[1] // 2
                y = nn.functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
            y = (out + y).relu()
    torch.testing.assert_close(model(x), y.mean((2, 3)) @ model.linear.weight.T + model.linear.bias)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_hooks_see_what_each_module_returned(shortcut):
    model = timm.create_model("cifar_resnet20", shortcut=shortcut, width=4)
    seen = {}

    def record(module, args, out):
        seen[module] = (out, out.detach().clone())

    for module in model.modules():
        module.register_forward_hook(record)
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    stages = {model.layer1, model.layer2, model.layer3}
    assert stages | {model.layer1[0].act1, model.layer1[0].act2, model.layer2[0].shortcut, model.linear} <= set(seen)
    assert all(torch.equal(out, copy) for out, copy in seen.values())
    assert seen[model.layer1[0].bn2][0].min() < 0 <= seen[model.layer1[0].act2][0].min()


@pytest.mark.parametrize("kwargs", [{"shortcut": "C"}, {"shortcut": "a"}, {"width": 0}])
def test_invalid_architecture_is_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        timm.create_model("cifar_resnet20", **kwargs)


def test_models_are_listed_with_their_data_config():
    assert {f"cifar_resnet{depth}" for depth in PARAMETERS} <= set(timm.list_models("cifar_*"))
    config = timm.data.resolve_data_config(model=timm.create_model("cifar_resnet32"))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)
    assert config["crop_pct"] == 1.0


def test_classifier_can_be_replaced_and_removed():
    model = timm.create_model("cifar_resnet20", width=4)
    assert (model.num_classes, model.num_features, model.in_chans) == (10, 16, 3)
    assert model.get_classifier() is model.linear
    assert model.get_classifier(name_only=True) == model.default_cfg["classifier"] == "linear"
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 16, 2, 2)


def test_features_only_gives_the_stages():
    model = timm.create_model("cifar_resnet20", width=4, features_only=True)
    shapes = [tuple(f.shape) for f in model(torch.zeros(1, 3, 16, 16))]
    assert shapes == [(1, 4, 16, 16), (1, 4, 16, 16), (1, 8, 8, 8), (1, 16, 4, 4)]
    assert model.feature_info.reduction() == [1, 1, 2, 4]


def test_timm_loads_a_data_parallel_checkpoint_without_batch_counters(tmp_path):
    source = timm.create_model("cifar_resnet20", width=4)
    weights = {f"module.{k}": v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": weights, "best_prec1": 91.7}, tmp_path / "weights.th")
    model = timm.create_model("cifar_resnet20", width=4, checkpoint_path=str(tmp_path / "weights.th"))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_timm_adapts_pretrained_weights_to_grey_images_and_other_classes(tmp_path):
    source = timm.create_model("cifar_resnet20", width=4)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    kwargs = {"width": 4, "in_chans": 1, "num_classes": 3}
    model = timm.create_model("cifar_resnet20", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    torch.testing.assert_close(model.conv1.weight, source.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(model.layer3[2].conv2.weight, source.layer3[2].conv2.weight)
    assert model.linear.weight.shape == (3, 16)


def test_mobilenetv2_is_timms_with_two_strides_fewer():
    small, original = (
        timm.create_model("cifar_mobilenetv2", num_classes=10),
        timm.create_model("mobilenetv2_100", num_classes=10),
    )
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}
    strides = [m.stride[0] for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert strides.count(2) == [m.stride[0] for m in original.modules() if isinstance(m, nn.Conv2d)].count(2) - 2 == 3
    assert any(m.groups > 1 and m.groups == m.in_channels for m in small.modules() if isinstance(m, nn.Conv2d))
    assert small.eval().forward_features(torch.randn(1, 3, 32, 32)).shape[2:] == (4, 4)
    narrow = timm.create_model("cifar_mobilenetv2", variant="mobilenetv2_035", in_chans=1, num_classes=5).eval()
    assert narrow(torch.randn(2, 1, 8, 8)).shape == (2, 5)
