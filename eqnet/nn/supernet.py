"""The supernet: a model whose convolution and linear layers take any config of a quantization space.

EQ-Net (arXiv 2308.07650) section 3. The only mutable state of a config is the active row of each quantizer.

Departs from the official code: layers are addressed by name; inputs read directly stay in float and are listed; BN
statistics of a config are the exact average over a fixed set of batches, independent of what ran before (section 3.5
there: 257 batches of momentum 0.1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eqnet.nn.calibration import in_threads
from eqnet.nn.kernels import EAGER, Kernels
from eqnet.nn.layers import LAYER_TYPES, ElasticLayer, QuantMixin, layer_kind, make_elastic, make_quantized
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.space import LayerInfo, QuantConfig, QuantFormat, QuantSpace

BATCH_NORM_TYPES = (nn.modules.batchnorm._BatchNorm,)


READING_FUNCTIONS = ("linear", "conv1d", "conv2d", "multi_head_attention_forward")


class _DirectReads(TorchFunctionMode):
    """Counts MACs of functions that read a layer's weight without calling the layer."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.macs = names, dict.fromkeys(names.values(), 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in READING_FUNCTIONS:
            result = out if isinstance(out, Tensor) else out[0]  # attention also returns its weights
            for weight in (*args, *(kwargs or {}).values()):
                name = self.names.get(id(weight))
                if name is not None:
                    self.macs[name] += result.numel() * weight[0].numel()
        return out


