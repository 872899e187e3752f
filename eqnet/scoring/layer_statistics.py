"""What training-free proxies know about the layers of a network, gathered once for all proxies and configs.

| statistic | of every layer | source |
|---|---|---|
| samples | some elements of weights and inputs, the same ones of their gradients, Hessian diagonals and quantization errors | EMQ |
| numbers | one number, some for weights and for inputs (below) | |
| losses | the additive scores of every format (`scores`) | LCPAQ, HAWQ-V2, ... |

| number | definition | source |
|---|---|---|
| snip | sum of |t dL/dt| | SNIP |
| grasp | sum of t (H g), H the Hessian and g the gradient; large where gradients flow | GraSP |
| channel_fisher | mean over images, sum over channels, of (sum of a dL/da over positions)^2 / 2 | Fisher pruning |
| synflow | sum of |w| dR/d|w| / R, R = sum f(1; |w|), normalisation bypassed | Synflow |
| trace, eigenvalue | of the Hessian blocks (`curvature`) | HAWQ-V2, HAWQ |
| orm | sum over the other layers of the linear CKA of outputs | OMPQ |
| log_std | log of the standard deviation of the outputs | |
| stage | number of changes of the output's resolution before the layer | |
| macs | multiply-accumulate operations per image | |
| parameters | weights, bias and the parameters that follow up to the next layer (BN) | |

L is the mean loss of labelled images; t a weight or an input value, with sums over inputs averaged over images. Statistics are
of the network in floating point with its trained weights (the official code draws random ones). All are stored by the name of
the layer.

Shape legend: `L` layers, `K` sampled elements, `F` formats of the longest slot (a layer with fewer repeats its last).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from eqnet.checkpoint import load_tensors, save_tensors
from eqnet.nn.supernet import BATCH_NORM_TYPES, Supernet
from eqnet.scoring.curvature import hessian_vector
from eqnet.scoring.scores import SCORES
from eqnet.scoring.sensitivity import Advance, Batch, Sensitivity, floating_point, gradients_of, hooks, probed_loss
from eqnet.space import QuantSpace, Slot

Floats = NDArray[np.float64]
SAMPLES = 256  # elements of each tensor
PRODUCTS = 4  # random sign vectors of the Hessian's diagonal
SLOTS: tuple[Slot, Slot] = ("weight", "act")
SAMPLE_NAMES = (
    *(f"{slot}_{what}" for slot in SLOTS for what in ("value", "gradient", "hessian", "error")),
    "virtual_gradient",
)
NUMBER_NAMES = (
    *(f"{name}_{slot}" for slot in SLOTS for name in ("snip", "grasp", "trace", "eigenvalue")),
    *("channel_fisher", "synflow", "orm", "log_std", "stage", "parameters", "macs"),
)
_CURVATURE = {"trace": "hessian", "eigenvalue": "eigenvalue"}  # the scores that find these numbers on their way


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the layers of a space, in its order of layers.

    Attributes:
        space: whose formats the errors and losses are of.
        samples: by `SAMPLE_NAMES`, float64 [L, 1, K]; errors Q(t) - t are [L, F, K].
        numbers: by `NUMBER_NAMES`, float64 [L].
        losses: by name of the additive score: of weight formats [L, F], of input formats [L, F].
    """

    space: QuantSpace
    samples: Mapping[str, Floats]
    numbers: Mapping[str, Floats]
    losses: Mapping[str, tuple[Floats, Floats]]

    def bits(self, slot: Slot) -> Floats:
        """Bit-width of each format, [L, F]; 0 for inputs in floating point."""
        return padded([[fmt.bits for fmt in self.space.choices(n, slot)] for n in self.names])

    @property
    def names(self) -> list[str]:
        """Layers in order."""
        return [layer.name for layer in self.space.layers]

    def save(self, path: Path) -> None:
        """Writes a safetensors file: one tensor for each statistic of each layer, by its name."""
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(self.names):
            rows = {f"sample.{k}": v[i].astype(np.float32) for k, v in self.samples.items()}
            rows |= {f"number.{k}": v[i : i + 1] for k, v in self.numbers.items()}
            rows |= {f"loss.{k}.{s}": v[j][i] for k, v in self.losses.items() for j, s in enumerate(SLOTS)}
            tensors |= {f"{key}/{layer}": torch.from_numpy(np.ascontiguousarray(row)) for key, row in rows.items()}
        save_tensors(path, tensors)

    @staticmethod
    def load(path: Path, space: QuantSpace) -> LayerStatistics:
        """Reads a file of `save`.

        Raises:
            ValueError: it is missing or damaged, or it lacks a layer of the space or has others; named.
        """
        tensors = load_tensors(path)
        names = [layer.name for layer in space.layers]
        found = {key.partition("/")[2] for key in tensors}
        if found != set(names):
            wrong = ", ".join(sorted(found ^ set(names))[:5])
            raise ValueError(f"'{path}' has statistics of other layers than the space: {wrong}.")
        keys = dict.fromkeys(key.partition("/")[0] for key in tensors)
        try:
            stacked = {key: torch.stack([tensors[f"{key}/{n}"] for n in names]).double().numpy() for key in keys}
            samples = {name: stacked[f"sample.{name}"] for name in SAMPLE_NAMES}
            numbers = {k.partition(".")[2]: v[:, 0] for k, v in stacked.items() if k.startswith("number.")}
            scores = dict.fromkeys(k.split(".")[1] for k in stacked if k.startswith("loss."))
            losses = {name: (stacked[f"loss.{name}.weight"], stacked[f"loss.{name}.act"]) for name in scores}
            statistics = LayerStatistics(space, samples, numbers, losses)
            for slot in SLOTS:
                if samples[f"{slot}_error"].shape[1] != statistics.bits(slot).shape[1]:
                    raise ValueError(f"another number of {slot} formats")
        except (KeyError, RuntimeError, IndexError, ValueError) as error:
            raise ValueError(f"'{path}' does not hold the statistics of this space: {error}.") from error
        return statistics


