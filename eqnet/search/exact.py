"""Search on an additive score: named compositions of a score, restrictions and a solver, and what they find.

| method | score | chooses among | solver |
|---|---|---|---|
| ilp | any, `--score` | all formats | integer programming |
| lcpaq (arXiv 2402.17706) | hessian, weights and inputs | all formats | integer programming, Pareto front |
| hawq-v2 (arXiv 1911.03852) | hessian, weights and inputs | all formats | Pareto front; the point at the budget |
| hawq-v3 (arXiv 2011.10680) | hessian | 4 or 8 bits, the same for weights and inputs of a layer | integer programming |
| genetic, with `--score` | any | all formats | genetic, and its gap to the exact optimum |

lcpaq and hawq-v2 find the same config. Both minimise the same sum, traces times squared errors: HAWQ-V2 reads the point at the
budget off the front of that sum against a cost, LCPAQ solves for it within any number of limits, and for a sum over layers the
point of the front at a limit is the solution. The details in which the papers may differ beyond that were not available.

Nothing is trained and no accuracy table is built; the winner and the uniform configs are measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import ArrayLike

from eqnet.data import Batches, DataSplits, random_subset
from eqnet.scoring.evaluation import Evaluator
from eqnet.scoring.scores import SCORES
from eqnet.scoring.sensitivity import Batch, Sensitivity
from eqnet.search.genetic import genetic_search
from eqnet.search.ilp import ExactResult, exact_search
from eqnet.search.measured import Found, measured_beside_uniform
from eqnet.settings import SearchSettings, Settings
from eqnet.space import ALL_FORMS, BoundBudget, CostModel, Genomes, QuantSpace

Advance = Callable[[], None]
SCORE_BATCH = 16  # images of a batch: the graph of second derivatives of one fits the memory of small machines


@dataclass(frozen=True)
class Method:
    """How an additive score becomes a config.

    Attributes:
        solver: what searches.
        score: the name of the score; None: the user names it.
        bits: bit-widths of layers whose bits are free; None for all of the space.
        same_bits: weights and inputs of a layer have the same bit-width.
        front: the exact front is part of the result.
    """

    solver: Literal["ilp", "genetic"] = "ilp"
    score: str | None = None
    bits: tuple[int, ...] | None = None
    same_bits: bool = False
    front: bool = False

    def loss(self, sensitivity: Sensitivity, space: QuantSpace) -> CostModel:
        """The loss of configs of `space`, infinite for what the method does not choose.

        Raises:
            ValueError: naming a layer that has none of the method's bit-widths, or a score that does not fit the space.
        """
        loss = copy.copy(sensitivity.loss(space))
        cells = loss.cells
        group, weight, act = cells.parts()
        w, a = space.bits[cells.weight_gene[group], weight], space.bits[cells.act_gene[group], act]
        allowed = np.ones(len(group), bool)
        free = space.elastic[cells.weight_gene[group]]
        if self.bits is not None:
            allowed &= ~free | (np.isin(w, self.bits) & (np.isin(a, self.bits) | ~cells.has_act[group]))
        if self.same_bits:
            allowed &= ~free | (w == a) | ~cells.has_act[group]
        left = np.logical_or.reduceat(allowed, cells.offsets)
        if not left.all():
            name = space.groups[int(left.argmin())][0]
            bits = " or ".join(map(str, self.bits or ()))
            raise ValueError(
                f"layer {name!r} has no format that this method chooses among ({bits} bits, equal for weights and inputs); "
                "train the run with such space.bits."
            )
        loss.table = np.where(allowed, loss.table, np.inf)
        return loss


METHODS: dict[str, Method] = {
    "genetic": Method(solver="genetic"),
    "ilp": Method(),
    "lcpaq": Method(score="hessian", front=True),
    "hawq-v2": Method(score="hessian", front=True),
    "hawq-v3": Method(score="hessian", bits=(4, 8), same_bits=True),
}


@dataclass(frozen=True)
class Planned:
    """What a search on an additive score found.

    Attributes:
        found: the winner and the uniform configs within the budget, measured; predictions are negative losses.
        loss: the loss that was minimised.
        exact: the optimum.
        gap: how much larger the loss of the winner is, as a part of the optimum (0 for integer programming).
    """

    found: Found
    loss: CostModel
    exact: ExactResult
    gap: float


@dataclass(frozen=True)
class LinearisedGap:
    """How much better than a config a score could be within a budget if it were additive around that config.

    It is no bound on the score itself: two changes together may do other than the sum of both.

    Attributes:
        gain: of the linear model's optimum over the config, in the unit of the score, 0 or more.
        found: what the score itself says of that optimum less that of the config.
        proven: whether the optimum of the linear model is proven.
    """

    gain: float
    found: float
    proven: bool


def linearised_gap(
    score: Callable[[Genomes], ArrayLike], genome: Genomes, budget: BoundBudget, time_limit: float = 10.0
) -> LinearisedGap:
    """Linearises a score around a config and solves the linear model exactly.

    Args:
        score: genomes [N, G] of the budget's space -> scores [N], higher is better.
        genome: the config [G], within the budget. If its layers share a form, only configs of that form are considered.
        budget: the limits.
        time_limit: seconds for the exact search.

    Raises:
        ValueError: see `exact_search`.
    """
    space, number = budget.space, int(budget.space.form_of(genome[None])[0])
    form = None if number < 0 else ALL_FORMS[number]
    loss = copy.copy(budget.costs[0])
    group, weight, act = loss.cells.parts()
    genomes = np.repeat(genome[None], len(group) + 1, axis=0)  # each group alone in each of its cells; and the config
    rows, allowed = np.arange(len(group)), space.formats_in(form)
    genomes[rows, loss.cells.act_gene[group]] = act
    genomes[rows, loss.cells.weight_gene[group]] = weight  # last: groups without inputs name this gene twice
    scores = np.asarray(score(genomes), float)
    inside = allowed[loss.cells.weight_gene[group], weight]
    inside &= allowed[loss.cells.act_gene[group], act] | ~loss.cells.has_act[group]
    loss.name, loss.unit, loss.constant, loss.divisor = "linearised loss", "loss", 0.0, 1.0
    loss.table = np.where(inside, scores[-1] - scores[:-1], np.inf)
    best = exact_search(loss, budget.costs, budget.limits, time_limit=time_limit)
    there = float(np.asarray(score(best.genome[None]), float)[0])
    return LinearisedGap(max(-best.loss, 0.0), there - float(scores[-1]), best.optimal)


def choose_method(method: str, score: str | None) -> tuple[Method, str]:
    """The method and the score of a command line.

    Raises:
        ValueError: unknown names, a missing score, or another score than the method's own.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}.")
    if score is not None and score not in SCORES:
        raise ValueError(f"unknown score {score!r}; the scores are {', '.join(SCORES)}.")
    own = METHODS[method].score
    if own is None and score is None:
        raise ValueError(f"--method {method} needs --score, one of {', '.join(SCORES)}.")
    if own is not None and score not in (None, own):
        raise ValueError(f"--method {method} scores with {own}; use --method ilp --score {score}.")
    name = own or score
    assert name is not None
    return METHODS[method], name


