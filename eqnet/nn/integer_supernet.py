"""A supernet that runs on integers: for measuring many configs, BN recalibration included.

Weights of each (layer, format) are packed once and shared by all configs. To measure, convolutions are fused where
torch.fx can trace the model: BN goes into output scale and bias, then follow residual add, ReLU and, if a single quantized
layer reads the result, requantization to its codes. Models that cannot be traced run layer by layer.

How results relate to the simulation (`Supernet.forward`): layers agree to float32 rounding. An activation that falls that
close to the middle between two codes may get the neighbouring code, one step size away, and later layers see it; rarely the
top-1 class changes. So integer execution ranks configs, and reported accuracies come from the simulation.

Simulated layer by layer, as there is no kernel: other types than Conv2d and Linear (transposed and 1-d convolutions,
convolutions that pad to the "same" size), inputs in floating point, and what `pack_weight` calls out of range.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn

from eqnet.nn.integer import (
    InputGrid,
    PackedWeight,
    WeightCache,
    conv2d,
    conv2d_add_,
    dequantize_codes,
    input_grid,
    kernels_available,
    linear,
    quantize_codes,
    runs_on_integers,
)
from eqnet.nn.layers import ElasticLayer
from eqnet.nn.supernet import Supernet, recalibrate_bn

Clip = tuple[float, float]
RELU: Clip = (0.0, math.inf)
CLIPS = {nn.ReLU: RELU, nn.ReLU6: (0.0, 6.0)}
RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode


class IntegerStep(nn.Module):
    """One quantized layer on integers, with what follows it: BN, add, clip, requantization (each optional).

    Args:
        layer: for which `runs_on_integers` holds.
        cache: where its packed weights are.
    """

    def __init__(self, layer: ElasticLayer, cache: WeightCache) -> None:
        super().__init__()
        self.layer, self.cache = layer, cache
        self.norm: nn.BatchNorm2d | None = None
        self.act: nn.Module | None = None  # of timm's BN with activation, where that is no clip
        self.clip: Clip | None = None
        self.target: ElasticLayer | None = None  # the only layer that reads the result
        self.in_place = False  # the added tensor is not needed afterwards

    @torch.no_grad()
    def freeze(self, fold: bool = True) -> None:
        """Takes over the active config and, with `fold`, the BN statistics of now; without, BN is in train mode."""
        assert self.layer.act_quantizer is not None
        self.grid = input_grid(self.layer.act_quantizer)
        self.out_grid: InputGrid | None = None
        if self.target is not None:
            assert self.target.act_quantizer is not None
            self.out_grid = input_grid(self.target.act_quantizer)
        self.weight: PackedWeight | None = self.cache.get(self.layer)
        bias = self.layer._parameters["bias"]
        self.bias: Tensor | None = None if bias is None else bias.detach()
        self.fold = fold
        if self.weight is None or self.norm is None or not fold:
            return
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        gain, shift = _fold(self.norm, self.norm.running_mean, self.norm.running_var)
        self.bias = shift if self.bias is None else shift + self.bias * gain
        self.weight = self.weight._replace(scale=self.weight.scale * gain)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Runs the step as of the last `freeze`.

        Args:
            x: float32, or uint8 codes on the input grid of the layer; [N, C, H, W] for convolutions, [..., C] otherwise.
            residual: float32, added before clipping.

        Returns:
            float32, or uint8 codes on the input grid of `target`.
        """
        if self.weight is None:
            x = dequantize_codes(x, self.grid) if x.dtype == torch.uint8 else x
            y = type(self.layer).forward(self.layer, x)
            return self._finish(y if self.norm is None else nn.BatchNorm2d.forward(self.norm, y), residual)
        codes = x if x.dtype == torch.uint8 else quantize_codes(x, self.grid)
        if isinstance(self.layer, nn.Linear):
            return self._finish(linear(codes, self.grid, self.weight, self.bias), residual)
        call = (codes, self.grid, self.weight, self.bias, self.layer)
        if self.norm is not None and not self.fold:
            return self._finish(_normalise_(conv2d(*call), self.norm), residual)
        if residual is None and self.act is None:
            return conv2d(*call, clip=self.clip, out_grid=self.out_grid)
        if residual is None or not self._addable(codes, residual):
            return self._finish(conv2d(*call), residual)
        if not (self.in_place and residual.is_contiguous(memory_format=torch.channels_last)):
            residual = residual.clone(memory_format=torch.channels_last)
        y = conv2d_add_(*call, residual, relu=self.clip == RELU)
        return self._finish(y, None, clipped=self.clip == RELU)

    def _addable(self, codes: Tensor, residual: Tensor) -> bool:
        """Whether the kernel may add to the residual: same shape as the result, no broadcasting."""
        layer: Any = self.layer
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                codes.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
            )
        ]
        shape = (len(codes), layer.out_channels, *size)
        return residual.dtype == torch.float32 and tuple(residual.shape) == shape

    def _finish(self, y: Tensor, residual: Tensor | None, clipped: bool = False) -> Tensor:
        """What follows the layer, where it is not part of the kernel."""
        y = y if residual is None else y + residual
        y = y if self.act is None else self.act(y)
        low, high = (-math.inf, math.inf) if self.clip is None or clipped else self.clip
        if self.out_grid is None:
            return y if (low, high) == (-math.inf, math.inf) else y.clamp(low, high)
        scale = self.out_grid.scale
        grid = self.out_grid._replace(
            low=max(self.out_grid.low, low / scale), high=min(self.out_grid.high, high / scale)
        )
        return quantize_codes(y, grid)


