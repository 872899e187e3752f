"""Benchmark tables: many configs of one network with measured accuracies, to find out how far a score can be trusted.

The form of MQ-Bench-101 (EMQ, arXiv 2307.10554: 425 bit assignments of a ResNet-18 after post-training quantization) for any
network and space. A table is one CSV file; its first line is a comment with a JSON header (model, hash of the weights, data
split, quantizer, space with its layers by name, seed, versions). Every row has a config, how it was drawn, its accuracy, and
whether it belongs to the search half, on which proxies may be fitted or evolved, or to the held-out half, on which they are
judged.

Departs from the official code: bits belong to layers by name, not by position (its vector of 18 entries meets 20
convolutions); search and held-out halves are stored with the table; signs of correlations are kept, and come with
intervals; the top rows are those of the highest measured accuracy, not of the highest score.

Shape legend: `N` configs, `G` genes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import ArrayLike, NDArray

from eqnet.checkpoint import atomic_write_text, read_json
from eqnet.documents import parse_json, read_text
from eqnet.scoring.evaluation import VALIDATION, Evaluator
from eqnet.scoring.predictor import rank_metrics
from eqnet.scoring.table import measure_rows
from eqnet.space import Genomes, LayerConfig, MeanBitsSampler, QuantConfig, QuantFormat, QuantSpace

Floats = NDArray[np.float64]
FORMAT = "eqnet benchmark 1"
TOPS = (100, 50, 20)  # percent of the rows, the best by measured accuracy
RESAMPLES = 1000
METRICS = ("spearman", "kendall", "pearson")
_GRANULARITIES = {"t": "tensor", "c": "channel"}
_SYMMETRIES = {"s": True, "a": False}


@dataclass(frozen=True)
class Benchmark:
    """A table of measured configs.

    Attributes:
        space: of the configs.
        genomes: int16 [N, G], distinct.
        accuracy: in percent, float64 [N].
        search: the search half, bool [N]; the others are held out.
        drawn: of each row "uniform" (one bit-width for all layers), "tilted" (mean bits spread over the whole range) or
            "random" (every quantizer independently).
        header: facts about the measurement.

    Raises:
        ValueError: two rows have the same config, or a number is not finite.
    """

    space: QuantSpace
    genomes: Genomes
    accuracy: Floats
    search: NDArray[np.bool_]
    drawn: tuple[str, ...]
    header: Mapping[str, Any]

    def __post_init__(self) -> None:
        _, first, counts = np.unique(self.genomes, axis=0, return_index=True, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"the config of row {int(first[counts > 1].min())} is in the table more than once.")
        if not np.isfinite(self.accuracy).all():
            raise ValueError(f"the accuracy of row {int(np.isfinite(self.accuracy).argmin())} is not a number.")

    def __len__(self) -> int:
        return len(self.genomes)

    def accuracy_of(self, config: QuantConfig) -> float:
        """Measured accuracy in percent. Raises ValueError if the config is not in the space or not in the table."""
        rows = np.flatnonzero((self.genomes == self.space.encode(config)).all(1))
        if not len(rows):
            raise ValueError("this config is not in the table.")
        return float(self.accuracy[rows[0]])

    def half(self, search: bool) -> tuple[Genomes, Floats]:
        """Configs and accuracies of the search half, or of the held-out half."""
        rows = self.search if search else ~self.search
        return self.genomes[rows], self.accuracy[rows]

    def save(self, path: Path) -> None:
        """Writes the file, atomically."""
        genes = [(layer.name, slot) for layer in self.space.layers for slot in ("weight", "act")]
        genes = [gene for gene in genes if gene in self.space.gene_of]
        buffer = io.StringIO()
        header = {"format": FORMAT, **self.header, "space": self.space.to_json()}
        buffer.write(f"# {json.dumps(header, ensure_ascii=False)}\n")
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["split", "drawn", "accuracy", *(f"{layer}.{slot}" for layer, slot in genes)])
        names = [[_name(fmt) for fmt in self.space.choices(layer, slot)] for layer, slot in genes]  # type: ignore[arg-type]
        columns = [self.space.gene_of[gene] for gene in genes]  # type: ignore[index]
        for genome, value, search, drawn in zip(self.genomes, self.accuracy, self.search, self.drawn, strict=True):
            formats = [options[genome[g]] for options, g in zip(names, columns, strict=True)]
            writer.writerow(["search" if search else "held-out", drawn, f"{value:.6g}", *formats])
        atomic_write_text(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> Benchmark:
        """Reads a file of `save`.

        Raises:
            ValueError: it is missing, damaged, or its columns are not the layers of its space.
        """
        text = read_text(path, kind="benchmark")
        first, _, rest = text.partition("\n")
        try:
            header = parse_json(first.removeprefix("# "), "the header")
            if header.pop("format") != FORMAT:
                raise ValueError("another version")
            space = QuantSpace.from_json(header.pop("space"))
            rows = list(csv.DictReader(io.StringIO(rest), strict=True))
            configs = [_config(space, row) for row in rows]
            genomes = space.encode_all(configs)
            accuracy = np.array([float(row["accuracy"]) for row in rows])
            search = np.array([{"search": True, "held-out": False}[row["split"]] for row in rows], bool)
            return Benchmark(space, genomes, accuracy, search, tuple(row["drawn"] for row in rows), header)
        except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
            raise ValueError(f"'{path}' is not a benchmark table or is damaged: {str(error).rstrip('.')}.") from error


def _name(fmt: QuantFormat) -> str:
    """E.g. '4cs': bits, granularity (tensor or channel), symmetric or asymmetric."""
    return f"{fmt.bits}{fmt.granularity[0]}{'s' if fmt.symmetric else 'a'}"


def _config(space: QuantSpace, row: Mapping[str, str]) -> QuantConfig:
    columns = {f"{layer}.{slot}" for layer, slot in space.gene_of}
    found = {name for name in row if name not in ("split", "drawn", "accuracy")}
    if columns != found:
        raise ValueError(f"columns differ from the layers of the space: {', '.join(sorted(columns ^ found)[:5])}")

    def fmt(text: str) -> QuantFormat:
        return QuantFormat(int(text[:-2]), _SYMMETRIES[text[-1]], _GRANULARITIES[text[-2]])  # type: ignore[arg-type]

    return QuantConfig(
        {
            layer.name: LayerConfig(
                fmt(row[f"{layer.name}.weight"]),
                fmt(row[f"{layer.name}.act"]) if (layer.name, "act") in space.gene_of else None,
            )
            for layer in space.layers
        }
    )


# -- which configs ----------------------------------------------------------------------------------------------------


def benchmark_genomes(space: QuantSpace, size: int, seed: int) -> tuple[Genomes, tuple[str, ...]]:
    """The distinct configs of a table, int16 [size, G], and how each was drawn.

    First every uniform bit-width in every form (see `QuantSpace.uniform_pairs`), then in turn a config with mean bits spread
    over the whole range, where bit-widths alone rank well, and one of independent quantizers, where they do not. Row `i`
    depends on (seed, i) only, so a larger table begins with the rows of a smaller one.

    Raises:
        ValueError: fewer than 10 rows, or more than the space has configs.
    """
    if size < 10:
        raise ValueError(f"a benchmark needs at least 10 configs; got {size}.")
    uniform = [space.uniform(w, form, a) for form in space.forms for w, a in space.uniform_pairs(form)]
    found = {space.encode(config).tobytes(): "uniform" for config in uniform}
    sampler = MeanBitsSampler(space)
    for i in range(100 * size):
        if len(found) >= size:
            break
        rng = np.random.default_rng((seed, 3, i))
        genome = sampler.sample(rng, 1)[0] if i % 2 else space.random_genomes(rng, 1)[0]
        found.setdefault(genome.tobytes(), "tilted" if i % 2 else "random")
    if len(found) < size:
        raise ValueError(f"the space has too few distinct configs for {size} rows; ask for {len(found)} or fewer.")
    genomes = np.stack([np.frombuffer(key, np.int16) for key in list(found)[:size]])
    return genomes, tuple(found.values())[:size]


def search_half(size: int, seed: int) -> NDArray[np.bool_]:
    """Which rows proxies may be fitted on: one of each two neighbours, by chance, bool [size]."""
    coins = np.random.default_rng((seed, 4)).integers(2, size=-(-size // 2))
    return np.stack([coins == 0, coins == 1], 1).ravel()[:size]


def build_benchmark(
    evaluator: Evaluator,
    space: QuantSpace,
    folder: Path,
    size: int,
    seed: int,
    facts: Mapping[str, Any],
    accelerator: Accelerator,
    advance: Callable[[], None] | None = None,
) -> Benchmark:
    """Measures a table of `size` configs; continues an interrupted one, or makes one larger.

    Rows go to `folder` as they are measured, one appended line each.

    Args:
        evaluator: of the run; measures on its validation images.
        space: what the configs are drawn from, a restriction of the evaluator's.
        folder: of the rows.
        size: number of configs.
        seed: of the configs and of the halves.
        facts: for the header.
        accelerator: rows are shared by its processes.
        advance: called once per row.

    Raises:
        ValueError: as `benchmark_genomes` and `measure_rows`.
    """
    genomes, drawn = benchmark_genomes(space, size, seed)
    rows = {"benchmark": FORMAT, "seed": seed}
    accuracy = measure_rows(evaluator, folder, space, genomes, [VALIDATION], rows, accelerator, advance)[:, 0]
    header = {**facts, **read_json(folder / "header.json")}
    for fact in ("benchmark", "genes"):
        del header[fact]  # the table has a format and a space of its own
    return Benchmark(space, genomes, accuracy, search_half(size, seed), drawn, header)


# -- ranking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its sign, and the 95 % interval of a bootstrap over configs."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:.2f}, {self.high:.2f}]"


def rank(
    scores: ArrayLike, accuracy: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[int, dict[str, Correlation]]:
    """How well scores order configs: Spearman, Kendall (tau-b) and Pearson on the best 100, 50 and 20 % by accuracy.

    Args:
        scores: higher is better, [N].
        accuracy: measured, [N].
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        Percent -> metric -> correlation. Constant scores have correlation 0.

    Raises:
        ValueError: unequal lengths, fewer than 10 rows, or scores that are not finite.
    """
    x, y = np.asarray(scores, float), np.asarray(accuracy, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 10:
        raise ValueError(f"ranking needs two lists of the same length of at least 10; got {x.shape} and {y.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(f"the score of config {int(np.isfinite(x).argmin())} is not finite; it cannot be ranked.")
    best = np.argsort(-y, kind="stable")
    out = {}
    for top in TOPS:
        rows = best[: max(len(x) * top // 100, 2)]
        out[top] = _with_intervals(x[rows], y[rows], np.random.default_rng((seed, top)), resamples)
    return out


def _with_intervals(x: Floats, y: Floats, rng: np.random.Generator, resamples: int) -> dict[str, Correlation]:
    point = rank_metrics(x, y)
    drawn = rng.integers(len(x), size=(resamples, len(x)))
    spread = {
        "spearman": _row_correlations(_row_ranks(x[drawn]), _row_ranks(y[drawn])),
        "pearson": _row_correlations(x[drawn], y[drawn]),
        "kendall": _resampled_kendall(x, y, drawn),
    }
    limits = {name: np.quantile(values, [0.025, 0.975]) for name, values in spread.items()}
    return {name: Correlation(point[name], float(limits[name][0]), float(limits[name][1])) for name in METRICS}


def _row_ranks(values: Floats) -> Floats:
    from scipy.stats import rankdata

    ranks: Floats = rankdata(values, axis=1)
    return ranks


def _row_correlations(x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of each row, 0 where a row is constant."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    products: Floats = (x * y).sum(1)
    out: Floats = np.divide(
        products, scale, out=np.zeros(len(x)), where=scale > 1e-12 * max(float(scale.max()), 1e-300)
    )
    return out


def _resampled_kendall(x: Floats, y: Floats, drawn: NDArray[np.intp]) -> Floats:
    """tau-b of each resample, from counts of the original rows: c' S c, S the signs of pairs."""
    counts = np.stack([np.bincount(row, minlength=len(x)) for row in drawn]).astype(float)
    sx, sy = (np.sign(v[:, None] - v) for v in (x, y))
    pairs = [((counts @ s) * counts).sum(1) for s in (sx * sy, sx * sx, sy * sy)]
    scale = np.sqrt(pairs[1] * pairs[2])
    out: Floats = np.divide(pairs[0], scale, out=np.zeros(len(drawn)), where=scale > 0)
    return out


def ridge_scores(benchmark: Benchmark) -> Floats:
    """Ridge regression on one-hot bits fitted on the search half, for all rows [N]: what additive scores can reach.

    The strength of the penalty is chosen by leave-one-out errors on the search half.
    """
    from sklearn.linear_model import RidgeCV

    genomes, accuracy = benchmark.half(search=True)
    model = RidgeCV(alphas=np.logspace(-3, 3, 25)).fit(benchmark.space.features(genomes), accuracy)
    scores: Floats = model.predict(benchmark.space.features(benchmark.genomes))
    return scores
