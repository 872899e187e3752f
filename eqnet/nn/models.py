"""Networks for 32x32 images, which timm lacks: `cifar_resnet20`, `32`, `44`, `56` and `cifar_mobilenetv2`.

He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2: a 3x3 stem of 16 channels, three
stages of n basic blocks with 16, 32 and 64 channels (6n + 2 weighted layers), global average pooling, one linear layer.
Importing this module registers the models, so that `timm.create_model("cifar_resnet20")` finds them. State-dict keys are
those of the widely used public checkpoints (`conv1`, `layer1.0.bn1`, ..., `linear`), which therefore load by name.
The MobileNetV2 is timm's with two strides fewer.

Shape legend: `N` batch, `C` channels, `H`, `W` height and width of the input, `K` classes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, model_entrypoint, register_model
from torch import Tensor, nn

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Option A, the shortcut without parameters: every second pixel, new channels filled with zeros, half on each side.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least as many.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, in_channels, H, W]` to `[N, out_channels, ceil(H / 2), ceil(W / 2)]`."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


def _shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where shapes agree, else the shortcut of the given kind."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "A":
        return PaddedShortcut(in_channels, out_channels)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut around them.

    Activations are separate modules and never in place, so that a forward hook on any module sees what that module returned.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ceil(W / stride)]`, non-negative."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.act2(out + self.shortcut(x))
        return result


class CifarResNet(nn.Module):
    """A ResNet for small images, with the interface of timm's models.

    Args:
        blocks: basic blocks of each of the three stages.
        num_classes: classes; 0 gives pooled features.
        in_chans: channels of the input images.
        shortcut: "A" (no parameters) or "B" (1x1 convolution and batch normalisation) where a stage changes the shape.
        width: channels of the stem and the first stage; the later stages have twice and four times as many.
        global_pool: pooling before the classifier, a name that timm knows.

    Raises:
        ValueError: `shortcut` is neither "A" nor "B", or `width` is not positive.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        shortcut: Shortcut = "A",
        width: int = 16,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if shortcut not in get_args(Shortcut):
            raise ValueError(f"shortcut of a CIFAR ResNet must be 'A' or 'B'; got {shortcut!r}.")
        if width < 1:
            raise ValueError(f"width of a CIFAR ResNet must be at least 1; got {width}.")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.layer1 = self._stage(blocks, width, width, 1, shortcut)
        self.layer2 = self._stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = self._stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.num_features = self.head_hidden_size = 4 * width
        self.feature_info = [
            {"num_chs": width, "reduction": 1, "module": "act1"},
            {"num_chs": width, "reduction": 1, "module": "layer1"},
            {"num_chs": 2 * width, "reduction": 2, "module": "layer2"},
            {"num_chs": 4 * width, "reduction": 4, "module": "layer3"},
        ]
        self.global_pool, self.linear = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
        """`blocks` basic blocks, of which the first changes the shape."""
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)))

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name."""
        return "linear" if name_only else self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a freshly initialised one.

        Args:
            num_classes: classes; 0 removes the classifier.
            global_pool: pooling before the classifier, a name that timm knows; None keeps the present one.
        """
        weight = self.conv1.weight
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.linear = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, device=weight.device, dtype=weight.dtype
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images `[N, in_chans, H, W]` to `[N, 4 * width, ceil(H / 4), ceil(W / 4)]`."""
        x = self.act1(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools the result of `forward_features` to `[N, 4 * width]` and, unless `pre_logits`, classifies it to `[N, K]`."""
        x = self.global_pool(x)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[N, in_chans, H, W]` to logits `[N, K]`."""
        return self.forward_head(self.forward_features(x))


# The public checkpoints were trained on CIFAR-10 with ImageNet's mean and standard deviation.
_CFG: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "linear",
}
default_cfgs = generate_default_cfgs(
    {
        **{f"cifar_resnet{depth}": _CFG for depth in (20, 32, 44, 56)},
        "cifar_mobilenetv2": {**_CFG, "pool_size": (4, 4), "first_conv": "conv_stem", "classifier": "classifier"},
    }
)


def _create(depth: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Builds a ResNet of `depth` = 6 * blocks + 2 weighted layers through timm; `kwargs` as for `CifarResNet`."""
    return build_model_with_cfg(
        CifarResNet,
        f"cifar_resnet{depth}",
        pretrained,
        blocks=(depth - 2) // 6,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **kwargs,
    )


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20, 269,722 parameters with 10 classes and option A; `kwargs` as for `CifarResNet`."""
    return _create(20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32, 464,154 parameters with 10 classes and option A; `kwargs` as for `CifarResNet`."""
    return _create(32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44, 658,586 parameters with 10 classes and option A; `kwargs` as for `CifarResNet`."""
    return _create(44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56, 853,018 parameters with 10 classes and option A; `kwargs` as for `CifarResNet`."""
    return _create(56, pretrained, **kwargs)


@register_model
def cifar_mobilenetv2(pretrained: bool = False, variant: str = "mobilenetv2_100", **kwargs: Any) -> nn.Module:
    """MobileNetV2 (arXiv 1801.04381) of timm with stride 1 in the stem and in its first strided stage: 8 pixels become one.

    Args:
        pretrained: refused by timm: there are no weights for 32x32 images.
        variant: timm's name of the width, e.g. "mobilenetv2_035".
        kwargs: as for the variant.
    """
    model: nn.Module = model_entrypoint(variant)(pretrained=pretrained, **kwargs)
    for name in ("conv_stem", "blocks.1.0.conv_dw"):
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        conv.stride = (1, 1)
    return model
