"""CQAP, the conditional quantization-aware accuracy predictor: config -> accuracy (EQ-Net section 3.4, arXiv 2308.07650).

A small regression from `QuantSpace.features` (form conditions, then one-hot bits of each layer) to measured accuracy,
fitted on a table of a few hundred subnets. One predictor serves every target: configs are always encoded in the space it
was fitted for, so genomes of a restricted space are translated first.

Departs from the official code, whose recipe stays available as `PAPER_RECIPE`. Seven layers of 200 units on one-hot bits
need thousands of rows; the default recipe is made for hundreds. The one-hot of each layer is projected on `b`, `2^-b` and
`4^-b` (step size and quantization noise power go as the latter two), inputs and targets are standardized, one wide hidden
layer runs beside a linear path, and a few such networks are averaged. On synthetic truths of 22 and 54 layers 400 rows then
give Kendall's tau of 0.91 to 0.93, and 0.38 to 0.82 with the paper's recipe. The official code computes tau and drops it; here
rank quality on held-out rows is what `fit` returns.

Shape legend: `N` configs, `G` genes, `F` features, `I` inputs of the networks, `K` networks of the ensemble, `H` hidden units.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import scipy.stats
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from eqnet.checkpoint import atomic_write_bytes, load_tensors
from eqnet.space.space import Genomes, QuantSpace

Floats = NDArray[np.float64]
MIN_ROWS = 10
_FORMAT = "eqnet predictor 1"
_CHUNK = 4096  # rows scored at a time, so that features and hidden units stay in the cache
_PAIR_SHIFTS = 8  # partners of each row in one step of the ranking loss


@dataclass(frozen=True, slots=True)
class PredictorRecipe:
    """Architecture and training of a predictor.

    Attributes:
        hidden: units of each hidden layer.
        depth: number of hidden layers (Linear + ReLU); a linear output without bias follows.
        members: networks averaged; they differ in their initial weights.
        inputs: "onehot" feeds the features as they are, "smooth" three smooth functions of the bits of each layer.
        linear_path: adds a linear map from the inputs to the output of each network.
        standardize: inputs and targets to mean 0 and deviation 1; otherwise targets are accuracy / 100.
        epochs: passes over the table; the learning rate falls to 0 along a cosine.
        batch_size: rows of a step; None means all, where the number of steps acts as the regularizer.
        learning_rate: of Adam, at the first step.
        weight_decay: of Adam, as a gradient of the squared weights.
        ranking_weight: weight of a logistic loss on the order of random pairs, beside the SmoothL1 loss.
    """

    hidden: int = 64
    depth: int = 1
    members: int = 4
    inputs: Literal["smooth", "onehot"] = "smooth"
    linear_path: bool = True
    standardize: bool = True
    epochs: int = 200
    batch_size: int | None = None
    learning_rate: float = 4e-3
    weight_decay: float = 3e-3
    ranking_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden", "depth", "members", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"predictor.{name} must be at least 1; got {getattr(self, name)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"predictor.batch_size must be at least 1, or None for all rows; got {self.batch_size}.")
        if self.inputs not in ("smooth", "onehot"):
            raise ValueError(f"predictor.inputs must be 'smooth' or 'onehot'; got {self.inputs!r}.")
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.ranking_weight < 0:
            raise ValueError(
                "predictor.learning_rate must be positive; its weight_decay and ranking_weight not negative."
            )


PAPER_RECIPE = PredictorRecipe(
    hidden=200,
    depth=7,
    members=1,
    inputs="onehot",
    linear_path=False,
    standardize=False,
    epochs=100,
    batch_size=256,
    learning_rate=4e-4,
    weight_decay=1e-5,
)
"""The official recipe (learning rate constant there); it wants the 6400 rows of the paper."""


class HeldOut(NamedTuple):
    """Accuracies of the rows that a predictor did not see, in percent.

    Attributes:
        predicted: float64 [N].
        measured: float64 [N].
    """

    predicted: Floats
    measured: Floats


def rank_metrics(predicted: ArrayLike, measured: ArrayLike) -> dict[str, float]:
    """How well predictions order and match measurements.

    >>> {name: round(value, 2) for name, value in rank_metrics([60, 61, 63], [60, 62, 63]).items()}
    {'kendall': 1.0, 'spearman': 1.0, 'pearson': 0.93, 'rmse': 0.58}

    Args:
        predicted: numbers [N].
        measured: numbers [N].

    Returns:
        "kendall" (tau-b), "spearman" and "pearson" (0.0 where undefined: one side is constant), "rmse" in the unit given.

    Raises:
        ValueError: unequal lengths, or fewer than two rows.
    """
    x, y = np.asarray(predicted, float), np.asarray(measured, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(
            f"rank metrics need two lists of the same length of at least 2; got shapes {x.shape}, {y.shape}."
        )
    out = {"kendall": 0.0, "spearman": 0.0, "pearson": 0.0}
    if np.ptp(x) > 0 and np.ptp(y) > 0:
        out["kendall"] = float(scipy.stats.kendalltau(x, y).statistic)
        out["spearman"] = float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])
        out["pearson"] = float(np.corrcoef(x, y)[0, 1])
    return {**out, "rmse": float(np.sqrt(np.mean((x - y) ** 2)))}


class AccuracyPredictor:
    """Accuracy of configs of one space, learned from a table.

    Attributes:
        space: the space that configs are encoded in, the training space of the supernet.
        recipe: architecture and training.
        metrics: what the last `fit` returned; empty before.
        held_out: (predicted, measured) accuracy of the held-out fifth of the last `fit`; None before.
    """

    def __init__(self, space: QuantSpace, recipe: PredictorRecipe | None = None) -> None:
        """An unfitted predictor; the default recipe suits tables of 100 to 1000 rows."""
        self.space = space
        self.recipe = recipe or PredictorRecipe()
        self.metrics: dict[str, float] = {}
        self.held_out: HeldOut | None = None
        self._ensemble: _Ensemble | None = None

    def fit(self, genomes: Genomes, accuracy: ArrayLike, *, seed: int, refit: bool = True) -> dict[str, float]:
        """Fits to measured accuracy, in seconds; the same seed gives the same predictor.

        The metrics are those of a predictor that has seen four fifths of the rows, on the other fifth. With `refit` the one
        that is kept is then fitted on all rows, so it should be slightly better than they say.

        Args:
            genomes: configs measured, [N, G] of `self.space`.
            accuracy: top-1 in percent, [N].
            seed: of the split and of the initial weights.
            refit: keep a predictor fitted on all rows; otherwise the one of the metrics.

        Returns:
            `rank_metrics` on the held-out fifth; "rmse" in accuracy points.

        Raises:
            ValueError: fewer than 10 rows, arrays that do not fit together, or accuracies that are not finite.
        """
        targets = _checked_table(self.space, genomes, accuracy)
        inputs = self._inputs(genomes)
        kept, held_out = _split(len(targets), seed)
        ensemble = _Ensemble.fit(inputs[kept], targets[kept], self.recipe, seed)
        self.held_out = HeldOut(ensemble.predict(inputs[held_out]), targets[held_out])
        self.metrics = rank_metrics(*self.held_out)
        self._ensemble = _Ensemble.fit(inputs, targets, self.recipe, seed) if refit else ensemble
        return dict(self.metrics)

    def score(self, genomes: Genomes, space: QuantSpace | None = None) -> Floats:
        """Predicted accuracy in percent, float64 [N].

        Args:
            genomes: [N, G].
            space: what `genomes` are of, a restriction of `self.space`; None means `self.space`.

        Raises:
            ValueError: not fitted yet, or a space that is not contained in the one the predictor was fitted for.
        """
        if self._ensemble is None:
            raise ValueError("the predictor has not been fitted; call fit() or load one.")
        if space is not None and space is not self.space:
            genomes = _translated(self.space, genomes, space)
        out = np.empty(len(genomes))
        for i in range(0, len(genomes), _CHUNK):
            out[i : i + _CHUNK] = self._ensemble.predict(self._inputs(genomes[i : i + _CHUNK]))
        return out

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, with the recipe and the space in its header, atomically.

        Raises:
            ValueError: not fitted yet.
        """
        if self._ensemble is None or self.held_out is None:
            raise ValueError("the predictor has not been fitted, so there is nothing to save; call fit() first.")
        header = {
            "format": _FORMAT,
            "recipe": json.dumps(asdict(self.recipe)),
            "space": json.dumps(self.space.to_json()),
        }
        held_out = torch.from_numpy(np.stack(self.held_out))
        atomic_write_bytes(path, safetensors.torch.save({**self._ensemble.tensors, "held_out": held_out}, header))

    @staticmethod
    def load(path: str | Path, space: QuantSpace) -> AccuracyPredictor:
        """Reads what `save` wrote; scores are identical.

        Args:
            path: the file.
            space: the training space, which must be the one the predictor was fitted for.

        Raises:
            ValueError: the file is missing, truncated or not a predictor, or it was fitted for another space.
        """
        tensors = load_tensors(path)
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise ValueError(f"'{path}' is not an accuracy predictor of this version.")
        if QuantSpace.from_json(json.loads(header["space"])) != space:
            raise ValueError(
                f"the predictor '{path}' was fitted for another quantization space; load it with the space of the supernet "
                "and pass restrictions of it to score()."
            )
        predictor = AccuracyPredictor(space, PredictorRecipe(**json.loads(header["recipe"])))
        predictor.held_out = HeldOut(*tensors.pop("held_out").numpy())
        predictor.metrics = rank_metrics(*predictor.held_out)
        predictor._ensemble = _Ensemble(tensors)
        return predictor

    def _inputs(self, genomes: Genomes) -> Tensor:
        """Features, projected if the recipe says so, float32 [N, I]."""
        features = torch.from_numpy(self.space.features(genomes))
        if self.recipe.inputs == "onehot":
            return features
        levels = torch.from_numpy(self.space.bit_levels.astype(np.float32))
        above = levels - levels.min()
        basis = torch.stack([levels / levels.max(), 2**-above, 4**-above], 1)  # [levels, 3]
        conditions, bits = features[:, :6], features[:, 6:]
        smooth = bits.reshape(-1, len(levels)) @ basis
        return torch.cat([conditions, smooth.reshape(len(features), -1)], 1)


