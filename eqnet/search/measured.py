"""Search that ends in measurements: rounds of genetic search on predicted accuracy, each followed by measuring its winners.

EQ-Net (arXiv 2308.07650) section 3.5 returns the config that its predictor likes best, unmeasured. The winner of a search is
where a predictor is most likely to err upwards, so here the best configs of every round are measured on the validation
split, and the next round's predictor has seen them. Uniform configs within the budget are measured too: they are points of
the space, and what a searched config has to beat.

By default the best is the one of the smallest divergence from the largest subnet: accuracies on a few thousand images
differ by chance more than the best configs of a budget do, and a search finds such chances (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from eqnet.scoring.evaluation import DIVERGENCE, VALIDATION, Evaluator, uniform_configs
from eqnet.scoring.predictor import AccuracyPredictor
from eqnet.scoring.table import AccuracyTable
from eqnet.search.genetic import genetic_search
from eqnet.settings import Measure, SearchSettings
from eqnet.space import BoundBudget, Genomes, QuantConfig, QuantSpace
from eqnet.space.cost import Costs
from eqnet.subnet import describe_subnet

Advance = Callable[[], None]


@dataclass(frozen=True)
class Candidate:
    """A config and what is known of it.

    Attributes:
        config: the config.
        predicted: accuracy in percent, or a score, before it was measured.
        validation: accuracy in percent on the validation split.
        divergence: from the largest subnet on the validation split, in nats.
    """

    config: QuantConfig
    predicted: float
    validation: float
    divergence: float

    def to_json(self, space: QuantSpace, costs: Costs, test: float) -> dict[str, Any]:
        """Form, every cost, accuracies, divergence and layers of a config whose test accuracy is `test` percent."""
        accuracy = {"predicted": self.predicted, "validation": self.validation, "test": test}
        return {**describe_subnet(self.config, space, accuracy, costs), "divergence": self.divergence}


@dataclass(frozen=True)
class Found:
    """Measured configs within the budget, best first (ties: the one predicted better); `uniform` may be empty."""

    searched: list[Candidate]
    uniform: list[Candidate]
    measure: Measure

    @property
    def best(self) -> Candidate:
        """The best of all: never measured worse than a uniform config within the budget."""
        return _ranked([*self.searched[:1], *self.uniform[:1]], self.measure)[0]


def measured_beside_uniform(
    winners: Genomes,
    predict: Callable[[Genomes], np.ndarray],
    budget: BoundBudget,
    evaluator: Evaluator,
    measure: Measure,
    accelerator: Accelerator,
) -> Found:
    """Winners of a search and the uniform configs within its budget, measured on validation.

    Args:
        winners: int16 [N, G] of the budget's space.
        predict: scores [N] of genomes, higher is better.
        budget: hard limits.
        evaluator: measures.
        measure: what makes a config the best.
        accelerator: measurements are shared by its processes.
    """
    space = budget.space
    uniform = [c for _, _, c in uniform_configs(space) if budget.feasible(space.encode_all([c]))[0]]
    genomes: Genomes = np.concatenate([winners, space.encode_all(uniform)])
    found = _measured(space, genomes, predict(genomes), evaluator, accelerator)
    searched, rivals = found[: len(winners)], found[len(winners) :]
    return Found(_ranked(searched, measure), _ranked(rivals, measure), measure)


def measured_search(
    space: QuantSpace,
    budget: BoundBudget,
    table: AccuracyTable,
    predictor: AccuracyPredictor,
    evaluator: Evaluator,
    settings: SearchSettings,
    seed: int,
    accelerator: Accelerator,
    advance: Advance,
) -> Found:
    """Searches `settings.rounds` times, measures the `settings.top_k` best of each round.

    Args:
        space: the space to search, a restriction of the predictor's.
        budget: hard limits, bound to `space`.
        table: what the predictor was fitted on.
        predictor: fitted on `table` alone; predicts the uniform configs and the first round.
        evaluator: measures on validation; of the supernet specialized to the target that `space` is for.
        settings: sizes of the search, and what makes a config the best.
        seed: the same seed and the same measurements give the same result.
        accelerator: measurements are shared by its processes.
        advance: called once per generation.
    """
    uniform = [c for _, _, c in uniform_configs(space) if budget.feasible(space.encode_all([c]))[0]]
    genomes, measure = space.encode_all(uniform), settings.measure
    rivals = _measured(space, genomes, predictor.score(genomes, space), evaluator, accelerator)
    seen: dict[QuantConfig, Candidate] = {c.config: c for c in rivals}
    searched: list[Candidate] = []
    for number in range(settings.rounds):
        if number:
            predictor = _refitted(predictor, space, table, list(seen.values()), measure, seed)
        result = genetic_search(
            space,
            lambda g, p=predictor: p.score(g, space),  # type: ignore[misc]
            budget,
            seed=seed + number,
            population=settings.population,
            generations=settings.generations,
            mutation_probability=settings.mutation_probability,
            initial=space.encode_all([c.config for c in _ranked(list(seen.values()), measure)[: settings.top_k]])
            if seen
            else None,
            top_k=settings.top_k + len(seen),
            progress=lambda *_: advance(),
        )
        new = [i for i, g in enumerate(result.genomes) if space.decode(g) not in seen][: settings.top_k]
        winners = _measured(space, result.genomes[new], result.scores[new], evaluator, accelerator)
        searched += winners
        seen |= {c.config: c for c in winners}
    return Found(_ranked(searched, measure), _ranked(rivals, measure), measure)


def _measured(
    space: QuantSpace,
    genomes: Genomes,
    predicted: Sequence[float] | np.ndarray,
    evaluator: Evaluator,
    accelerator: Accelerator,
) -> list[Candidate]:
    configs = [space.decode(genome) for genome in genomes]
    figures = evaluator.measure_all(configs, [VALIDATION, DIVERGENCE], accelerator).tolist()
    return [Candidate(c, float(p), *f) for c, p, f in zip(configs, predicted, figures, strict=True)]


def _ranked(candidates: list[Candidate], measure: Measure) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (c.divergence if measure == DIVERGENCE else -c.validation, -c.predicted))


def _refitted(
    predictor: AccuracyPredictor,
    space: QuantSpace,
    table: AccuracyTable,
    seen: list[Candidate],
    measure: Measure,
    seed: int,
) -> AccuracyPredictor:
    """A predictor that knows the measured candidates besides the table."""
    extra = predictor.space.translate(space.encode_all([c.config for c in seen]), space)
    more = AccuracyTable(extra, np.array([c.validation for c in seen]), np.array([c.divergence for c in seen]))
    joined = table.joined(more)
    return predictor.refitted(joined.genomes, joined.labels(measure), seed=seed)