@torch.no_grad()
def trace_layers(model: nn.Module, input_size: Sequence[int]) -> list[LayerInfo]:
    """Facts about every quantizable layer, in order of first call (layers that are never called come last).

    Runs one normally distributed image through a copy in eval mode; works on the meta device, where every input counts
    as signed. `model` is not changed.

    Args:
        model: any network; its Conv1d, Conv2d, ConvTranspose2d and Linear layers (and subclasses) are listed.
        input_size: `(C, H, W)` of one image.

    Raises:
        ValueError: the model has no quantizable layer, or cannot run on this input size.
    """
    net = copy.deepcopy(model).eval()
    modules = {name: m for name, m in net.named_modules() if isinstance(m, LAYER_TYPES)}
    if not modules:
        raise ValueError("the model has no quantizable layer (Conv1d, Conv2d, ConvTranspose2d, Linear).")
    device = next(net.parameters()).device
    facts: dict[str, dict[str, Any]] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x, weight = args[0], module.weight
            assert isinstance(weight, Tensor)
            positions = x.numel() if layer_kind(module) == "conv_transpose" else out.numel()
            fact = facts.setdefault(
                name, {"macs": 0, "act_numel": 0, "calls": 0, "signed_input": False, "reads_images": True}
            )
            fact["macs"] += positions * weight[0].numel()
            fact["act_numel"] += x.numel()
            fact["calls"] += 1
            fact["signed_input"] |= True if x.is_meta else bool((x < 0).any())
            fact["reads_images"] &= x is image

        return record

    for name, module in modules.items():
        module.register_forward_hook(hook(name))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *input_size, generator=generator).to(device)
    reads = _DirectReads({id(m._parameters["weight"]): name for name, m in modules.items()})
    try:
        with reads:
            net(image)
    except (RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(f"the model cannot run on an input of size {tuple(input_size)}: {error}") from error
    unread = {"act_numel": 0, "calls": 0, "signed_input": True, "reads_images": False}
    for name in modules:
        facts.setdefault(name, {**unread, "macs": reads.macs.get(name, 0)})

    def info(name: str, fact: dict[str, Any]) -> LayerInfo:
        kind, weight = layer_kind(modules[name]), modules[name].weight
        assert kind is not None
        assert isinstance(weight, Tensor)
        return LayerInfo(name, kind, tuple(weight.shape), **fact)

    return [info(name, fact) for name, fact in facts.items()]


def count_float_numel(model: nn.Module, layers: Iterable[LayerInfo]) -> int:
    """Values that a deployed subnet keeps in float32: biases, BN, embeddings.

    What `eqnet.deploy.packed` stores: shared tensors once; no gains of standardized weights, which their codes contain; no
    buffers that the model computes when it is built.
    """
    quantized = {f"{layer.name}.{part}" for layer in layers for part in ("weight", "gain")}
    tensors = {id(t): t for name, t in model.state_dict(keep_vars=True).items() if name not in quantized}
    return sum(t.numel() for t in tensors.values() if t.is_floating_point())


class Supernet(nn.Module):
    """A model converted in place to the formats of a space.

    Attributes:
        model: the converted model; its state dict has every float key, plus the quantizers' tables.
        space: the formats each layer may take.
        config: the active config; None means floating point.
        uncovered: names of matrix-like parameters that stay in float (embeddings, packed projections; not gains or tokens).

    Raises:
        ValueError: layers of the space and the model differ in name or shape, or the model is quantized already.
    """

    def __init__(self, model: nn.Module, space: QuantSpace) -> None:
        super().__init__()
        modules = {name: m for name, m in model.named_modules() if isinstance(m, LAYER_TYPES)}
        if any(isinstance(m, QuantMixin) for m in modules.values()):
            raise ValueError("the model is quantized already; build the supernet from a float model.")
        ours = {name: tuple(m._parameters["weight"].shape) for name, m in modules.items()}  # type: ignore[union-attr]
        theirs = {layer.name: layer.weight_shape for layer in space.layers}
        wrong = sorted({name for name, _ in ours.items() ^ theirs.items()})
        if wrong:
            raise ValueError(
                f"the space does not belong to this model: {', '.join(wrong[:5])} missing on one side or of another shape."
            )
        covered = {f"{name}.weight" for name in ours}
        self.uncovered = [
            n for n, p in model.named_parameters() if sum(size > 1 for size in p.shape) > 1 and n not in covered
        ]
        for layer in space.layers:
            make_elastic(modules[layer.name], layer, space)
        self.model = model
        self.space = space
        self.config: QuantConfig | None = None
        self._float_weights = False
        self._layers: dict[str, ElasticLayer] = {layer.name: modules[layer.name] for layer in space.layers}  # type: ignore[misc]
        self.use_kernels(EAGER)
        self.set_config(space.largest())

    @staticmethod
    def from_model(model: nn.Module, input_size: Sequence[int], **choices: Any) -> Supernet:
        """Traces, builds the space and converts; `choices` as in `QuantSpace.from_layers`."""
        layers = trace_layers(model, input_size)
        return Supernet(model, QuantSpace.from_layers(layers, float_numel=count_float_numel(model, layers), **choices))

    def forward(self, x: Tensor) -> Tensor:
        """The model in the active config."""
        return self.model(x)  # type: ignore[no-any-return]

    @property
    def layers(self) -> dict[str, ElasticLayer]:
        """Elastic layers by name."""
        return self._layers

    def quantizers(self) -> Iterator[tuple[str, ElasticQuantizer]]:
        """("layer.weight" or "layer.act", quantizer) of every quantizer."""
        for name, layer in self._layers.items():
            yield f"{name}.weight", layer.weight_quantizer
            if layer.act_quantizer is not None:
                yield f"{name}.act", layer.act_quantizer

    @property
    def kernels(self) -> Kernels:
        """The implementation that the quantizers run on."""
        return self._kernels

    def use_kernels(self, kernels: Kernels) -> None:
        """Runs every quantizer on an implementation from `eqnet.nn.kernels`: same values, another speed."""
        self._kernels = kernels
        for _, quantizer in self.quantizers():
            quantizer.kernels = kernels

    def step_sizes(self) -> list[nn.Parameter]:
        """The tables of step sizes of all quantizers; every entry is positive. That of the image is calibrated, not learned."""
        return [q.scale for _, q in self.quantizers()]

    def latent_weights(self) -> dict[str, nn.Parameter]:
        """The trained weights of the elastic layers by name, in order of execution."""
        return {name: layer.latent_weight for name, layer in self._layers.items()}

    def set_config(self, config: QuantConfig | None) -> None:
        """Activates a config; None switches quantization off. No parameter changes.

        Raises:
            ValueError: the config is not a point of the space.
        """
        if config is not None:
            self.space.check(config)  # before anything changes, so that a refused config leaves the active one intact
        self._switch(config is not None)
        for name, chosen in (config or {}).items():
            layer = self._layers[name]
            layer.weight_quantizer.select(chosen.weight)
            if layer.act_quantizer is not None and chosen.act is not None:
                layer.act_quantizer.select(chosen.act)
        self.config = config

    def _switch(self, on: bool) -> None:
        """Switches quantization on or off, of weights only outside `float_weights`."""
        for layer in self._layers.values():
            layer.weight_quantizer.enabled = on and not self._float_weights
            if layer.act_quantizer is not None:
                layer.act_quantizer.enabled = on

    def rows(self, config: QuantConfig) -> list[int]:
        """The active row of every quantizer in a config, in the order of `quantizers`.

        Raises:
            ValueError: the config is not a point of the space.
        """
        self.space.check(config)
        formats: list[QuantFormat | None] = []
        for name, layer in self._layers.items():
            formats += [config[name].weight] if layer.act_quantizer is None else [config[name].weight, config[name].act]
        return [0 if f is None else q.rows[f] for f, (_, q) in zip(formats, self.quantizers(), strict=True)]

    def set_rows(self, rows: Tensor) -> None:
        """Activates a config by its rows, int64 [quantizers] on the device of the model, without waiting for their values.

        `config` is left to the caller, who knows which one it is.
        """
        self._switch(True)
        torch._foreach_copy_([quantizer.row for _, quantizer in self.quantizers()], list(rows.split(1)))

    @contextmanager
    def float_weights(self) -> Iterator[None]:
        """Configs that are active inside leave the weights in floating point (a phase of MetaMix)."""
        before, self._float_weights = self._float_weights, True
        try:
            self.set_config(self.config)
            yield
        finally:
            self._float_weights = before
            self.set_config(self.config)

    @torch.no_grad()
    def calibrate_weights(self) -> None:
        """Initialises every row of the weight quantizers from the weights as they are (EQ-Net section 3.2)."""

        def calibrate(layer: ElasticLayer) -> None:
            with torch.no_grad():  # each thread has a mode of its own
                layer.weight_quantizer.calibrate(layer.float_weight)

        in_threads(calibrate, sorted(self._layers.values(), key=lambda layer: -layer.latent_weight.numel()))

    @torch.no_grad()
    def calibrate(self, images: Tensor | Iterable[Tensor]) -> None:
        """Initialises every row of every quantizer (EQ-Net section 3.2): weights, then inputs in one forward pass.

        Each input is observed while everything before it runs in the largest config, with the batch's own BN statistics;
        those of the model are left as they were. Several batches need the memory of one: inputs are only counted. What
        comes after an input then runs with its step sizes of the batches so far; the final ones are of all batches.

        Args:
            images: calibration images [N, C, H, W], normalised as in training, or batches of them.

        Raises:
            ValueError: there is no batch, or a value is not finite. Everything is left as it was.
        """

        before = self.config
        quantizers = [quantizer for _, quantizer in self.quantizers()]
        saved = [{name: t.clone() for name, t in q.state_dict().items()} for q in quantizers]
        inputs = [layer.act_quantizer for layer in self._layers.values() if layer.act_quantizer is not None]
        try:
            self.calibrate_weights()
            self.set_config(self.space.largest())
            for quantizer in inputs:
                quantizer.observing = True
            empty = True
            with kept_batch_norm(self), _batch_norm_training(self):
                for batch in [images] if isinstance(images, Tensor) else images:
                    self(batch)
                    empty = False
            if empty:
                raise ValueError("no batch to calibrate with; give at least one image.")
            in_threads(ElasticQuantizer.finish_observation, inputs)
        except BaseException:
            for quantizer, state in zip(quantizers, saved, strict=True):
                quantizer.cancel_observation()
                quantizer.load_state_dict(state)
            raise
        finally:
            self.set_config(before)

    def inherit(self, source: Supernet) -> None:
        """Takes weights, statistics and the rows of its formats from a supernet of the same model in a larger space.

        Raises:
            ValueError: the supernets are of different models, or `source` lacks a format; nothing has changed then.
        """
        theirs = dict(source.quantizers())
        mine = dict(self.quantizers())
        missing = [n for n, q in mine.items() if n not in theirs or not set(q.formats) <= set(theirs[n].formats)]
        if missing:
            raise ValueError(f"the supernet has no step sizes for the formats of {', '.join(missing[:5])}.")
        tables = tuple(f"{n}." for n, m in self.model.named_modules() if isinstance(m, ElasticQuantizer))
        weights = {n: t for n, t in source.model.state_dict().items() if not n.startswith(tables)}
        own = {n: t.shape for n, t in self.model.state_dict().items() if not n.startswith(tables)}
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n, shape in own.items() if shape != weights[n].shape]
        if wrong:
            raise ValueError(f"the supernet is of another model: {', '.join(wrong[:5])} missing or of another shape.")
        self.model.load_state_dict(weights, strict=False)
        for name, quantizer in mine.items():
            quantizer.inherit(theirs[name])

    @property
    def calibrated(self) -> bool:
        """Whether every quantizer has been calibrated (here or in the run that its checkpoint came from)."""
        return all(bool(q.calibrated) for _, q in self.quantizers())

    def recalibrate_bn(self, batches: Iterable[Tensor]) -> None:
        """See `recalibrate_bn`; in the active config."""
        recalibrate_bn(self, batches)

    def extract(self, config: QuantConfig | None = None) -> nn.Module:
        """The subnet of a config (default: the active one) as a model of its own with integer weights, in eval mode.

        Its outputs equal the supernet's bit for bit. BN statistics are those the supernet has now: recalibrate first.

        Raises:
            ValueError: no config is active or given, or it is not a point of the space.
        """
        before = self.config
        config = config or before
        if config is None:
            raise ValueError("quantization is off; give the config to extract.")
        try:
            self.set_config(config)
            subnet = copy.deepcopy(self.model)
        finally:
            self.set_config(before)
        for module in list(subnet.modules()):
            if isinstance(module, ElasticLayer):
                make_quantized(module)
        return subnet.eval()


