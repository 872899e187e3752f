"""Search on a training-free proxy (EMQ, arXiv 2307.10554): exact where it is a sum over layers, genetic otherwise.

Nothing is trained and no accuracy table is built: the proxy chooses, the winner and the uniform configs are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator

from eqnet.scoring.evaluation import Evaluator
from eqnet.scoring.layer_statistics import LayerStatistics
from eqnet.scoring.proxies import Proxy, additive_model
from eqnet.search.genetic import genetic_search
from eqnet.search.ilp import ExactResult, exact_search
from eqnet.search.measured import Found, measured_beside_uniform
from eqnet.settings import SearchSettings
from eqnet.space import BoundBudget, Genomes


@dataclass(frozen=True)
class ProxySearch:
    """What a search on a proxy found.

    Attributes:
        found: winners and uniform configs within the budget, measured; predictions are scores.
        exact: the proven optimum of a sum over layers, the only winner; None where the search was genetic.
    """

    found: Found
    exact: ExactResult | None


def proxy_search(
    proxy: Proxy,
    statistics: LayerStatistics,
    budget: BoundBudget,
    evaluator: Evaluator,
    settings: SearchSettings,
    seed: int,
    accelerator: Accelerator,
    advance: Callable[[], None] = lambda: None,
) -> ProxySearch:
    """The configs of the highest scores within hard limits, one form per network.

    Args:
        proxy: what to maximise.
        statistics: of the layers of the budget's space.
        budget: limits, bound to the space that is searched.
        evaluator: measures the winners (`settings.top_k` of a genetic search) and the uniform configs on validation.
        settings: of the genetic search.
        seed: of the genetic search.
        accelerator: measurements are shared by its processes.
        advance: called once per generation of a genetic search.

    Raises:
        ValueError: the limits cannot be met, or scores that are not finite.
    """
    space, exact = budget.space, None
    if proxy.additive:
        loss = additive_model(proxy.name, -proxy.cells(statistics), space)
        exact = exact_search(loss, budget.costs, budget.limits, forms=space.forms or None)
        winners: Genomes = exact.genome[None]
    else:
        winners = genetic_search(
            space,
            lambda genomes: proxy.scores(statistics, genomes),
            budget,
            seed=seed,
            population=settings.population,
            generations=settings.generations,
            mutation_probability=settings.mutation_probability,
            top_k=settings.top_k,
            progress=lambda *_: advance(),
        ).genomes
    found = measured_beside_uniform(
        winners, lambda g: proxy.scores(statistics, g), budget, evaluator, settings.measure, accelerator
    )
    return ProxySearch(found, exact)