def padded(rows: Sequence[Sequence[float]]) -> Floats:
    """Rows of unequal length as [L, F]; the last entry of a row is repeated, an empty row is zero.

    Examples:
        >>> padded([[1, 2, 3], [4], []]).tolist()
        [[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]
    """
    width = max(1, *(len(row) for row in rows))
    return np.array([[*row, *[row[-1] if row else 0] * (width - len(row))] for row in rows], float)


def gather(
    supernet: Supernet,
    space: QuantSpace,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    advance: Advance = lambda: None,
    scores: Collection[str] = tuple(SCORES),
) -> LayerStatistics:
    """Statistics of a calibrated supernet, with BN statistics of its floating-point network.

    Args:
        supernet: its config, mode and statistics are as before afterwards.
        space: the formats of interest, a restriction of the supernet's space.
        batches: labelled images; the samples and top eigenvalues are those of the first batch.
        accelerator: additive scores are shared by its processes.
        advance: called once per score and once in the end.
        scores: which additive scores to include; traces and eigenvalues are there with "hessian" and "eigenvalue".

    Raises:
        ValueError: it is not calibrated, there is no image, or as the scores.
    """
    found: dict[str, Sensitivity] = {}
    for name in scores:
        found[name] = SCORES[name](
            supernet, space, batches[:1] if name == "eigenvalue" else batches, accelerator, _idle
        )
        advance()
    numbers = {name: np.zeros(len(space.layers)) for name in NUMBER_NAMES if not name.startswith(tuple(_CURVATURE))}
    for number, score in _CURVATURE.items():
        if score in found:
            numbers |= _curvature(number, found[score], space)
    samples: dict[str, list[NDArray[np.float32]]] = {name: [] for name in SAMPLE_NAMES}
    with floating_point(supernet):
        gradients = _first_order(supernet, space, batches, numbers)
        diagonals = _second_order(supernet, space, batches, numbers)
        outputs = _outputs(supernet, batches[0][0])
        virtual = _from_ones(supernet, batches[0][0][:1])
        for index, layer in enumerate(space.layers):
            own = _sampled(supernet, space, layer.name, index, gradients, diagonals, virtual)
            for name, values in own.items():
                samples[name].append(values)
        _describe_outputs(space, outputs, numbers)
        numbers["synflow"] = _synflow(supernet, space, batches[0][0][:1])
    numbers["parameters"] = _parameters(supernet, space)
    numbers["macs"] = np.array([layer.macs for layer in space.layers], float)
    losses = {name: _loss_tables(score, space) for name, score in found.items()}
    advance()
    return LayerStatistics(space, {k: np.stack(v).astype(float) for k, v in samples.items()}, numbers, losses)


