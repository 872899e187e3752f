"""How much each quantizer hurts: additive scores of formats, measured in floating point on a few labelled images.

Every score is a table: a number for each format of each quantizer (weights and inputs of every layer), the smaller the better.
The sum over the quantizers of a config is its *loss*, a `CostModel` that `exact_search` minimises; the genetic search maximises
its negative. No network is trained; the supernet only has to be calibrated, with BN statistics of the floating-point network.

| score | a quantizer Q of the tensor T (weights or inputs), all others off | source |
|---|---|---|
| squared_error | |Q(T) - T|^2 | |
| output_error | mean over layers of |Y_q - Y|^2 / |Y|^2 of their outputs, plus the same of the logits | MCT |
| gradient | sum of (dL/dY * (Y_q - Y))^2 over the output Y of its layer, L the loss of an image | ModelOpt `auto_quantize` |
| fisher | sum of (dL/dT * (Q(T) - T))^2 over T itself: one quantization per format, no further forward pass | |
| kl | KL(p || p_q) of the classes | ModelOpt `auto_quantize` |
| hessian | trace(H) / n * |Q(T) - T|^2, H the Hessian of the loss for T, n its elements (`curvature`) | HAWQ-V2, V3, LCPAQ |
| eigenvalue | largest eigenvalue of H * |Q(T) - T|^2 (`curvature`) | HAWQ |

Sums over inputs and outputs are means over images. Shares of batches are scored by each process and summed.

Shape legend: `F` formats of a quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.nn.supernet import Supernet
from eqnet.scoring.evaluation import class_divergence
from eqnet.space import CostModel, LayerInfo, QuantFormat, QuantSpace, Slot

Batch = tuple[Tensor, Tensor]
Advance = Callable[[], None]
Quantizer = tuple[str, Slot]
SLOTS: tuple[Slot, Slot] = ("weight", "act")
Formats = Sequence[QuantFormat]
Sums = dict[Quantizer, Tensor]  # float64 [F]


@dataclass(frozen=True)
class Sensitivity:
    """A table of one score.

    Attributes:
        score: its name.
        tables: (layer, slot) -> format -> number, the smaller the better.
        facts: what else was found, e.g. traces and their standard errors, by layer and slot.
    """

    score: str
    tables: Mapping[Quantizer, Mapping[QuantFormat, float]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (layer, slot), table in self.tables.items():
            if not np.isfinite(list(table.values())).all():
                raise ValueError(
                    f"the score {self.score!r} of the {slot} quantizer of layer {layer!r} is not finite; check the weights, or "
                    "score other images."
                )

    def loss(self, space: QuantSpace) -> CostModel:
        """The sum over the quantizers of a config, a `CostModel` of `space`.

        Raises:
            ValueError: naming the layer or the format that the table lacks.
        """
        foreign = sorted({layer for layer, _ in self.tables} - {layer.name for layer in space.layers})
        if foreign:
            raise ValueError(
                f"the score {self.score!r} has layers that are not in the space: {', '.join(foreign[:5])}."
            )

        def look_up(layer: str, slot: Slot, fmt: QuantFormat) -> float:
            try:
                return self.tables[layer, slot][fmt]
            except KeyError:
                text = f"{fmt.bits} bits, symmetric={fmt.symmetric}, {fmt.granularity}"
                raise ValueError(f"the score {self.score!r} lacks layer {layer!r}: {slot} at {text}.") from None

        def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
            return look_up(layer.name, "weight", weight) + (0.0 if act is None else look_up(layer.name, "act", act))

        return CostModel(space, "loss", "loss", measure)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        rows = [
            {"layer": layer, "slot": slot, **fmt.to_json(), "value": value}
            for (layer, slot), table in self.tables.items()
            for fmt, value in table.items()
        ]
        return {"score": self.score, "table": rows, "facts": dict(self.facts)}


# supernet, the formats to score (a restriction of its space), labelled images, processes, called once per batch and layer
Score = Callable[[Supernet, QuantSpace, Sequence[Batch], Accelerator, Advance], Sensitivity]


def quantizers(supernet: Supernet) -> dict[Quantizer, ElasticQuantizer]:
    """Every quantizer by layer and slot."""
    found: dict[Quantizer, ElasticQuantizer] = {}
    for name, layer in supernet.layers.items():
        found[name, "weight"] = layer.weight_quantizer
        if layer.act_quantizer is not None:
            found[name, "act"] = layer.act_quantizer
    return found


@contextmanager
def floating_point(supernet: Supernet) -> Iterator[None]:
    """The supernet in floating point and eval mode; its config and mode as before afterwards.

    Raises:
        ValueError: it is not calibrated.
    """
    if not supernet.calibrated:
        raise ValueError("the supernet is not calibrated; call supernet.calibrate(images) before scoring it.")
    config, training = supernet.config, supernet.training
    supernet.eval()
    supernet.set_config(None)
    try:
        yield
    finally:
        supernet.set_config(config)
        supernet.train(training)


def share(batches: Sequence[Batch], accelerator: Accelerator) -> Sequence[Batch]:
    """The batches of this process. Raises ValueError if there are none at all."""
    if not batches:
        raise ValueError("there is no image to score with; give at least one batch.")
    return batches[accelerator.process_index :: accelerator.num_processes]


def reduced(sums: Sums, accelerator: Accelerator) -> Sums:
    """Sums over all processes."""
    everything = torch.cat(list(sums.values())).to(accelerator.device)
    everything = accelerator.reduce(everything, reduction="sum").cpu()
    return dict(zip(sums, everything.split([len(s) for s in sums.values()]), strict=True))


def means(sums: Sums, batches: Sequence[Batch], accelerator: Accelerator) -> Sums:
    """Sums over all processes, divided by the number of images."""
    images = sum(len(labels) for _, labels in batches)
    return {key: values / images for key, values in reduced(sums, accelerator).items()}


def table(space: QuantSpace, sums: Sums) -> dict[Quantizer, dict[QuantFormat, float]]:
    """Numbers [F] of each quantizer by format."""
    return {key: dict(zip(space.choices(*key), values.tolist(), strict=True)) for key, values in sums.items()}


def empty(space: QuantSpace) -> Sums:
    """Zeros for every format of every quantizer."""
    keys = [(layer.name, slot) for layer in space.layers for slot in SLOTS if space.choices(layer.name, slot)]
    return {key: torch.zeros(len(space.choices(*key)), dtype=torch.float64) for key in keys}


@contextmanager
def _on(quantizer: ElasticQuantizer) -> Iterator[None]:
    """Only this quantizer quantizes."""
    quantizer.enabled = True
    try:
        yield
    finally:
        quantizer.enabled = False


@contextmanager
def hooks(modules: Mapping[Any, nn.Module], hook: Callable[[Any, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `hook(key, input, output)` of each module; what it returns replaces the output."""
    with ExitStack() as stack:
        for key, module in modules.items():

            def record(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, key: Any = key) -> Tensor | None:
                return hook(key, args[0], out)

            stack.callback(module.register_forward_hook(record).remove)
        yield