def table_size_curve(
    space: QuantSpace,
    genomes: Genomes,
    accuracy: ArrayLike,
    sizes: Sequence[int],
    *,
    seed: int,
    recipe: PredictorRecipe | None = None,
) -> list[dict[str, float]]:
    """What more measurements would buy: rank quality on one held-out fifth for growing tables.

    Args:
        space: the training space.
        genomes: configs measured, [N, G].
        accuracy: top-1 in percent, [N].
        sizes: numbers of training rows, each from 2 to four fifths of the table; smaller tables are part of larger ones.
        seed: of the split and of the initial weights.
        recipe: None for the default.

    Returns:
        For each size: "rows" and the `rank_metrics`.

    Raises:
        ValueError: as for `AccuracyPredictor.fit`, or a size out of range.
    """
    predictor = AccuracyPredictor(space, recipe)
    targets = _checked_table(space, genomes, accuracy)
    inputs = predictor._inputs(genomes)
    kept, held_out = _split(len(targets), seed)
    curve = []
    for size in sizes:
        if not 2 <= size <= len(kept):
            raise ValueError(
                f"a table of {len(targets)} rows leaves 2 to {len(kept)} rows for training; got size {size}."
            )
        ensemble = _Ensemble.fit(inputs[kept[:size]], targets[kept[:size]], predictor.recipe, seed)
        curve.append({"rows": size, **rank_metrics(ensemble.predict(inputs[held_out]), targets[held_out])})
    return curve


