"""The exact config within budgets, by mixed-integer programming (HAWQ-V3, arXiv 2011.10680; LCPAQ, arXiv 2402.17706).

    minimise  sum_q loss[q, cell]     one cell (weight format, activation format) of each tied group q
    so that   sum_q cost_c[q, cell] <= limit_c     for any number of costs c

Loss and costs are `CostModel`s over the cells of one space, so weights and inputs are chosen together where a cost couples
them (BitOps), ties are groups, and a device's restrictions are the formats that the space has. A cell whose loss is infinite
is forbidden. Nothing here knows a device.

The solver is scipy's HiGHS. It works on floating-point rows with a tolerance, budgets are hard: a config that it calls
feasible is checked against the exact costs, and cut off if it exceeds one by rounding. Cells that another cell of their
group beats in everything, or that fit with no choice of the other groups, are left out first.

Shape legend: `Q` tied groups, `M` cells, `K` cells that are kept, `G` genes, `C` costs.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from eqnet.search.genetic import ParetoFront, front
from eqnet.space.budget import limit_text, reachable_text
from eqnet.space.cost import CostModel, Floats
from eqnet.space.qconfig import Form
from eqnet.space.space import Genomes

_SCALE = 1e4  # of rows and objective: the absolute tolerances of HiGHS, 1e-6, are then far below what they stand for
_ROUNDING = 1e-12  # what sums in another order may differ by; the exact costs decide


@dataclass(frozen=True, slots=True)
class ExactResult:
    """The best config within the limits.

    Attributes:
        genome: int16 [G].
        loss: its loss.
        costs: its costs, float64 [C].
        bound: no config within the limits has a smaller loss than this.
        seconds: time spent.
    """

    genome: Genomes
    loss: float
    costs: Floats
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """How much smaller a loss could still be, as a part of `loss`; 0.0 if the config is proven to be optimal."""
        missing = self.loss - self.bound
        return 0.0 if missing <= 1e-9 * max(abs(self.loss), 1e-300) else missing / max(abs(self.loss), 1e-300)

    @property
    def optimal(self) -> bool:
        """Whether no config within the limits has a smaller loss (up to a part of 1e-9)."""
        return self.gap == 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """What a solver sees: of each group one cell, minimal loss, every row within 1.

    Attributes:
        cell: number of each kept cell in the tables of the costs, [K].
        group: its group, ascending, [K].
        loss: what it adds to the loss of the best cells of all groups, float64 [K].
        rows: what it adds to each cost, as a part of the room that the cheapest cells leave below the limit, [C, K].
        base: the loss of the best cells of all groups.
    """

    cell: NDArray[np.intp]
    group: NDArray[np.intp]
    loss: Floats
    rows: Floats
    base: float


class InfeasibleError(ValueError):
    """No config is within all limits."""


def exact_search(
    loss: CostModel,
    costs: Sequence[CostModel] = (),
    limits: ArrayLike = (),
    *,
    forms: Sequence[Form] | None = None,
    time_limit: float = 60.0,
) -> ExactResult:
    """The config of the smallest loss within hard limits.

    Args:
        loss: what to minimise, additive over the groups of its space; infinite for cells that are forbidden.
        costs: what is limited, of the same space.
        limits: an upper limit for each, in its unit, [C].
        forms: the config has one form of these, as in `genetic_search`; None lets every layer choose its own.
        time_limit: seconds; the result of a search that ran out of time has a `gap`.

    Raises:
        InfeasibleError: no config is within the limits; names the constraint and the smallest value it can reach.
        ValueError: a cost of another space, a limit or a loss that is not a number, or nothing found in time.
    """
    start = time.perf_counter()
    bounds = np.asarray(limits, float).reshape(-1)
    _check(loss, costs, bounds)
    best: ExactResult | None = None
    lowest = math.inf
    for form in dict.fromkeys(forms) if forms is not None else [None]:
        problem = tabulate(loss, costs, bounds, form)
        if problem is None:
            continue
        left = max(time_limit - (time.perf_counter() - start), 0.01)
        cells, bound = _solve(problem, loss, costs, bounds, left)
        lowest = min(lowest, bound)
        if cells is not None:
            genome = _genome(loss, cells)
            value = float(loss(genome[None])[0])
            if best is None or value < best.loss:
                values = np.array([cost(genome[None])[0] for cost in costs])
                best = ExactResult(genome, value, values, 0.0, 0.0)
    if best is None:
        if math.isfinite(lowest):
            raise ValueError(f"no config within the limits was found in {time_limit:g} s; allow more time.")
        raise InfeasibleError(_why(loss, costs, bounds, forms))
    return ExactResult(best.genome, best.loss, best.costs, min(lowest, best.loss), time.perf_counter() - start)


def exact_front(
    loss: CostModel,
    cost: CostModel,
    costs: Sequence[CostModel] = (),
    limits: ArrayLike = (),
    *,
    points: int = 20,
    forms: Sequence[Form] | None = None,
    time_limit: float = 60.0,
    progress: Callable[[], None] | None = None,
) -> ParetoFront:
    """The smallest losses over a grid of limits on one cost: each point is a proven optimum, or is left out.

    The grid is even from the smallest reachable cost to that of the smallest loss of all. It is solved from the loosest limit
    down: an optimum that is within the next limits too answers them without a solver.

    Args:
        loss: see `exact_search`, as for the other arguments.
        cost: the cost of the front.
        costs: costs that stay within `limits` at every point.
        limits: ...
        points: limits of the grid.
        forms: ...
        time_limit: seconds for each point.
        progress: called after each point.

    Returns:
        Non-dominated configs, cheapest first; scores are negative losses.

    Raises:
        ValueError: as for `exact_search`, or fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"a front needs at least 2 points; got {points}.")
    bounds = np.asarray(limits, float).reshape(-1)
    found = [exact_search(loss, costs, bounds, forms=forms, time_limit=time_limit)]
    top = float(cost(found[0].genome[None])[0])
    cheapest = exact_search(_allowed(cost, loss), costs, bounds, forms=forms, time_limit=time_limit)
    for limit in np.linspace(cheapest.loss, top, points)[::-1]:
        if float(cost(found[-1].genome[None])[0]) > limit:
            result = exact_search(loss, [*costs, cost], [*bounds, limit], forms=forms, time_limit=time_limit)
            found.append(result)
        if progress is not None:
            progress()
    genomes = np.stack([result.genome for result in found if result.optimal])
    return front(genomes, -loss(genomes), cost(genomes))


