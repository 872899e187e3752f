"""Elastic and quantized layers: mixins over the convolution and linear layers of any model.

A layer is converted in place by changing its class to a generated subclass, so its name, its parameters and every float
checkpoint stay valid. The mixin overrides the *attribute* `weight`, not only `forward`: about 40 timm models read
`layer.weight` directly (swinv2, beit, eva, ...), and get quantized weights too; the input of such a read stays in float.

Weight-standardized convolutions (BiT, NF-ResNets) are quantized *after* standardization, because that is the tensor that a
device would store.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from eqnet.nn.functional import SCALE_EPS, fake_quantize
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.space import LayerInfo, QuantSpace

LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
STANDARDIZED_TYPES = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def layer_kind(module: nn.Module) -> Literal["conv", "linear", "conv_transpose"] | None:
    """The kind of a quantizable layer, None for any other module."""
    if isinstance(module, nn.ConvTranspose2d):
        return "conv_transpose"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "conv"
    return "linear" if isinstance(module, nn.Linear) else None


class QuantMixin:
    """What elastic and quantized layers share: quantize the input, then run the original layer on `self.weight`."""

    def quantize_input(self, x: Tensor) -> Tensor:
        """The input as the integer kernel sees it."""
        raise AssertionError("defined by ElasticLayer and QuantizedLayer")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The original layer on quantized input and weight."""
        x = self.quantize_input(x)
        if isinstance(self, STANDARDIZED_TYPES):  # their own forward would standardize the quantized weight again
            if getattr(self, "same_pad", False):
                x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
            return nn.Conv2d.forward(self, x)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]


class ElasticLayer(QuantMixin):
    """A layer whose weight and input are fake-quantized in selectable formats."""

    weight_quantizer: ElasticQuantizer
    act_quantizer: ElasticQuantizer | None
    trained_forward: Callable[[Any, Tensor], Tensor] | None = None  # see `eqnet.nn.integer_training`
    float_type: type
    _parameters: dict[str, nn.Parameter | None]

    @property
    def latent_weight(self) -> nn.Parameter:
        """The trained full-precision parameter; its state-dict key is still `weight`."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter

    @property
    def float_weight(self) -> Tensor:
        """What the float layer convolves with: the latent weight, standardized where the layer type does so."""
        weight: Tensor = self.latent_weight
        if not isinstance(self, STANDARDIZED_TYPES):
            return weight
        gain = None
        if isinstance(self, (ScaledStdConv2d, ScaledStdConv2dSame)):
            gain = self.gain.view(-1) * float(self.scale)
        flat = weight.reshape(1, len(weight), -1)
        return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=self.eps).reshape_as(weight)

    @property
    def weight(self) -> Tensor:
        """The fake-quantized weight in the active format."""
        return self.weight_quantizer(self.float_weight)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The simulation, or `trained_forward` where gradients are recorded and both quantizers are `plain`."""
        act, forward = self.act_quantizer, self.trained_forward
        if (
            forward is None
            or act is None
            or not (torch.is_grad_enabled() and act.plain and self.weight_quantizer.plain)
        ):
            return super().forward(x, *args, **kwargs)
        return forward(self, x)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Fake-quantizes the input in the active format."""
        return x if self.act_quantizer is None else self.act_quantizer(x)


class QuantizedLayer(QuantMixin):
    """A layer of an extracted subnet: integer weight codes, one fixed format, no latent weight.

    Buffers: `weight_codes` int8 like the weight, `weight_scale` float32 and `weight_zero_point` int8 (broadcastable to
    it); `act_scale`, `act_zero_point`, `act_qmin`, `act_qmax` (0-d) unless the input stays in floating point.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    act_scale: Tensor | None
    act_zero_point: Tensor
    act_qmin: Tensor
    act_qmax: Tensor

    @property
    def weight(self) -> Tensor:
        """Dequantized weight, bit-identical to the supernet's."""
        codes = self.weight_codes.to(self.weight_scale.dtype)
        return (codes - self.weight_zero_point.to(codes.dtype)) * self.weight_scale

    def quantize_input(self, x: Tensor) -> Tensor:
        """Rounds the input to the integer grid of the device."""
        if self.act_scale is None:
            return x
        return fake_quantize(x, self.act_scale, self.act_zero_point, self.act_qmin, self.act_qmax)


@functools.cache
def _subclass(mixin: type, base: type) -> type:
    prefix = "Elastic" if mixin is ElasticLayer else "Quantized"
    return type(f"{prefix}{base.__name__}", (mixin, base), {"float_type": base})


def make_elastic(module: nn.Module, info: LayerInfo, space: QuantSpace) -> None:
    """Converts a layer in place; the quantizers' rows are the formats that `space` allows it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    act_formats = space.choices(info.name, "act")
    device = weight.device
    module.__class__ = _subclass(ElasticLayer, type(module))  # type: ignore[arg-type]
    module.weight_quantizer = ElasticQuantizer(
        space.choices(info.name, "weight"), info.channels, info.channel_axis, weight.ndim, weight.numel(), device=device
    )
    act = ElasticQuantizer(act_formats, signed=info.signed_input, device=device) if act_formats else None
    if act is not None and info.reads_images:
        # Images do not change, so their calibrated step size stays right; learning it would cost the gradient of the first
        # layer's input, a tenth of a training step.
        act.requires_grad_(False)
    module.register_module("act_quantizer", act)


@torch.no_grad()
def make_quantized(module: nn.Module) -> None:
    """Turns an elastic layer into the integer layer of its active format, in place."""
    assert isinstance(module, ElasticLayer)
    codes, scale, zero = module.weight_quantizer.quantize(module.float_weight)
    act = module.act_quantizer
    buffers: dict[str, Tensor | None] = {
        "weight_codes": codes,
        "weight_scale": scale.clone(),
        "weight_zero_point": zero,
    }
    if act is None or not act.enabled:
        buffers["act_scale"] = None
    else:
        act_scale, zero, qmin, qmax = act.qparams()
        buffers["act_scale"] = act_scale.clamp_min(SCALE_EPS).clone()
        buffers["act_zero_point"] = zero.clone()
        buffers["act_qmin"], buffers["act_qmax"] = qmin.clone(), qmax.clone()
    del module.weight_quantizer, module.act_quantizer
    vars(module).pop("trained_forward", None)
    become_quantized(module, buffers)


def become_quantized(module: Any, buffers: Mapping[str, Tensor | None]) -> None:
    """Turns a float or elastic layer into an integer layer with the buffers of `QuantizedLayer`, in place."""
    float_type: Any = module.float_type if isinstance(module, ElasticLayer) else type(module)
    module.__class__ = _subclass(QuantizedLayer, float_type)
    for name in ("weight", "gain"):  # gains are part of standardized weights, and so of the codes
        module._parameters.pop(name, None)
    for name, value in buffers.items():
        module.register_buffer(name, value)
