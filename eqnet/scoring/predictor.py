"""CQAP, the conditional quantization-aware accuracy predictor: config -> accuracy (EQ-Net section 3.4, arXiv 2308.07650).

A small regression from `QuantSpace.features` (form conditions, then one-hot bits of each layer) to accuracy,
fitted on a table of a few hundred subnets. One predictor serves every target: configs are always encoded in the space it
was fitted for, so genomes of a restricted space are translated first.

Departs from the official code, whose recipe stays available as `PAPER_RECIPE`. Seven layers of 200 units on one-hot bits
need thousands of rows; the default recipe is made for hundreds. The one-hot of each layer is projected on `b`, `2^-b` and
`4^-b` (step size and quantization noise power go as the latter two), inputs and targets are standardized, one wide hidden
layer runs beside a linear path, and a few such networks are averaged. On synthetic truths of 22 and 54 layers 400 rows then
give Kendall's tau of 0.91 to 0.93, and 0.38 to 0.82 with the paper's recipe. The official code computes tau and drops it; here
rank quality on held-out rows is what `fit` returns.

Shape legend: `N` configs, `G` genes, `I` inputs of the networks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from eqnet.checkpoint import atomic_write_bytes, load_tensors
from eqnet.documents import parse_json
from eqnet.scoring.ensemble import PAPER_RECIPE as PAPER_RECIPE
from eqnet.scoring.ensemble import Ensemble, FoldedEnsemble, PredictorRecipe
from eqnet.space.space import Genomes, QuantSpace

Floats = NDArray[np.float64]
MIN_ROWS = 10
_FORMAT = "eqnet predictor 2"


class HeldOut(NamedTuple):
    """Accuracies of the rows that a predictor did not see, in percent.

    Attributes:
        predicted: float64 [N].
        measured: float64 [N].
        learned: float64 [N], what rows like them taught the predictor: accuracies that measured divergences let expect, or
            those measured.
    """

    predicted: Floats
    measured: Floats
    learned: Floats

    def metrics(self) -> dict[str, float]:
        """`rank_metrics` against measured accuracies, and "learned_kendall", tau-b against `learned`."""
        learned = rank_metrics(self.predicted, self.learned)["kendall"]
        return {**rank_metrics(self.predicted, self.measured), "learned_kendall": learned}


def rank_metrics(predicted: ArrayLike, measured: ArrayLike) -> dict[str, float]:
    """How well predictions order and match measurements.

    Examples:
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
    import scipy.stats  # takes as long to import as half of torch, and scoring does not need it

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
        held_out: accuracies of the held-out fifth of the last `fit`; None before.
    """

    def __init__(self, space: QuantSpace, recipe: PredictorRecipe | None = None) -> None:
        """An unfitted predictor; the default recipe suits tables of 100 to 1000 rows."""
        self.space = space
        self.recipe = recipe or PredictorRecipe()
        self.metrics: dict[str, float] = {}
        self.fingerprint = ""  # of the table, the recipe and the seed of the last `fit`
        self.held_out: HeldOut | None = None
        self._ensemble: Ensemble | None = None
        self._folded: FoldedEnsemble | None = None
        self._translation: tuple[QuantSpace, NDArray[np.int16]] | None = None  # of the last space that was not `space`

    def fit(
        self,
        genomes: Genomes,
        accuracy: ArrayLike,
        *,
        seed: int,
        refit: bool = True,
        measured: ArrayLike | None = None,
    ) -> dict[str, float]:
        """Fits to measured accuracy, in seconds; the same seed gives the same predictor.

        The metrics are those of a predictor that has seen four fifths of the rows, on the other fifth. With `refit` the one
        that is kept is then fitted on all rows, so it should be slightly better than they say.

        Args:
            genomes: configs measured, [N, G] of `self.space`.
            accuracy: to learn, in percent, [N].
            seed: of the split and of the initial weights.
            refit: keep a predictor fitted on all rows; otherwise the one of the metrics.
            measured: what the metrics compare predictions with, in percent, [N]; None means `accuracy`.

        Returns:
            `HeldOut.metrics` of the held-out fifth; "rmse" in accuracy points.

        Raises:
            ValueError: fewer than 10 rows, arrays that do not fit together, or accuracies that are not finite.
        """
        targets = _checked_table(self.space, genomes, accuracy)
        truth = targets if measured is None else _checked_table(self.space, genomes, measured)
        inputs = self._inputs(genomes)
        kept, held_out = _split(len(targets), seed)
        ensemble = Ensemble.fit(inputs[kept], targets[kept], self.recipe, seed)
        predicted = self._fold(ensemble).predict(genomes[held_out])
        self.held_out = HeldOut(predicted, truth[held_out], targets[held_out])
        self.metrics = self.held_out.metrics()
        self._keep(Ensemble.fit(inputs, targets, self.recipe, seed) if refit else ensemble)
        self.fingerprint = self._fingerprint(genomes, targets, truth, seed) if refit else ""
        return dict(self.metrics)

    def _fingerprint(self, genomes: Genomes, accuracy: ArrayLike, measured: ArrayLike, seed: int) -> str:
        """Of everything that a fit depends on besides the space."""
        digest = hashlib.sha256(json.dumps([asdict(self.recipe), seed, torch.__version__]).encode())
        digest.update(np.ascontiguousarray(genomes, np.int16).tobytes())
        for values in (accuracy, measured):
            digest.update(np.asarray(values, np.float64).tobytes())
        return digest.hexdigest()

    def refitted(self, genomes: Genomes, accuracy: ArrayLike, *, seed: int) -> AccuracyPredictor:
        """A predictor of the same recipe and metrics, fitted on all rows of another table: half the work of `fit`.

        Args:
            genomes: configs measured, [N, G] of `self.space`.
            accuracy: top-1 in percent, [N].
            seed: of the initial weights.

        Raises:
            ValueError: as for `fit`.
        """
        targets = _checked_table(self.space, genomes, accuracy)
        other = AccuracyPredictor(self.space, self.recipe)
        other.metrics, other.held_out = dict(self.metrics), self.held_out
        other._keep(Ensemble.fit(self._inputs(genomes), targets, self.recipe, seed))
        return other

    def score(self, genomes: Genomes, space: QuantSpace | None = None) -> Floats:
        """Predicted accuracy in percent, float64 [N].

        Args:
            genomes: [N, G].
            space: what `genomes` are of, a restriction of `self.space`; None means `self.space`.

        Raises:
            ValueError: not fitted yet, or a space that is not contained in the one the predictor was fitted for.
        """
        if self._folded is None:
            raise ValueError("the predictor has not been fitted; call fit() or load one.")
        if space is not None and space is not self.space:
            if self._translation is None or self._translation[0] is not space:
                self._translation = (space, _translation(self.space, space))
            genomes = self._translation[1][np.arange(space.num_genes), genomes]
        return self._folded.predict(genomes)

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
            "fingerprint": self.fingerprint,
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
            raise ValueError(
                f"'{path}' is not an accuracy predictor of this version; remove it, and the next search fits one."
            )
        try:
            fitted_for = QuantSpace.from_json(parse_json(header["space"], "its space"))
            recipe = PredictorRecipe(**parse_json(header["recipe"], "its recipe"))
            held_out = HeldOut(*tensors.pop("held_out").numpy())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not an accuracy predictor: {str(error).rstrip('.')}.") from error
        if fitted_for != space:
            raise ValueError(
                f"the predictor '{path}' was fitted for another quantization space; load it with the space of the supernet "
                "and pass restrictions of it to score()."
            )
        predictor = AccuracyPredictor(space, recipe)
        predictor.held_out, predictor.metrics = held_out, held_out.metrics()
        predictor.fingerprint = header.get("fingerprint", "")
        predictor._keep(Ensemble(tensors))
        return predictor

    def _keep(self, ensemble: Ensemble) -> None:
        self._ensemble, self._folded = ensemble, self._fold(ensemble)

    def _fold(self, ensemble: Ensemble) -> FoldedEnsemble:
        """The ensemble as a table of the formats of all genes."""
        counts = self.space.num_formats
        gene = np.repeat(np.arange(len(counts)), counts)
        changes = np.zeros((len(gene), len(counts)), np.int16)
        changes[np.arange(len(gene)), gene] = np.arange(len(gene)) - (np.cumsum(counts) - counts)[gene]
        return FoldedEnsemble(ensemble, self._inputs(changes), counts)

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


def fitted_predictor(
    space: QuantSpace, genomes: Genomes, accuracy: ArrayLike, measured: ArrayLike, *, seed: int, path: str | Path
) -> tuple[AccuracyPredictor, bool]:
    """A predictor fitted on a table: that of a file if it was fitted on the same table with the same recipe and seed.

    Args:
        space: the training space.
        genomes: as for `AccuracyPredictor.fit`.
        accuracy: as for `AccuracyPredictor.fit`.
        measured: as for `AccuracyPredictor.fit`.
        seed: as for `AccuracyPredictor.fit`.
        path: where `save` may have put one; a file that is missing, damaged or of another table means fitting. Nothing is
            written.

    Returns:
        The predictor, and whether it was fitted anew.

    Raises:
        ValueError: as for `AccuracyPredictor.fit`.
    """
    predictor = AccuracyPredictor(space)
    try:
        stored = AccuracyPredictor.load(path, space)
    except (ValueError, OSError, KeyError, TypeError):
        stored = predictor
    if stored.recipe == predictor.recipe and stored.fingerprint == predictor._fingerprint(
        genomes, accuracy, measured, seed
    ):
        return stored, False
    predictor.fit(genomes, accuracy, seed=seed, measured=measured)
    return predictor, True


def table_size_curve(
    space: QuantSpace,
    genomes: Genomes,
    accuracy: ArrayLike,
    sizes: Sequence[int],
    *,
    seed: int,
    recipe: PredictorRecipe | None = None,
    measured: ArrayLike | None = None,
) -> list[dict[str, float]]:
    """What more measurements would buy: rank quality on one held-out fifth for growing tables.

    Args:
        space: the training space.
        genomes: configs measured, [N, G].
        accuracy: to learn, in percent, [N].
        sizes: numbers of training rows, each from 2 to four fifths of the table; smaller tables are part of larger ones.
        seed: of the split and of the initial weights.
        recipe: None for the default.
        measured: as for `AccuracyPredictor.fit`.

    Returns:
        For each size: "rows" and `HeldOut.metrics`.

    Raises:
        ValueError: as for `AccuracyPredictor.fit`, or a size out of range.
    """
    predictor = AccuracyPredictor(space, recipe)
    targets = _checked_table(space, genomes, accuracy)
    truth = targets if measured is None else _checked_table(space, genomes, measured)
    inputs = predictor._inputs(genomes)
    kept, held_out = _split(len(targets), seed)
    curve = []
    for size in sizes:
        if not 2 <= size <= len(kept):
            raise ValueError(
                f"a table of {len(targets)} rows leaves 2 to {len(kept)} rows for training; got size {size}."
            )
        ensemble = Ensemble.fit(inputs[kept[:size]], targets[kept[:size]], predictor.recipe, seed)
        predicted = predictor._fold(ensemble).predict(genomes[held_out])
        curve.append({"rows": size, **HeldOut(predicted, truth[held_out], targets[held_out]).metrics()})
    return curve


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


def _translation(space: QuantSpace, source: QuantSpace) -> NDArray[np.int16]:
    """`space.translation(source)`, with a ValueError if `source` is not contained in `space`."""
    same_layers = [g.layers for g in source.genes] == [g.layers for g in space.genes]
    if not same_layers or any(
        not set(theirs.formats) <= set(ours.formats) for theirs, ours in zip(source.genes, space.genes, strict=True)
    ):
        raise ValueError("the configs are of a space that is not contained in the one the predictor was fitted for.")
    return space.translation(source)