def _fold(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and offset [C] of BN with the given statistics."""
    gain = torch.rsqrt(var + norm.eps)
    gain = gain if norm.weight is None else gain * norm.weight
    return gain, -mean * gain if norm.bias is None else norm.bias - mean * gain


@torch.no_grad()
def _normalise_(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """BN in train mode, in place: statistics in one pass, then one multiplication and one addition."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    mean, var = torch.batch_norm_update_stats(y, norm.running_mean, norm.running_var, momentum)
    gain, bias = _fold(norm, mean, var)
    return y.mul_(gain[:, None, None]).add_(bias[:, None, None])


class IntegerSupernet:
    """Integer execution of a supernet on CPU.

    Args:
        supernet: put in eval mode; calibrated. Its config, weights and BN statistics may change at any time, its modules not.

    Attributes:
        traced: whether steps are fused; False means layer by layer.
        simulated: names of the layers that never run on integers.

    Raises:
        ValueError: this CPU has no integer kernels, or the supernet is on another device.
    """

    def __init__(self, supernet: Supernet) -> None:
        if not kernels_available():
            raise ValueError("this CPU has no integer kernels (VNNI instructions); set search.integer=off.")
        if any(p.device.type != "cpu" for p in supernet.parameters()):
            raise ValueError("integer kernels run on CPU only; move the supernet there or set search.integer=off.")
        self.supernet, self.cache = supernet.eval(), WeightCache()
        self.simulated = [name for name, layer in supernet.layers.items() if not runs_on_integers(layer)]
        self._single = [IntegerStep(m, self.cache) for m in supernet.layers.values() if runs_on_integers(m)]
        self._graph = _trace(supernet)
        self.traced = self._graph is not None
        self._fused = [] if self._graph is None else _fuse(self._graph, self.cache)

    def recalibrate_bn(self, batches: Iterable[Tensor]) -> None:
        """As `supernet.recalibrate_bn`, in the active config.

        Batch statistics amplify rounding from layer to layer, here as between any two ways to sum in floating point.
        """
        if self._graph is None:
            with self.layer_by_layer():
                return recalibrate_bn(self.supernet, batches)
        self._check_active()
        for step in self._fused:
            step.freeze(fold=False)
        return recalibrate_bn(self._graph, batches)

    @contextmanager
    def layer_by_layer(self) -> Iterator[None]:
        """Inside, calling the supernet (in the config active at entry) runs its layers on integers, anything else in float."""
        self._check_active()
        try:
            for step in self._single:
                step.freeze()
                step.layer.forward = step.forward  # type: ignore[method-assign]
            yield
        finally:
            for step in self._single:
                step.layer.__dict__.pop("forward", None)

    def freeze(self) -> Callable[[Tensor], Tensor]:
        """The network of the active config with the BN statistics of now, images [N, C, H, W] to logits, for inference.

        Valid until the next call of `freeze` or `recalibrate_bn`; later changes of config, weights or statistics do not reach it
        where the model could be traced.
        """
        self._check_active()
        if self._graph is None:
            return self._run_layer_by_layer
        for step in self._fused:
            step.freeze()
        return self._graph

    def _run_layer_by_layer(self, images: Tensor) -> Tensor:
        with self.layer_by_layer():
            return self.supernet(images)  # type: ignore[no-any-return]

    def _check_active(self) -> None:
        if self.supernet.config is None:
            raise ValueError("quantization is off; activate a config with set_config first.")


# -- tracing and fusion -----------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Records elastic layers, and modules without any inside, as single calls: their control flow does not matter."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ElasticLayer) or not any(isinstance(child, ElasticLayer) for child in m.modules())


def _trace(supernet: Supernet) -> fx.GraphModule | None:
    """The calls of a supernet in eval mode; None if they depend on values or shapes."""
    try:
        return fx.GraphModule(supernet, _Tracer().trace(supernet))
    except Exception:  # whatever a model does with a symbolic value ends here, in an error of its own choice
        return None


def _fuse(module: fx.GraphModule, cache: WeightCache) -> list[IntegerStep]:
    """Replaces quantized layers and what follows them by steps, in place."""
    graph, modules = module.graph, dict(module.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) in TRANSPARENT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    steps: dict[fx.Node, IntegerStep] = {}
    for node in list(graph.nodes):
        if not _runs(node, modules):
            continue
        step = IntegerStep(modules[node.target], cache)
        chain, residual = _absorb(step, node, modules)
        readers = list(chain[-1].users)
        if len(readers) == 1 and _runs(readers[0], modules):
            step.target = modules[readers[0].target]
        name = f"step{len(steps)}"
        module.add_submodule(name, step)
        with graph.inserting_before(node):
            arguments = node.args if residual is None else (*node.args, residual)
            fused = graph.call_module(name, arguments)
        chain[-1].replace_all_uses_with(fused)
        for used in reversed(chain):
            graph.erase_node(used)
        steps[fused] = step
    for node, step in steps.items():
        if len(node.args) == 2 and node.args[1] in steps:
            # made by a step, so no other tensor shares its memory; and its other readers have finished and keep nothing
            others = [user for user in node.args[1].users if user is not node]  # type: ignore[union-attr]
            step.in_place = all(user in steps and user < node for user in others)
    graph.lint()
    module.recompile()
    return list(steps.values())


def _runs(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node calls a layer that runs on integers, on one tensor."""
    called = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return called and runs_on_integers(modules[str(node.target)])


def _absorb(step: IntegerStep, node: fx.Node, modules: dict[str, nn.Module]) -> tuple[list[fx.Node], fx.Node | None]:
    """Gives a step BN, add and clip if they follow in this order, each the only reader of the one before.

    Returns:
        the nodes that the step replaces, the layer first, and the node that it adds.
    """
    chain: list[fx.Node] = [node]
    residual: fx.Node | None = None
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        module = modules[str(user.target)] if user.op == "call_module" else None
        untouched = residual is None and step.clip is None
        if isinstance(module, nn.BatchNorm2d) and untouched and step.norm is None and isinstance(step.layer, nn.Conv2d):
            if not _absorb_norm(step, module):
                break
            if step.act is not None:
                return [*chain, user], None
        elif user.target in ADD_FUNCTIONS and untouched and (other := _other_operand(user, chain[-1])) is not None:
            if not _available(other, node, user):
                break
            residual = other
        elif step.clip is None and (clip := _clip(user, module)) is not None:
            step.clip = clip
        else:
            break
        chain.append(user)
    return chain, residual


def _absorb_norm(step: IntegerStep, module: nn.BatchNorm2d) -> bool:
    """Gives a step plain BN, or timm's BN with its activation; False if it is neither."""
    if not module.track_running_stats:
        return False
    if isinstance(module, BatchNormAct2d) and isinstance(module.drop, nn.Identity):
        step.clip = CLIPS.get(type(module.act))
        step.act = None if type(module.act) in (nn.Identity, *CLIPS) else module.act
    elif type(module) is not nn.BatchNorm2d:
        return False
    step.norm = module
    return True


def _other_operand(add: fx.Node, node: fx.Node) -> fx.Node | None:
    """What is added to `node`; None unless it is another tensor."""
    if len(add.args) != 2 or add.kwargs:
        return None
    other = add.args[1] if add.args[0] is node else add.args[0]
    return other if isinstance(other, fx.Node) and other is not node else None


def _available(other: fx.Node, node: fx.Node, add: fx.Node) -> bool:
    """Whether `other` is known before `node` runs, and nothing between it and the add could change it."""
    return other < node and not any(node < user < add for user in other.users)


def _clip(node: fx.Node, module: nn.Module | None) -> Clip | None:
    """The bounds of a ReLU or ReLU6, None for anything else."""
    if module is not None:
        return CLIPS.get(type(module))
    called = node.op in ("call_function", "call_method") and node.target in RELU_FUNCTIONS
    return RELU if called and len(node.args) == 1 else None
