"""What the simulation computes in each quantized layer of an extracted subnet, as integers.

A fake-quantized layer convolves `s_a r_a` with `s_w r_w`. The same operation on the same float32 tensors, but summed in
float64, divided by `s_a s_w` must be a whole number up to rounding of the operands: the accumulator of the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eqnet.deploy.reference import along
from eqnet.nn.layers import QuantizedLayer
from eqnet.nn.supernet import BATCH_NORM_TYPES

_FUNCTIONS = ("conv1d", "conv2d", "conv_transpose2d", "linear")


@dataclass(frozen=True, eq=False)
class SimulatedCall:
    """One call of a quantized layer.

    Attributes:
        name: of the layer.
        number: of the call in this forward pass, from 0.
        inputs: float32, before quantization.
        centred: input codes minus zero point, whole numbers in float32.
        sums: accumulators without bias, float64; whole up to rounding of float32 operands.
    """

    name: str
    number: int
    inputs: NDArray[np.float32]
    centred: NDArray[np.float32]
    sums: NDArray[np.float64]


class _Observer(TorchFunctionMode):
    """Repeats the operation of the layer that is running in float64."""

    def __init__(self, report: Callable[[SimulatedCall], None]) -> None:
        super().__init__()
        self.report = report
        self.running: list[tuple[str, QuantizedLayer, Tensor]] = []
        self.calls: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.running and getattr(func, "__name__", "") in _FUNCTIONS:
            x, weight, *rest = args
            others = {key: value for key, value in kwargs.items() if key != "bias"}
            exact = func(x.double(), weight.double(), None, *rest[1:], **others)
            self._report(exact)
        return func(*args, **kwargs)

    def _report(self, exact: Tensor) -> None:
        name, layer, inputs = self.running[-1]
        assert layer.act_scale is not None
        number = self.calls.get(name, 0)
        self.calls[name] = number + 1
        centred = (layer.quantize_input(inputs) / layer.act_scale).round()
        sums = exact / layer.act_scale.double() / output_scale(layer).double()
        self.report(SimulatedCall(name, number, inputs.numpy(), centred.numpy(), sums.numpy()))


def output_scale(layer: Any) -> Tensor:
    """Step sizes of the weight, broadcastable along the channels of the layer's output."""
    scale: Tensor = layer.weight_scale.reshape(-1)
    if isinstance(layer, nn.Linear):
        return scale
    if isinstance(layer, nn.ConvTranspose2d) and scale.numel() > 1:
        scale = scale.repeat(layer.groups)
    return scale.reshape(-1, *[1] * (layer.weight_codes.ndim - 2))


@torch.inference_mode()
def observe_layers(subnet: nn.Module, images: Tensor, report: Callable[[SimulatedCall], None]) -> NDArray[np.float32]:
    """Runs a subnet and reports every call of a layer with quantized input.

    Args:
        subnet: from `Supernet.extract`, in eval mode.
        images: [N, C, H, W], normalised as in training.
        report: called once for each call, in order of execution.

    Returns:
        The outputs of the subnet.
    """
    observer = _Observer(report)

    def before(name: str) -> Any:
        def enter(layer: QuantizedLayer, args: tuple[Tensor, ...]) -> None:
            if layer.act_scale is not None:
                observer.running.append((name, layer, args[0]))

        return enter

    def after(layer: QuantizedLayer, args: Any, out: Any) -> None:
        if layer.act_scale is not None:
            observer.running.pop()

    handles = []
    for name, module in subnet.named_modules():
        if isinstance(module, QuantizedLayer):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after)]  # type: ignore[attr-defined]
    try:
        with observer:
            return subnet(images).numpy()  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def following_norms(subnet: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """The BN that reads the output of each quantized layer directly, by the layer's name."""
    net = copy.deepcopy(subnet)
    produced: list[tuple[Tensor, str]] = []
    found: dict[str, nn.Module] = {}

    def remember(name: str) -> Any:
        return lambda layer, args, out: produced.append((out, name))

    def match(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.update({name: norm for out, name in produced if out is args[0]})

    for name, module in net.named_modules():
        if isinstance(module, QuantizedLayer):
            module.register_forward_hook(remember(name))  # type: ignore[attr-defined]
        elif isinstance(module, BATCH_NORM_TYPES):
            module.register_forward_pre_hook(match)
    net(image)
    return found


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """A trained layer as a file must hold it, BN folded in: `factor * scale * sums + bias` in each output channel.

    Attributes:
        factor: of the codes of a channel: `2**shift`, negative where BN turns them, 0 where it makes the channel constant; [C].
        codes: weight codes minus zero point, times the factor, float64 like the weight.
        scale: step sizes of the weight, positive float64 [C].
        bias: float64, one for each output channel; None for none.
    """

    factor: NDArray[np.float64]
    codes: NDArray[np.float64]
    scale: NDArray[np.float64]
    bias: NDArray[np.float64] | None


def folded_layer(layer: Any, norm: Any, name: str, shift: int) -> FoldedLayer:
    """What a quantized layer and the BN behind it must be in the file.

    Args:
        layer: quantized, with its trained codes.
        norm: the BN, None for none.
        name: of the layer, for errors.
        shift: codes of the file are `2**shift` times the trained ones.

    Raises:
        ValueError: BN has a factor for each output channel of a layer whose groups share step sizes.
    """
    own = layer._parameters.get("bias")
    bias = None if own is None else own.detach().double().numpy()
    factor = np.ones(1)
    if norm is not None:
        mean, var = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
        gain = np.ones_like(mean) if norm.weight is None else norm.weight.detach().double().numpy()
        offset = np.zeros_like(mean) if norm.bias is None else norm.bias.detach().double().numpy()
        factor = gain / np.sqrt(var + norm.eps)
        bias = offset + factor * ((0 if bias is None else bias) - mean)
    codes = layer.weight_codes.double() - layer.weight_zero_point.double()
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    channels = codes.shape[axis]
    if factor.size not in (1, channels):
        raise ValueError(f"layer {name!r}: BN cannot be folded into step sizes that groups share.")
    trained = np.broadcast_to(layer.weight_scale.reshape(-1).double().numpy(), channels)
    scale = np.broadcast_to(np.abs(factor), channels) * trained
    sign = np.where(scale < np.finfo(np.float32).tiny, 0.0, np.where(factor < 0, -1.0, 1.0))
    power = 2.0**shift
    return FoldedLayer(power * sign, codes.numpy() * along(power * sign, axis, codes.ndim), scale / power, bias)
