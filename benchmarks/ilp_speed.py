"""How long the exact search takes: scipy's HiGHS against OR-Tools, on one core, with and without leaving out dominated cells.

    OMP_NUM_THREADS=1 python -m benchmarks.ilp_speed [--json FILE] [--limit SECONDS] [--seeds N]

Instances have the sizes of ResNets at 224 px, losses that fall by 4 with each bit, and limits on BitOps, or on size and BitOps.
OR-Tools (`pip install ortools`) is not a dependency; without it its columns are empty. CP-SAT takes whole numbers, so rows and
losses are rounded to 1e-9 of their largest value there.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.search_speed import resnet_layers, space_of
from benchmarks.tables import save, show
from eqnet.search.ilp import Problem, highs, tabulate
from eqnet.space import COSTS, CostModel, LayerInfo, QuantFormat, QuantSpace

BUDGETS = (("bitops",), ("size", "bitops"))


def instances() -> dict[str, QuantSpace]:
    """Layers x choices."""
    layers = resnet_layers("resnet18")
    formats = {layer.name: [QuantFormat(b) for b in (2, 4, 8)] for layer in layers}
    three = QuantSpace(
        [LayerInfo(x.name, "conv", x.weight_shape, x.macs, 0, calls=0) for x in layers],
        formats,
        {name: [] for name in formats},
    )
    return {
        "21 x 3": three,
        "54 x 49": space_of("resnet50", 49),
        "54 x 392": space_of("resnet50", 392),
        "150 x 49": space_of("resnet152", 49),
    }


def random_loss(space: QuantSpace, seed: int) -> CostModel:
    """Sensitivities spread over orders of magnitude; a format's error falls by 4 with each bit."""
    rng = np.random.default_rng(seed)
    scale = {(layer.name, slot): float(np.exp(rng.normal(0, 1.5))) for layer in space.layers for slot in "wa"}
    form = {(slot, s, c): float(np.exp(rng.normal(0, 0.3))) for slot in "wa" for s in (0, 1) for c in (0, 1)}

    def error(layer: LayerInfo, slot: str, fmt: QuantFormat | None) -> float:
        if fmt is None:
            return 0.0
        return scale[layer.name, slot] * 4.0**-fmt.bits * form[slot, fmt.symmetric, fmt.granularity == "channel"]

    return CostModel(space, "loss", "loss", lambda x, w, a: error(x, "w", w) + error(x, "a", a))


def everything(loss: CostModel, costs: list[CostModel], limits: np.ndarray) -> Problem:
    """The problem with all cells."""
    group = loss.cells.parts()[0]
    low = [np.minimum.reduceat(c.table, c.cells.offsets) for c in (loss, *costs)]
    room = np.array([x * c.divisor - c.constant - m.sum() for x, c, m in zip(limits, costs, low[1:], strict=True)])
    rows = np.stack([c.table - m[group] for c, m in zip(costs, low[1:], strict=True)]) / room[:, None]
    return Problem(np.arange(len(group)), group, loss.table - low[0][group], rows, float(low[0].sum()))


def cp_sat(problem: Problem, limit: float) -> float:
    """The smallest loss found by CP-SAT."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in problem.group]
    for group in np.split(np.arange(len(x)), np.flatnonzero(np.diff(problem.group)) + 1):
        model.add_exactly_one(x[i] for i in group)
    for row in problem.rows:
        model.add(cp_model.LinearExpr.weighted_sum(x, np.ceil(row * 1e9).astype(int).tolist()) <= 10**9)
    scale = 1e9 / problem.loss.max()
    model.minimize(cp_model.LinearExpr.weighted_sum(x, np.rint(problem.loss * scale).astype(int).tolist()))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds, solver.parameters.num_workers = limit, 1
    solver.solve(model)
    return problem.base + solver.objective_value / scale


def scip(problem: Problem, limit: float) -> float:
    """The smallest loss found by SCIP."""
    from ortools.linear_solver import pywraplp

    solver = pywraplp.Solver.CreateSolver("SCIP")
    solver.set_time_limit(int(1000 * limit))
    x = [solver.BoolVar("") for _ in problem.group]
    for group in np.split(np.arange(len(x)), np.flatnonzero(np.diff(problem.group)) + 1):
        solver.Add(sum(x[i] for i in group) == 1)
    for row in problem.rows:
        solver.Add(sum(float(r) * v for r, v in zip(row, x, strict=True)) <= 1)
    scale = 1e4 / problem.loss.max()
    solver.Minimize(sum(float(scale * c) * v for c, v in zip(problem.loss, x, strict=True)))
    parameters = pywraplp.MPSolverParameters()
    parameters.SetDoubleParam(parameters.RELATIVE_MIP_GAP, 0.0)
    solver.Solve(parameters)
    return problem.base + solver.Objective().Value() / scale


def highs_value(problem: Problem, limit: float) -> float:
    """The smallest loss found by HiGHS."""
    chosen, _ = highs(problem, limit)
    return float("nan") if chosen is None else problem.base + float(problem.loss[chosen].sum())


def run(limit: float, seeds: int) -> dict[str, Any]:
    """Median seconds of each solver, and how much worse its loss is than the best of all, by instance."""
    solvers = {"HiGHS": highs_value}
    if importlib.util.find_spec("ortools") is not None:
        solvers |= {"CP-SAT": cp_sat, "SCIP": scip}
    rows: dict[str, Any] = {}
    for size, space in instances().items():
        for names in BUDGETS:
            seconds: dict[str, list[float]] = {}
            losses: dict[str, list[float]] = {}
            for seed in range(seeds):
                loss, costs = random_loss(space, seed), [COSTS[name](space) for name in names]
                low, high = ([c.of(f()) for c in costs] for f in (space.smallest, space.largest))
                limits = np.array(low) + 0.25 * (np.array(high) - low)
                start = time.perf_counter()
                pruned = tabulate(loss, costs, limits, None)
                pruning = time.perf_counter() - start
                assert pruned is not None
                problems = {"": pruned, " all cells": everything(loss, costs, limits)}
                for label, problem in problems.items():
                    for solver, solve in solvers.items():
                        start = time.perf_counter()
                        value = solve(problem, limit)
                        spent = time.perf_counter() - start + (pruning if not label else 0.0)
                        seconds.setdefault(solver + label, []).append(spent)
                        losses.setdefault(solver + label, []).append(value)
            best = np.nanmin(list(losses.values()), axis=0)
            row: dict[str, Any] = {"cells": len(pruned.cell), "all": len(loss.table)}
            row |= {f"{name}, s": float(np.median(values)) for name, values in seconds.items()}
            row["worst loss over best"] = float(np.nanmax([np.array(v) / best - 1 for v in losses.values()]))
            rows[f"{size}, {' and '.join(names)}"] = row
    return rows


def main() -> None:
    """Prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for each solution")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = run(arguments.limit, arguments.seeds)
    show(Console(width=200, highlight=False), "exact search", rows)
    if arguments.json is not None:
        save(arguments.json, rows)


if __name__ == "__main__":
    main()