def tabulate(loss: CostModel, costs: Sequence[CostModel], limits: Floats, form: Form | None) -> Problem | None:
    """The cells that can be part of the best config in one form (None: of any mix); None if no config fits."""
    cells = loss.cells
    group, weight, act = cells.parts()
    allowed = loss.space.formats_in(form)
    kept = allowed[cells.weight_gene[group], weight] & np.isfinite(loss.table)
    kept &= allowed[cells.act_gene[group], act] | ~cells.has_act[group]
    values = np.stack([np.where(kept, model.table, np.inf) for model in (loss, *costs)])  # [1 + C, M]
    cheapest = np.minimum.reduceat(values, cells.offsets, axis=1)  # [1 + C, Q]
    if not np.isfinite(cheapest).all():
        return None  # a group without a cell
    sums = np.array([limit * cost.divisor - cost.constant for cost, limit in zip(costs, limits, strict=True)])
    room = sums + _ROUNDING * np.abs(sums) - cheapest[1:].sum(1)
    added = values - cheapest[:, group]
    kept &= (added[1:] <= room[:, None]).all(0)
    index = np.flatnonzero(kept)
    index = index[_undominated(added[:, index], group[index])]
    if (np.bincount(group[index], minlength=len(cells.counts)) == 0).any():
        return None
    rows = added[1:, index] / np.where(room > 0, room, 1.0)[:, None]
    base = (float(cheapest[0].sum()) + loss.constant) / loss.divisor
    return Problem(index, group[index], added[0, index] / loss.divisor, rows, base)


def _undominated(values: Floats, group: NDArray[np.intp]) -> NDArray[np.intp]:
    """Columns of `values` [1 + C, K] that no other of the same group beats or equals in everything; equal ones: the first."""
    kept = []
    for columns in np.split(np.arange(len(group)), np.flatnonzero(np.diff(group)) + 1):
        order = columns[np.lexsort(values[::-1, columns])]  # what beats a column comes before it
        part = values[:, order]
        below = (part[:, :, None] <= part[:, None, :]).all(0)
        kept.append(order[~np.triu(below, 1).any(0)])
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.intp)


