"""Configs measured: accuracy, and divergence from the largest subnet.

Every config is measured with BN statistics recalibrated from scratch on the same training images (EQ-Net section 3.5) and
on images that trained nothing (the official code labels with images its supernet has seen). Processes take configs one by one
(`eqnet.scoring.work`).

The divergence is the mean Kullback-Leibler divergence of the class probabilities from those of the largest subnet, in nats:
how much of what the supernet knows a config loses. Every image tells a little of it, where accuracy only has the few
images on which configs disagree, so it orders similar configs far better (docs/results.md, `benchmarks.ranking_measures`).

Configs are ranked with integer kernels where the CPU has them (`eqnet.nn.integer_supernet`). With the same BN statistics
both paths give the same top-1 class on all but about one image in a thousand. Recalibration amplifies rounding: statistics
of low-bit networks differ by up to a few percent between any two implementations of the same convolutions, two
of floating point included, and accuracies by a few tenths of a percent. Therefore a search is measured by one path, and
accuracies on the test split are those of the simulation, whose statistics an extracted subnet carries.

Shape legend: `N` configs, or images; `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from eqnet.data import Batches, Data, DataSplits, bn_batches, random_subset
from eqnet.nn.compiled import choose_kernels
from eqnet.nn.integer import kernels_available
from eqnet.nn.integer_supernet import IntegerSupernet
from eqnet.nn.supernet import Supernet
from eqnet.scoring.work import Advance, shared
from eqnet.settings import Settings
from eqnet.space import Form, QuantConfig, QuantSpace

LabelledBatches = Iterable[tuple[Tensor, Tensor]]
Integer = Literal["auto", "on", "off"]
VALIDATION = "validation"  # the split that chooses
REPORTED = "test"  # the split whose accuracies are reported
DIVERGENCE = "divergence"  # from the largest subnet, on the validation split; a figure beside the accuracies by split
COMPILE_PAYS = 1e10  # quantized inputs on CPU from which compiling, 10 to 20 s, saves more than it costs


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of a GPU in float32, as on a CPU, instead of torch's default there, TF32, which rounds what they read.

    A step size times a code has up to 24 bits; with the 11 of TF32, the accuracy of a 2-bit subnet moved by half a point.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.inference_mode()
def accuracy(model: Callable[[Tensor], Tensor], batches: LabelledBatches) -> float:
    """Top-1 accuracy in percent of a model in eval mode on (images [N, C, H, W], labels [N])."""
    with exact_convolutions():
        hits = [model(images).argmax(1) == labels for images, labels in batches]
    if not hits:
        raise ValueError("there is no image to measure accuracy on.")
    return _percent(torch.cat(hits))


def _percent(hits: Tensor) -> float:
    return 100.0 * int(hits.sum()) / len(hits)


def class_divergence(exact: Tensor, changed: Tensor) -> Tensor:
    """KL(p || q) in nats of the class distributions of logits [N, K], summed over the images."""
    return F.kl_div(changed.double().log_softmax(1), exact.double().log_softmax(1), reduction="sum", log_target=True)


class Evaluator:
    """Measures configs of one supernet.

    Args:
        supernet: in eval mode; its config and BN statistics change.
        bn_batches: training images that recalibrate BN, the same for every config.
        splits: labelled images by split name, e.g. {"validation": [(images, labels), ...]}; iterated anew for each config.
        integer: whether integer kernels run the configs; "auto": where this machine has them.

    Attributes:
        arithmetic: "integer" or "simulation", what runs the configs on all but the test split.
        known: figures of configs that `measure_all` need not measure again.

    Raises:
        ValueError: a split is empty, or integer kernels are asked for where there are none.
    """

    def __init__(
        self,
        supernet: Supernet,
        bn_batches: Sequence[Tensor],
        splits: Mapping[str, LabelledBatches],
        integer: Integer = "auto",
    ) -> None:
        for name, batches in splits.items():
            if not num_images(batches):
                raise ValueError(f"the {name} split is empty; nothing can be measured on it.")
        self.supernet, self.bn_batches, self.splits = supernet.eval(), bn_batches, splits
        on_cpu = all(p.device.type == "cpu" for p in supernet.parameters())
        wanted = integer == "on" or (integer == "auto" and on_cpu and kernels_available())
        self._integer = IntegerSupernet(supernet) if wanted else None
        self.known: dict[QuantConfig, dict[str, float]] = {}
        self._reference: Callable[[], list[Tensor]] = cache(self._largest)

    def of(self, supernet: Supernet) -> Evaluator:
        """An evaluator of another supernet of the same model, on the same images and in the same arithmetic.

        Its divergences are from the largest subnet of this one.
        """
        integer: Integer = "off" if self._integer is None else "on"
        other = Evaluator(supernet, self.bn_batches, self.splits, integer)
        other._reference = self._reference
        return other

    @torch.inference_mode()
    def _largest(self) -> list[Tensor]:
        """Logits [N, K] of the largest subnet on each batch of the validation split."""
        network = self._network(self.supernet.space.largest(), simulate=False)
        return [network(images) for images, _ in self.splits[VALIDATION]]

    @property
    def arithmetic(self) -> Literal["integer", "simulation"]:
        """What runs the configs on all but the test split."""
        return "simulation" if self._integer is None else "integer"

    @staticmethod
    def from_data(supernet: Supernet, data: DataSplits, settings: Settings, device: torch.device) -> Evaluator:
        """The evaluator of a run: its validation and test images, BN recalibrated as its settings say."""
        s, size = settings.search, settings.data.evaluation_batch_size

        def batches(split: Data, limit: int | None) -> Batches:
            kept = split if limit is None else random_subset(split, limit, settings.seed)
            return Batches(
                kept,
                size,
                seed=settings.seed,
                device=device,
                train=False,
                mean=data.mean,
                std=data.std,
                workers=settings.data.workers,
            )

        d = settings.data
        bn = bn_batches(data, s.bn_images, size, settings.seed, device, d.augment, d.workers)
        splits = {"validation": batches(data.validation, s.max_validation_images), "test": batches(data.test, None)}
        return Evaluator(supernet, bn, splits, s.integer)

    def compile_for(self, configs: int) -> None:
        """Compiles the quantizers if so many configs will be measured by simulation that it saves time; same values."""
        images = sum(len(b) for b in self.bn_batches) + num_images(self.splits["validation"])
        values = sum(layer.act_numel for layer in self.supernet.space.layers) * images * configs
        device = next(self.supernet.parameters()).device
        if self._integer is None and (device.type != "cpu" or values >= COMPILE_PAYS):
            self.supernet.use_kernels(choose_kernels("auto", device))

    def recalibrate_float(self) -> None:
        """Gives the supernet the BN statistics of its floating-point network; its config stays."""
        config = self.supernet.config
        try:
            self.supernet.set_config(None)
            self.supernet.recalibrate_bn(self.bn_batches)
        finally:
            self.supernet.set_config(config)

    def measure(self, config: QuantConfig, *figures: str) -> list[float]:
        """Figures of a config, BN recalibrated first: accuracy in percent on a split by its name, or `DIVERGENCE` in nats.

        If the test split is among them, all are simulated, and the supernet keeps the BN statistics of what was measured.
        """
        with exact_convolutions():
            reference = self._reference() if DIVERGENCE in figures else None  # first, it sets another config
            network = self._network(config, simulate=REPORTED in figures)
            found = {} if reference is None else _compare(network, self.splits[VALIDATION], reference)
            return [found[f] if f in found else accuracy(network, self.splits[f]) for f in figures]

    def _network(self, config: QuantConfig, simulate: bool) -> Callable[[Tensor], Tensor]:
        """What computes the logits of a config, by integer kernels unless there are none or it is to be simulated."""
        self.supernet.set_config(config)
        if self._integer is None or simulate:
            self.supernet.recalibrate_bn(self.bn_batches)
            return self.supernet
        self._integer.recalibrate_bn(self.bn_batches)
        return self._integer.freeze()

    def measure_all(
        self,
        configs: Sequence[QuantConfig],
        figures: Sequence[str],
        accelerator: Accelerator,
        advance: Advance | None = None,
    ) -> NDArray[np.float64]:
        """Figures [N, len(figures)] as of `measure`; free processes take the next config, all get everything."""
        known = [self.known.get(config, {}) for config in configs]
        out = np.array([[row.get(f, np.nan) for f in figures] for row in known]).reshape(len(configs), len(figures))
        missing = [i for i, row in enumerate(known) if not row.keys() >= set(figures)]
        for _ in range(len(configs) - len(missing)):
            if advance is not None:
                advance()
        units = shared(len(missing), accelerator, advance)
        mine = [(missing[unit], self.measure(configs[missing[unit]], *figures)) for unit in units]
        for i, values in gather_object(mine):
            out[i] = values
        return out

    def learn_uniform(self, rows: Sequence[UniformAccuracy]) -> None:
        """Takes over what `evaluate_uniform` measured of this supernet, on the same images.

        It measures everything by simulation; where integer kernels measure, only its test accuracies are the same.
        """
        found = {(row.bits, row.form): row.accuracy for row in rows}
        same = {REPORTED} if self.arithmetic == "integer" else {*self.splits, DIVERGENCE}
        for bits, form, config in uniform_configs(self.supernet.space):
            figures = found.get((bits, form), {})
            self.known[config] = {name: value for name, value in figures.items() if name in same}


@torch.inference_mode()
def _compare(
    network: Callable[[Tensor], Tensor], batches: LabelledBatches, reference: Sequence[Tensor]
) -> dict[str, float]:
    """Accuracy on the validation split, and divergence from the logits of a reference on each batch."""
    hits, divergences = [], []
    for (images, labels), exact in zip(batches, reference, strict=True):
        logits = network(images)
        hits.append(logits.argmax(1) == labels)
        divergences.append(class_divergence(exact, logits))
    right = torch.cat(hits)
    return {VALIDATION: _percent(right), DIVERGENCE: float(torch.stack(divergences).sum()) / len(right)}


def num_images(batches: LabelledBatches) -> int:
    """Number of images of a split."""
    return len(batches.data) if isinstance(batches, Batches) else sum(len(labels) for _, labels in batches)


@dataclass(frozen=True)
class UniformAccuracy:
    """Figures of one uniform config: accuracy in percent by split, and `DIVERGENCE` if it was measured."""

    bits: int
    form: Form
    accuracy: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"bits": self.bits, "form": self.form.name, **self.accuracy}


def uniform_configs(space: QuantSpace) -> list[tuple[int, Form, QuantConfig]]:
    """(weight bits, form, config) of every uniform bit-width in every form of the space: 7 x 8 = 56 for the full space.

    See `QuantSpace.uniform_pairs` for spaces whose weights and activations have different bits.
    """
    pairs = [(form, weight, act) for form in space.forms for weight, act in space.uniform_pairs(form)]
    return [(weight, form, space.uniform(weight, form, act)) for form, weight, act in pairs]


def evaluate_uniform(
    evaluator: Evaluator, figures: Sequence[str], accelerator: Accelerator, advance: Advance | None = None
) -> list[UniformAccuracy]:
    """Measures the given figures, as of `Evaluator.measure`, of every uniform config."""
    points = uniform_configs(evaluator.supernet.space)
    measured = evaluator.measure_all([c for _, _, c in points], figures, accelerator, advance)
    return [
        UniformAccuracy(bits, form, dict(zip(figures, row.tolist(), strict=True)))
        for (bits, form, _), row in zip(points, measured, strict=True)
    ]