def _idle() -> None:
    """Progress that nobody watches."""


def _loss_tables(score: Sensitivity, space: QuantSpace) -> tuple[Floats, Floats]:
    def rows(slot: Slot) -> Floats:
        choices = [(layer.name, space.choices(layer.name, slot)) for layer in space.layers]
        return padded([[score.tables[name, slot][fmt] for fmt in formats] for name, formats in choices])

    return rows("weight"), rows("act")


def _curvature(number: str, score: Sensitivity, space: QuantSpace) -> dict[str, Floats]:
    """Traces (not per element) or top eigenvalues by slot."""
    per_element = number == "trace"
    values = score.facts["trace_per_element" if per_element else "eigenvalue"]
    out = {}
    for slot in SLOTS:
        sizes = [(x.weight_numel if slot == "weight" else x.act_numel) if per_element else 1 for x in space.layers]
        own = [values.get(f"{layer.name}.{slot}", 0.0) for layer in space.layers]
        out[f"{number}_{slot}"] = np.array(own, float) * sizes
    return out


# -- gradients --------------------------------------------------------------------------------------------------------

Tensors = dict[tuple[str, Slot], Tensor]  # flat


def _first_order(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], numbers: dict[str, Floats]
) -> tuple[Tensors, Tensors]:
    """SNIP and Fisher numbers; weights with their mean gradients, and the inputs of the first batch with theirs, flat."""
    place = {layer.name: i for i, layer in enumerate(space.layers)}
    values: Tensors = {}
    slopes: Tensors = {}
    for images, labels in batches:
        tensors, probes, loss = probed_loss(supernet, images, labels, reduction="mean")
        flat = [probe for calls in probes.values() for probe in calls]
        found = iter(gradients_of(loss, flat))
        for (name, slot), calls in tensors.items():
            own = [next(found).detach() for _ in calls]
            if slot == "weight":
                values[name, slot] = calls[0].flatten()
                slopes[name, slot] = slopes.get((name, slot), 0.0) + own[0].flatten() / len(batches)
                continue
            numbers["snip_act"][place[name]] += sum(float((x * g).abs().sum()) for x, g in zip(calls, own, strict=True))
            fisher = sum(_channel_fisher(x, g) for x, g in zip(calls, own, strict=True))
            numbers["channel_fisher"][place[name]] += fisher / len(batches)
            if (name, slot) not in values:
                values[name, slot] = torch.cat([x.flatten() for x in calls])
                slopes[name, slot] = torch.cat([g.flatten() for g in own])
    numbers["snip_act"] /= len(batches)
    for name, i in place.items():
        numbers["snip_weight"][i] = float((values[name, "weight"] * slopes[name, "weight"]).abs().double().sum())
    return values, slopes


def _channel_fisher(x: Tensor, slope: Tensor) -> float:
    """Of inputs [N, C, ...] and gradients of the mean loss: those of an image are N times as large."""
    product = (x * slope * len(x)).double()
    channels = product.flatten(2).sum(2) if product.ndim > 2 else product
    return float(channels.square().sum()) / (2 * len(x))


