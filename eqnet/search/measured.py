"""Search that ends in measurements: rounds of genetic search on predicted accuracy, each followed by measuring its winners.

EQ-Net (arXiv 2308.07650) section 3.5 returns the config that its predictor likes best, unmeasured. The winner of a search is
where a predictor is most likely to err upwards, so here the best configs of every round are measured on the validation
split, and the next round's predictor has seen them. Uniform configs within the budget are measured too: they are points of
the space, and what a searched config has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from eqnet.scoring.evaluation import AccuracyTable, Evaluator, uniform_configs
from eqnet.scoring.predictor import AccuracyPredictor
from eqnet.search.genetic import genetic_search
from eqnet.settings import SearchSettings
from eqnet.space import BoundBudget, Genomes, QuantConfig, QuantSpace
from eqnet.space.cost import Costs
from eqnet.subnet import describe_subnet

Advance = Callable[[], None]


@dataclass(frozen=True)
class Candidate:
    """A config with its accuracies in percent: as predicted before it was measured, and as measured on validation."""

    config: QuantConfig
    predicted: float
    validation: float

    def to_json(self, space: QuantSpace, costs: Costs, test: float) -> dict[str, Any]:
        """Form, every cost, accuracies and layers of a config whose test accuracy is `test` percent."""
        accuracy = {"predicted": self.predicted, "validation": self.validation, "test": test}
        return describe_subnet(self.config, space, accuracy, costs)


@dataclass(frozen=True)
class Found:
    """Measured configs within the budget, best first (ties: the one predicted better); `uniform` may be empty."""

    searched: list[Candidate]
    uniform: list[Candidate]

    @property
    def best(self) -> Candidate:
        """The best of all: never measured worse than a uniform config within the budget."""
        return _ranked([*self.searched[:1], *self.uniform[:1]])[0]


def measured_beside_uniform(
    winners: Genomes,
    predict: Callable[[Genomes], np.ndarray],
    budget: BoundBudget,
    evaluator: Evaluator,
    accelerator: Accelerator,
) -> Found:
    """Winners of a search and the uniform configs within its budget, measured on validation.

    Args:
        winners: int16 [N, G] of the budget's space.
        predict: scores [N] of genomes, higher is better.
        budget: hard limits.
        evaluator: measures.
        accelerator: measurements are shared by its processes.
    """
    space = budget.space
    uniform = [c for _, _, c in uniform_configs(space) if budget.feasible(space.encode_all([c]))[0]]
    genomes: Genomes = np.concatenate([winners, space.encode_all(uniform)])
    measured = evaluator.measure_all([space.decode(g) for g in genomes], ["validation"], accelerator)[:, 0]
    found = _candidates(space, genomes, predict(genomes), measured)
    return Found(_ranked(found[: len(winners)]), _ranked(found[len(winners) :]))


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
        settings: sizes of the search.
        seed: the same seed and the same measurements give the same result.
        accelerator: measurements are shared by its processes.
        advance: called once per generation.
    """
    uniform = [c for _, _, c in uniform_configs(space) if budget.feasible(space.encode_all([c]))[0]]
    genomes = space.encode_all(uniform)
    measured = evaluator.measure_all(uniform, ["validation"], accelerator)[:, 0]
    rivals = _candidates(space, genomes, predictor.score(genomes, space), measured)
    seen: dict[QuantConfig, Candidate] = {c.config: c for c in rivals}
    searched: list[Candidate] = []
    for number in range(settings.rounds):
        if number:
            predictor = _refitted(predictor, space, table, list(seen.values()), seed)
        result = genetic_search(
            space,
            lambda g, p=predictor: p.score(g, space),  # type: ignore[misc]
            budget,
            seed=seed + number,
            population=settings.population,
            generations=settings.generations,
            mutation_probability=settings.mutation_probability,
            initial=space.encode_all([c.config for c in _ranked(list(seen.values()))[: settings.top_k]])
            if seen
            else None,
            top_k=settings.top_k + len(seen),
            progress=lambda *_: advance(),
        )
        new = [i for i, g in enumerate(result.genomes) if space.decode(g) not in seen][: settings.top_k]
        measured = evaluator.measure_all([space.decode(result.genomes[i]) for i in new], ["validation"], accelerator)[
            :, 0
        ]
        winners = _candidates(space, result.genomes[new], result.scores[new], measured)
        searched += winners
        seen |= {c.config: c for c in winners}
    return Found(_ranked(searched), _ranked(rivals))


def _candidates(
    space: QuantSpace, genomes: Genomes, predicted: Sequence[float] | np.ndarray, measured: np.ndarray
) -> list[Candidate]:
    rows = zip(genomes, predicted, measured, strict=True)
    return [Candidate(space.decode(g), float(p), float(m)) for g, p, m in rows]


def _ranked(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (-c.validation, -c.predicted))


def _refitted(
    predictor: AccuracyPredictor, space: QuantSpace, table: AccuracyTable, seen: list[Candidate], seed: int
) -> AccuracyPredictor:
    """A predictor that knows the measured candidates besides the table."""
    extra = predictor.space.translate(space.encode_all([c.config for c in seen]), space)
    accuracy = np.concatenate([table.accuracy, [c.validation for c in seen]])
    return predictor.refitted(np.concatenate([table.genomes, extra]), accuracy, seed=seed)