# -- scores ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def squared_error(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sensitivity:
    """Squared error of every format: of the weights, and of the inputs of an image."""
    return Sensitivity("squared_error", table(space, perturbations(supernet, space, batches, accelerator, advance)))


@torch.no_grad()
def perturbations(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sums:
    """|Q(T) - T|^2 of each format of every quantizer: of the weights, and of the inputs of an image, float64 [F]."""
    sums = empty(space)

    def add(name: str, x: Tensor, out: Tensor) -> None:
        quantizer = supernet.layers[name].act_quantizer
        if quantizer is not None:
            sums[name, "act"] += _errors(quantizer, space.choices(name, "act"), x)

    with floating_point(supernet):
        for images, _ in share(batches, accelerator):
            with hooks(supernet.layers, add):  # type: ignore[arg-type]
                supernet(images)
            for _ in supernet.layers:
                advance()
        result = means(sums, batches, accelerator)
        for name, layer in supernet.layers.items():
            result[name, "weight"] = _errors(layer.weight_quantizer, space.choices(name, "weight"), layer.float_weight)
    return result


def _errors(quantizer: ElasticQuantizer, formats: Formats, x: Tensor, slope: Tensor | float = 1.0) -> Tensor:
    """Sum of squares of slope * (Q(x) - x) for each format, float64 [F]."""
    return _per_format(quantizer, formats, lambda: ((quantizer(x) - x) * slope).square().sum())


def _per_format(quantizer: ElasticQuantizer, formats: Formats, value: Callable[[], Tensor]) -> Tensor:
    """`value()` with each format of a quantizer in turn, float64 [F]."""
    values = []
    with _on(quantizer):
        for fmt in formats:
            quantizer.select(fmt)
            values.append(value().double().cpu())
    return torch.stack(values)


def gradient(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sensitivity:
    """ModelOpt's score: squared product of the loss gradient at a layer's output and the change of that output.

    One backward pass per batch serves every layer and format.

    Raises:
        ValueError: a layer that does not run by itself, so that it has no output.
    """
    sums = empty(space)
    with floating_point(supernet):
        for batch in share(batches, accelerator):
            for name, x, slope in _output_gradients(supernet, *batch):
                _add_output_changes(supernet, space, name, x, slope, sums)
            for _ in supernet.layers:
                advance()
    return Sensitivity("gradient", table(space, means(sums, batches, accelerator)))


def _output_gradients(supernet: Supernet, images: Tensor, labels: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Of every call of a layer: its name, its input, and the gradient of the summed loss at its output."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str, x: Tensor, out: Tensor) -> Tensor:
        probe = torch.zeros_like(out, requires_grad=True)
        calls.append((name, x.detach().clone(), probe))  # a copy: later layers may work in place
        return out + probe

    with torch.enable_grad(), hooks(supernet.layers, record):  # type: ignore[arg-type]
        loss = F.cross_entropy(supernet(images), labels, reduction="sum")
    _check_that_all_ran(set(supernet.layers) - {name for name, _, _ in calls})
    gradients = gradients_of(loss, [probe for _, _, probe in calls])
    return [(name, x, slope) for (name, x, _), slope in zip(calls, gradients, strict=True)]


def _check_that_all_ran(missing: set[str]) -> None:
    if missing:
        raise ValueError(
            f"layer {min(missing)!r} never runs by itself, so this score cannot see it; score with kl or squared_error."
        )


@torch.no_grad()
def _add_output_changes(supernet: Supernet, space: QuantSpace, name: str, x: Tensor, slope: Tensor, sums: Sums) -> None:
    """Adds the score of one call of a layer with inputs `x`; `slope` is the gradient at its output."""
    layer = supernet.layers[name]
    assert isinstance(layer, nn.Module)
    exact = layer(x)
    pairs: tuple[tuple[Slot, ElasticQuantizer | None], ...] = (
        ("weight", layer.weight_quantizer),
        ("act", layer.act_quantizer),
    )
    for slot, quantizer in pairs:
        if quantizer is not None:
            formats = space.choices(name, slot)
            sums[name, slot] += _per_format(quantizer, formats, lambda: ((layer(x) - exact) * slope).square().sum())


def fisher(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sensitivity:
    """The gradient score at the quantized tensors themselves: squared product of loss gradient and quantization error.

    The gradient of weights is that of the summed loss of a batch: its square estimates the sum of squares over images where
    gradients of images are independent with mean zero.
    """
    sums, found = empty(space), quantizers(supernet)
    with floating_point(supernet):
        for images, labels in share(batches, accelerator):
            values, probes, loss = probed_loss(supernet, images, labels, reduction="sum")
            flat = [(key, x) for key, calls in values.items() for x in calls]
            slopes = gradients_of(loss, [probe for calls in probes.values() for probe in calls])
            with torch.no_grad():
                for (key, x), slope in zip(flat, slopes, strict=True):
                    sums[key] += _errors(found[key], space.choices(*key), x, slope)
                    if key[1] == "weight":
                        advance()
    return Sensitivity("fisher", table(space, means(sums, batches, accelerator)))


def probed_loss(
    supernet: Supernet, images: Tensor, labels: Tensor, reduction: str
) -> tuple[dict[Quantizer, list[Tensor]], dict[Quantizer, list[Tensor]], Tensor]:
    """The loss of a batch as a function of a change of every quantized tensor.

    Returns:
        The tensors (weights: one; inputs: one per call), as many zeros that were added to them, and the loss.

    Raises:
        ValueError: a layer never runs.
    """
    found = quantizers(supernet)
    values: dict[Quantizer, list[Tensor]] = {key: [] for key in found}
    probes: dict[Quantizer, list[Tensor]] = {key: [] for key in found}

    def add(key: Quantizer, x: Tensor, out: Tensor) -> Tensor:
        if key[1] == "act" or not probes[key]:
            values[key].append(x.detach().clone())
            probes[key].append(torch.zeros_like(out, requires_grad=True))
        return out + probes[key][-1]

    with torch.enable_grad(), hooks(found, add):
        loss = F.cross_entropy(supernet(images), labels, reduction=reduction)
    _check_that_all_ran({name for (name, _), calls in probes.items() if not calls})
    return values, probes, loss


def gradients_of(loss: Tensor, tensors: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a loss. Raises ValueError if it has none."""
    if not loss.requires_grad:
        raise ValueError("the loss of these images has no gradient: the outputs do not depend on any layer.")
    return torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def kl(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sensitivity:
    """KL divergence of the predicted classes from those in floating point, one quantizer at a time."""

    def distance(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Tensor:
        return class_divergence(exact[""], outputs[""])

    return _one_at_a_time("kl", supernet, space, batches, accelerator, advance, distance, [])


def output_error(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sensitivity:
    """MCT's score: normalised squared error of the outputs of all layers (mean) and of the logits, one quantizer at a time."""

    def distance(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Tensor:
        layers = [normalised_error(exact[name], outputs[name]) for name in exact if name]
        return torch.stack(layers).mean(0) + normalised_error(exact[""], outputs[""])

    return _one_at_a_time(
        "output_error", supernet, space, batches, accelerator, advance, distance, list(supernet.layers)
    )


def normalised_error(exact: Tensor, changed: Tensor) -> Tensor:
    """|changed - exact|^2 / |exact|^2 of each image [N, ...], summed over the images."""
    error, size = ((t.double().flatten(1)).square().sum(1) for t in (changed - exact, exact))
    return (error / (size + 1e-8)).sum()


@torch.no_grad()
def _one_at_a_time(
    score: str,
    supernet: Supernet,
    space: QuantSpace,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    advance: Advance,
    distance: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    watched: Sequence[str],
) -> Sensitivity:
    """Runs the network once for each format of each quantizer, and sums a distance from the network in floating point.

    `distance` gets outputs by layer for the layers `watched`, and the logits under "".
    """
    sums, found = empty(space), quantizers(supernet)
    layers = {name: layer for name, layer in supernet.layers.items() if name in watched}

    def run(images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}

        def record(name: str, x: Tensor, out: Tensor) -> None:
            outputs[name] = out.clone()  # later layers may work in place

        with hooks(layers, record):  # type: ignore[arg-type]
            outputs[""] = supernet(images)
        return outputs

    def distances(quantizer: ElasticQuantizer, formats: Formats, images: Tensor, exact: Mapping[str, Tensor]) -> Tensor:
        return _per_format(quantizer, formats, lambda: distance(run(images), exact))

    with floating_point(supernet):
        for images, _ in share(batches, accelerator):
            exact = run(images)
            for key, quantizer in found.items():
                sums[key] += distances(quantizer, space.choices(*key), images, exact)
                if key[1] == "weight":
                    advance()
    return Sensitivity(score, table(space, means(sums, batches, accelerator)))