class _Ensemble:
    """K networks of the same shape, evaluated together with batched matrix products."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Takes "weight.i" [K, in, out], "bias.i" [K, 1, out], "linear" [K, I, 1] (maybe), "input" [2, I], "target" [2]."""
        self.tensors = tensors
        self.depth = sum(name.startswith("bias.") for name in tensors)

    @staticmethod
    def fit(inputs: Tensor, accuracy: Floats, recipe: PredictorRecipe, seed: int) -> _Ensemble:
        """Trains on inputs [N, I] and accuracy [N]; independent of global random state and of the gradient mode."""
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False), torch.enable_grad(), _one_thread():
            ensemble = _Ensemble._initial(inputs.clone(), accuracy, recipe, generator)
            ensemble._train(inputs.clone(), torch.from_numpy(accuracy), recipe, generator)
        return ensemble

    @staticmethod
    def _initial(inputs: Tensor, accuracy: Floats, recipe: PredictorRecipe, generator: torch.Generator) -> _Ensemble:
        """Untrained networks with the initial weights of `torch.nn.Linear`, and the standardization."""
        sizes = [inputs.shape[1], *[recipe.hidden] * recipe.depth, 1]
        tensors: dict[str, Tensor] = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            shapes = {"weight": (recipe.members, fan_in, fan_out), "bias": (recipe.members, 1, fan_out)}
            for name in ("weight", "bias") if i < recipe.depth else ("weight",):
                uniform = torch.rand(shapes[name], generator=generator, device="cpu", dtype=torch.float32)
                tensors[f"{name}.{i}"] = (2 * uniform - 1) / math.sqrt(fan_in)
        if recipe.linear_path:
            tensors["linear"] = torch.zeros(recipe.members, sizes[0], 1)
        shift, scale = torch.zeros(sizes[0]), torch.ones(sizes[0])
        target = torch.tensor([0.0, 100.0], dtype=torch.float64)
        if recipe.standardize:
            shift, deviation = inputs.mean(0), inputs.std(0, correction=0)
            scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0)  # constant inputs say nothing
            target = torch.tensor([accuracy.mean(), max(accuracy.std(), 1e-6)], dtype=torch.float64)
        return _Ensemble({**tensors, "input": torch.stack([shift, scale]), "target": target})

    def _train(self, inputs: Tensor, accuracy: Tensor, recipe: PredictorRecipe, generator: torch.Generator) -> None:
        parameters = [t.requires_grad_() for name, t in self.tensors.items() if name not in ("input", "target")]
        mean, deviation = self.tensors["target"]
        goal = ((accuracy - mean) / deviation).float()
        rows = len(goal)
        batch = min(recipe.batch_size or rows, rows)
        steps = recipe.epochs * -(-rows // batch)
        optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(recipe.epochs):
            order = torch.randperm(rows, generator=generator, device="cpu") if batch < rows else torch.arange(rows)
            for part in order.split(batch):
                output = self._forward(inputs[part])  # [K, N]
                wanted = goal[part].expand_as(output)
                loss = torch.nn.functional.smooth_l1_loss(output, wanted)
                if recipe.ranking_weight:
                    loss = loss + recipe.ranking_weight * _ranking_loss(output, wanted, generator)
                optimizer.zero_grad()
                (loss * recipe.members).backward()  # each network gets the gradient it would get alone
                optimizer.step()
                schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _forward(self, inputs: Tensor) -> Tensor:
        """Standardized accuracy by each network, [K, N]."""
        shift, scale = self.tensors["input"]
        standard = ((inputs - shift) * scale).expand(len(self.tensors["weight.0"]), -1, -1)
        hidden = standard
        for i in range(self.depth):
            hidden = torch.baddbmm(self.tensors[f"bias.{i}"], hidden, self.tensors[f"weight.{i}"]).relu_()
        output: Tensor = hidden @ self.tensors[f"weight.{self.depth}"]
        if "linear" in self.tensors:
            output = torch.baddbmm(output, standard, self.tensors["linear"])
        return output[..., 0]

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Floats:
        """Accuracy in percent, the mean of the networks, float64 [N]."""
        mean, deviation = self.tensors["target"]
        with _one_thread():
            outputs = self._forward(inputs)
        out: Floats = (outputs.double().mean(0) * deviation + mean).numpy()
        return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that a search does not depend on the number of threads; small networks lose nothing by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ranking_loss(output: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of log(1 + exp(-difference)) over random pairs, the difference in the wanted direction; both [K, N]."""
    rows = output.shape[1]
    shifts = torch.randint(rows, (_PAIR_SHIFTS, 1), generator=generator, device="cpu")
    partner = (torch.arange(rows) + shifts) % rows  # [shifts, N]
    sign = (wanted[:, None] - wanted[:, partner]).sign()
    wrong = -sign * (output[:, None] - output[:, partner])
    loss: Tensor = (torch.nn.functional.softplus(wrong) * sign.abs()).mean()
    return loss


def _split(rows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Four fifths for training and one fifth held out, in random order."""
    order = np.random.default_rng(seed).permutation(rows)
    held_out = rows // 5
    return order[held_out:], order[:held_out]


def _checked_table(space: QuantSpace, genomes: Genomes, accuracy: ArrayLike) -> Floats:
    """The accuracies as an array; ValueError if the table cannot be fitted."""
    values = np.asarray(accuracy, float)
    if genomes.ndim != 2 or genomes.shape[1] != space.num_genes:
        raise ValueError(f"the table has genomes of shape {genomes.shape}; the space has {space.num_genes} genes.")
    if values.shape != (len(genomes),):
        raise ValueError(f"the table has {len(genomes)} configs but accuracies of shape {values.shape}.")
    if len(values) < MIN_ROWS:
        raise ValueError(f"an accuracy table needs at least {MIN_ROWS} configs to fit a predictor; got {len(values)}.")
    if not np.isfinite(values).all():
        raise ValueError(
            f"the accuracy table has a value that is not finite in row {int(np.isfinite(values).argmin())}."
        )
    return values


def _translated(space: QuantSpace, genomes: Genomes, source: QuantSpace) -> Genomes:
    """`space.translate`, with a ValueError if `source` is not contained in `space`."""
    same_layers = [g.layers for g in source.genes] == [g.layers for g in space.genes]
    if not same_layers or any(
        not set(theirs.formats) <= set(ours.formats) for theirs, ours in zip(source.genes, space.genes, strict=True)
    ):
        raise ValueError("the configs are of a space that is not contained in the one the predictor was fitted for.")
    return space.translate(genomes, source)