@contextmanager
def kept_batch_norm(model: nn.Module) -> Iterator[None]:
    """Puts the BN statistics of `model` back as they were, whatever happens to them inside."""
    modules = [m for m in model.modules() if isinstance(m, BATCH_NORM_TYPES)]
    saved = copy.deepcopy([m.state_dict() for m in modules])
    try:
        yield
    finally:
        for module, state in zip(modules, saved, strict=True):
            module.load_state_dict(state)


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """BN normalises with the statistics of each batch and leaves its buffers bit-identical; as before afterwards."""
    modes = [(m, m.training, m.track_running_stats) for m in model.modules() if isinstance(m, BATCH_NORM_TYPES)]
    for module, _, _ in modes:
        module.training, module.track_running_stats = True, False
    try:
        yield
    finally:
        for module, training, tracked in modes:
            module.training, module.track_running_stats = training, tracked


@contextmanager
def _batch_norm_training(model: nn.Module) -> Iterator[None]:
    """Only BN layers in train mode; all modes and momenta as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, BATCH_NORM_TYPES) and module.track_running_stats:
            module.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces BN statistics by their average over `batches` (EQ-Net section 3.5; BigNAS, EagleEye).

    Exact averaging from scratch: the result does not depend on earlier statistics or configs.

    Args:
        model: any network, also one without BN (then nothing happens).
        batches: images [N, C, H, W] of the training split.

    Raises:
        ValueError: there is no batch.
    """
    momenta = [(m, m.momentum) for m in model.modules() if isinstance(m, BATCH_NORM_TYPES) and m.track_running_stats]
    if not momenta:
        return
    for module, _ in momenta:
        module.reset_running_stats()
        module.momentum = None  # cumulative average
    try:
        with _batch_norm_training(model):
            empty = True
            for images in batches:
                model(images)
                empty = False
    finally:
        for module, momentum in momenta:
            module.momentum = momentum
    if empty:
        raise ValueError("no batch to recalibrate BN with; give a sequence, not a generator that has already run.")