def highs(
    problem: Problem, time_limit: float, cuts: Sequence[NDArray[np.intp]] = ()
) -> tuple[NDArray[np.intp] | None, float]:
    """The kept cells chosen by HiGHS [Q], None if there are none, and a lower bound of the loss (inf: infeasible).

    `cuts` are choices that must not come out again.
    """
    count, groups = len(problem.group), int(problem.group[-1]) + 1
    columns = np.arange(count)
    constraints = [LinearConstraint(csr_array((np.ones(count), (problem.group, columns)), (groups, count)), 1, 1)]
    rows = [csr_array(problem.rows * _SCALE)] if len(problem.rows) else []
    upper = [np.full(len(problem.rows), _SCALE)]
    for cut in cuts:
        rows.append(csr_array((np.ones(groups), (np.zeros(groups, int), cut)), (1, count)))
        upper.append(np.array([groups - 1.0]))
    if rows:
        constraints.append(LinearConstraint(vstack(rows), -np.inf, np.concatenate(upper)))
    scale = _SCALE / max(float(problem.loss.max(initial=0.0)), 1e-300)
    options = {"time_limit": time_limit, "mip_rel_gap": 0.0}
    with _silence():
        found = milp(problem.loss * scale, constraints=constraints, integrality=1, bounds=(0, 1), options=options)
    if found.status == 2:
        return None, math.inf
    bound = -math.inf if found.mip_dual_bound is None else float(found.mip_dual_bound) / scale + problem.base
    if found.x is None:
        return None, problem.base if math.isinf(bound) else bound
    return np.flatnonzero(found.x > 0.5), bound


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The process writes nothing to standard output: HiGHS prints a debugging line that none of its options turns off."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, TypeError):  # no C library by that name
            ctypes.CDLL(None).fflush(None)  # what C has buffered
        os.dup2(kept, 1)
        os.close(kept)


def _solve(
    problem: Problem, loss: CostModel, costs: Sequence[CostModel], limits: Floats, time_limit: float
) -> tuple[NDArray[np.intp] | None, float]:
    """The cells of the best config [Q], checked against the exact costs, and a lower bound of the loss."""
    start = time.perf_counter()
    cuts: list[NDArray[np.intp]] = []
    while True:
        chosen, bound = highs(problem, max(time_limit - (time.perf_counter() - start), 0.01), cuts)
        if chosen is None:
            return None, bound
        cells = problem.cell[chosen]
        genome = _genome(loss, cells)[None]
        if all(cost(genome)[0] <= limit for cost, limit in zip(costs, limits, strict=True)):
            return cells, bound
        cuts.append(chosen)  # above a limit by less than the solver's tolerance


def _genome(loss: CostModel, chosen: NDArray[np.intp]) -> Genomes:
    """The genome [G] that occupies the cells `chosen` [Q]."""
    _, weight, act = loss.cells.parts()
    genome = np.zeros(loss.space.num_genes, np.int16)
    genome[loss.cells.act_gene] = act[chosen]
    genome[loss.cells.weight_gene] = weight[
        chosen
    ]  # last: groups without an activation gene name the weight gene twice
    return genome


def _allowed(cost: CostModel, loss: CostModel) -> CostModel:
    """`cost` as a loss, with the cells forbidden that `loss` forbids."""
    masked = copy.copy(cost)
    masked.table = np.where(np.isfinite(loss.table), cost.table, np.inf)
    return masked


def _check(loss: CostModel, costs: Sequence[CostModel], limits: Floats) -> None:
    """Raises ValueError unless everything belongs to one space and is a number."""
    if len(costs) != len(limits):
        raise ValueError(f"there are {len(costs)} costs and {len(limits)} limits; give one limit for each cost.")
    if any(cost.space != loss.space for cost in costs):
        raise ValueError("a cost belongs to another space than the loss; build both for the space to search.")
    if np.isnan(loss.table).any() or (loss.table == -np.inf).any():
        raise ValueError(f"the loss {loss.name!r} has values that are not numbers; check the score.")
    for cost, limit in zip(costs, limits, strict=True):
        if not 0 < limit < math.inf:
            raise ValueError(f"the limit on {cost.name} is {limit:g}; it must be a positive finite number.")


def _why(loss: CostModel, costs: Sequence[CostModel], limits: Floats, forms: Sequence[Form] | None) -> str:
    """Which limit cannot be met, and the smallest value that it can have while the other limits hold."""
    asked = ",".join(limit_text(c.name, limit) for c, limit in zip(costs, limits, strict=True))
    answers = []
    for i, cost in enumerate(costs):
        others = [c for j, c in enumerate(costs) if j != i]
        try:
            least = exact_search(_allowed(cost, loss), others, np.delete(limits, i), forms=forms)
        except InfeasibleError:
            continue
        if least.loss > limits[i]:
            answers.append(reachable_text(cost.name, least.loss))
    if not answers:
        return f"budget {asked} cannot be met, not even if any one of its limits is dropped; raise several."
    within = " while the other limits hold" if len(costs) > 1 else ""
    return f"budget {asked} cannot be met: the smallest reachable{within} is {' or '.join(answers)}."