def _second_order(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], numbers: dict[str, Floats]
) -> Tensors:
    """GraSP numbers and the Hessian's diagonal (Hutchinson, v * Hv) of weights and inputs, both on the first batch, flat."""
    place = {layer.name: i for i, layer in enumerate(space.layers)}
    generator = torch.Generator().manual_seed(0)
    values, probes, loss = probed_loss(supernet, *batches[0], reduction="mean")
    flat = [probe for calls in probes.values() for probe in calls]
    gradients = gradients_of(loss, flat, create_graph=True)
    flow = iter(hessian_vector(gradients, flat, [g.detach() for g in gradients]))
    for (name, slot), calls in values.items():
        numbers[f"grasp_{slot}"][place[name]] = sum(float((x * next(flow)).double().sum()) for x in calls)
    diagonal = [torch.zeros_like(t) for t in flat]
    for _ in range(PRODUCTS):
        signs = [(torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t) for t in flat]
        for total, v, product in zip(diagonal, signs, hessian_vector(gradients, flat, signs), strict=True):
            total += v * product / PRODUCTS
    found = iter(diagonal)
    return {key: torch.cat([next(found).flatten() for _ in calls]) for key, calls in probes.items()}


def _from_ones(supernet: Supernet, image: Tensor, *, magnitudes: bool = False) -> dict[str, Tensor]:
    """Gradients of the sum of the outputs for an image of ones with respect to the weights (or their magnitudes) by layer."""
    probes: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, out: Tensor) -> Tensor:
        if name not in probes:
            probes[name] = torch.zeros_like(out, requires_grad=True)
        return (out.abs() if magnitudes else out) + probes[name]

    quantizers = {name: layer.weight_quantizer for name, layer in supernet.layers.items()}
    with torch.enable_grad(), hooks(quantizers, add):
        total = supernet(torch.ones_like(image)).sum()
    if not bool(total.isfinite()):
        raise ValueError("the outputs for an image of ones are not finite; virtual gradients and Synflow need them.")
    slopes = dict(zip(probes, gradients_of(total, list(probes.values())), strict=True))
    return {name: slope / (total.detach() if magnitudes else 1.0) for name, slope in slopes.items()}


def _synflow(supernet: Supernet, space: QuantSpace, image: Tensor) -> Floats:
    """Synaptic flow of each layer as a part of R, [L], in float64 on a copy without normalisation."""
    net = copy.deepcopy(supernet).double()
    for parameter in net.model.parameters():
        parameter.data.abs_()
    for module in net.modules():
        if isinstance(module, BATCH_NORM_TYPES):
            module.register_forward_hook(lambda _, args, out: args[0])
    slopes = _from_ones(net, image.double(), magnitudes=True)
    weights = {name: layer.float_weight.detach().abs() for name, layer in net.layers.items()}
    return np.array([float((weights[x.name] * slopes[x.name]).sum()) for x in space.layers])


# -- samples, outputs, parameters -------------------------------------------------------------------------------------