def score_batches(data: DataSplits, settings: Settings, device: torch.device | str) -> list[Batch]:
    """The labelled training images that are scored, without augmentation, in small batches."""
    chosen = random_subset(data.train, settings.search.score_images, settings.seed)
    batches = Batches(
        chosen,
        SCORE_BATCH,
        seed=settings.seed,
        device=device,
        train=False,
        mean=data.mean,
        std=data.std,
        workers=settings.data.workers,
    )
    return list(batches.epoch(0))


def score_formats(
    name: str,
    evaluator: Evaluator,
    space: QuantSpace,
    batches: list[Batch],
    accelerator: Accelerator,
    advance: Advance,
) -> Sensitivity:
    """The score of every format of `space`, with BN statistics of the floating-point network.

    `advance` is called once for each layer of each batch of this process.
    """
    evaluator.recalibrate_float()
    return SCORES[name](evaluator.supernet, space, batches, accelerator, advance)


def planned_search(
    method: Method,
    sensitivity: Sensitivity,
    budget: BoundBudget,
    evaluator: Evaluator,
    settings: SearchSettings,
    seed: int,
    accelerator: Accelerator,
) -> Planned:
    """Searches on the score within the budget, one form per network; measures the winner and the uniform configs.

    Raises:
        ValueError: see `Method.loss` and `exact_search`.
    """
    space = budget.space
    loss = method.loss(sensitivity, space)
    forms = space.forms or None
    exact = exact_search(loss, budget.costs, budget.limits, forms=forms)
    genome, value = exact.genome, exact.loss
    if method.solver == "genetic":
        result = genetic_search(
            space,
            lambda genomes: -loss(genomes),
            budget,
            seed=seed,
            population=settings.population,
            generations=settings.generations,
            mutation_probability=settings.mutation_probability,
        )
        genome, value = result.genomes[0], -float(result.scores[0])
    gap = (value - exact.loss) / max(abs(exact.loss), 1e-300)
    plain = sensitivity.loss(space)
    found = measured_beside_uniform(genome[None], lambda g: -plain(g), budget, evaluator, settings.measure, accelerator)
    return Planned(found, loss, exact, gap)