@torch.no_grad()
def _sampled(
    supernet: Supernet,
    space: QuantSpace,
    name: str,
    index: int,
    gradients: tuple[Tensors, Tensors],
    diagonals: Tensors,
    virtual: Mapping[str, Tensor],
) -> dict[str, NDArray[np.float32]]:
    """The same elements of every tensor of a layer, [1, K] each, errors [F, K]; zeros for inputs in floating point."""
    values, slopes = gradients
    out: dict[str, NDArray[np.float32]] = {}
    layer = supernet.layers[name]
    for slot, quantizer in zip(SLOTS, (layer.weight_quantizer, layer.act_quantizer), strict=True):
        width = max(1, *(len(space.choices(x.name, slot)) for x in space.layers))
        if quantizer is None:
            out |= {f"{slot}_{what}": np.zeros((1, SAMPLES), np.float32) for what in ("value", "gradient", "hessian")}
            out[f"{slot}_error"] = np.zeros((width, SAMPLES), np.float32)
            continue
        exact = layer.float_weight if slot == "weight" else values[name, slot]
        rng = np.random.default_rng((index, SLOTS.index(slot)))
        chosen = torch.from_numpy(rng.integers(exact.numel(), size=SAMPLES)).to(exact.device)
        for what, tensors in (("value", values), ("gradient", slopes), ("hessian", diagonals)):
            out[f"{slot}_{what}"] = tensors[name, slot][chosen][None].cpu().numpy()
        if slot == "weight":
            out["virtual_gradient"] = virtual[name].flatten()[chosen][None].cpu().numpy()
        else:
            exact = exact[chosen]  # one step size for all: the sampled values are enough
        errors = []
        quantizer.enabled = True
        for fmt in space.choices(name, slot):
            quantizer.select(fmt)
            error = (quantizer(exact) - exact).flatten()
            errors.append((error[chosen] if slot == "weight" else error).cpu().numpy())
        quantizer.enabled = False
        out[f"{slot}_error"] = np.stack([*errors, *errors[-1:] * (width - len(errors))])
    return out


@torch.no_grad()
def _outputs(supernet: Supernet, images: Tensor) -> dict[str, Tensor]:
    """The outputs of the layers, of the first call of each."""
    outputs: dict[str, Tensor] = {}

    def record(name: str, x: Tensor, out: Tensor) -> None:
        outputs.setdefault(name, out.clone())  # later layers may work in place

    with hooks(supernet.layers, record):  # type: ignore[arg-type]
        supernet(images)
    return outputs


def _describe_outputs(space: QuantSpace, outputs: Mapping[str, Tensor], numbers: dict[str, Floats]) -> None:
    """Similarities, spreads and stages; layers that do not run by themselves keep zeros and the stage before."""
    features = {name: out.flatten(1).double().cpu().numpy() for name, out in outputs.items()}
    stage, before = -1, 0
    for i, layer in enumerate(space.layers):
        if layer.name in outputs:
            own = outputs[layer.name]
            others = [linear_cka(features[layer.name], features[n]) for n in features if n != layer.name]
            numbers["orm"][i] = sum(others)
            numbers["log_std"][i] = np.log(max(float(own.double().std()), 1e-300))
            positions = own[0, 0].numel()
            stage, before = stage + (positions != before), positions
        numbers["stage"][i] = max(stage, 0)


def linear_cka(x: Floats, y: Floats) -> float:
    """Linear centred kernel alignment of features [N, P] and [N, R] of the same N inputs: the ORM of OMPQ, 0 to 1.

    Examples:
        >>> x = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]])
        >>> round(linear_cka(x, x), 12), round(linear_cka(x, 7 * x[:, ::-1] + 1), 12)
        (1.0, 1.0)
    """
    grams = []
    for features in (x, y):
        centred = features - features.mean(0)
        grams.append(centred @ centred.T)
    scale = np.linalg.norm(grams[0]) * np.linalg.norm(grams[1])
    return float((grams[0] * grams[1]).sum() / scale) if scale > 0 else 0.0


def _parameters(supernet: Supernet, space: QuantSpace) -> Floats:
    """Weights and bias of each layer, and the parameters defined after it and before the next one (BN), [L]."""
    counts = dict.fromkeys((layer.name for layer in space.layers), 0)
    skipped = {id(p) for _, quantizer in supernet.quantizers() for p in quantizer.parameters()}
    seen: set[int] = set()
    owner = next(iter(counts))
    for path, module in supernet.model.named_modules():
        owner = path if path in counts else owner
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in skipped | seen:
                seen.add(id(parameter))
                counts[owner] += parameter.numel()
    return np.array([counts[layer.name] for layer in space.layers], float)
