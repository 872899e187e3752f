"""What a search costs, against its floors; one core, spaces of ResNets at 224 px, no images and no network.

The floor of the genetic search is the bare prediction of as many configs in one call; that of NSGA-II adds DEAP's selection;
that of costs is the gather and sum of numpy with ready-made indices; that of predictions is one product of matrices with
ready-made inputs (the first layer of the predictor alone, as BLAS would do it).

    OMP_NUM_THREADS=1 python -m benchmarks search_speed [--full | --short] [--output folder]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from deap import tools
from numpy.typing import NDArray

from benchmarks.timing import Size, Timing, interleave, ratio
from eqnet.scoring.predictor import AccuracyPredictor
from eqnet.search import genetic, genetic_search, pareto_search, variation
from eqnet.space import ALL_FORMS, COSTS, BoundBudget, Budget, Genomes, LayerInfo, MeanBitsSampler, QuantSpace
from eqnet.space.cost import CostTable

NETS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet152": (3, 8, 36, 3)}


def resnet_layers(net: str) -> list[LayerInfo]:
    """The facts that `trace_layers` finds about a ResNet of timm at 224 px, without torch."""
    bottleneck, layers = net != "resnet18", []

    def add(name: str, out: int, inputs: int, kernel: int, size: int, stride: int = 1) -> None:
        macs = out * inputs * kernel**2 * (size // stride) ** 2
        layers.append(LayerInfo(name, "conv", (out, inputs, kernel, kernel), macs, inputs * size**2))

    add("conv1", 64, 3, 7, 224, 2)
    inputs, size = 64, 56
    for stage, blocks in enumerate(NETS[net]):
        width = 64 * 2**stage
        for block in range(blocks):
            stride, name = (2 if stage and not block else 1), f"layer{stage + 1}.{block}"
            if bottleneck:
                add(f"{name}.conv1", width, inputs, 1, size)
                add(f"{name}.conv2", width, width, 3, size, stride)
                add(f"{name}.conv3", 4 * width, width, 1, size // stride)
            else:
                add(f"{name}.conv1", width, inputs, 3, size, stride)
                add(f"{name}.conv2", width, width, 3, size // stride)
            out = 4 * width if bottleneck else width
            if stride > 1 or inputs != out:
                add(f"{name}.downsample.0", out, inputs, 1, size, stride)
            inputs, size = out, size // stride
    return [*layers, LayerInfo("fc", "linear", (1000, inputs), 1000 * inputs, inputs)]


def space_of(net: str, choices: int = 392) -> QuantSpace:
    """7 x 7 bit-widths of each layer, in 8 forms (392 choices) or in one (49)."""
    space = QuantSpace.from_layers(resnet_layers(net))
    return space if choices == 392 else space.restrict_form(ALL_FORMS[0])


def fitted(space: QuantSpace) -> AccuracyPredictor:
    """A predictor of the default recipe, fitted to an accuracy that falls with the noise of each layer."""
    rng = np.random.default_rng(0)
    genomes = MeanBitsSampler(space).sample(rng, 400)
    columns = np.arange(space.num_genes)
    noise = np.exp(rng.normal(size=space.num_genes)) * 3.5 ** -(space.bits[columns, genomes] - 2.0)
    noise *= np.where(space.symmetric[columns, genomes], 1, 0.9) * np.where(space.per_channel[columns, genomes], 0.8, 1)
    predictor = AccuracyPredictor(space)
    predictor.fit(genomes, 10 + 60 * np.exp(-noise.mean(1)), seed=0)
    return predictor


def budget_of(space: QuantSpace) -> BoundBudget:
    """4 mean bits, and less BitOps than 4 bits everywhere need."""
    uniform = COSTS["bitops"](space).of(space.uniform(4, space.forms[0]))
    return Budget((("w", 4.0), ("a", 4.0), ("bitops", 0.95 * uniform))).bind(space)


def table(timings: dict[str, Timing], floors: dict[str, str]) -> dict[str, dict[str, Any]]:
    """One row per variant, with its ratio against its floor."""
    rows: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        rows[name] = {"seconds": timing.median, "quartiles": [timing.low, timing.high]}
        if name in floors:
            rows[name]["/ its floor"] = ratio(timings, name, floors[name])
    return rows


@contextmanager
def clocked(spent: dict[str, float], methods: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
    """Adds up the seconds inside some functions under a name."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for name, places in methods.items():
            for owner, attribute in places:
                stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield


def shares(search: Callable[[], object], predictor: AccuracyPredictor) -> dict[str, dict[str, float]]:
    """Seconds and shares of the parts of one genetic search."""
    spent: dict[str, float] = {}
    methods = {
        "predictions": [(predictor, "score")],
        "costs and repair": [(BoundBudget, "repair")],
        "spending what is left": [(BoundBudget, "fill")],
        "children": [(variation.Variation, "children")],
        "first population": [(variation.Variation, "start")],
        "selection": [(tools, "selBest"), (tools.HallOfFame, "update"), (genetic, "_individuals")],
        "all": [(genetic, "genetic_search")],
    }
    with clocked(spent, methods):
        search()
    spent["mutants and crossovers"] = spent.pop("children") + spent["first population"] - spent["costs and repair"]
    del spent["first population"]
    total = spent.pop("all")
    spent["everything else"] = total - sum(spent.values())
    return {name: {"seconds": s, "share [%]": 100 * s / total} for name, s in spent.items()}


def genetic_tables(short: bool) -> dict[str, Any]:
    """The search of the paper's size, its floor and its parts."""
    population, generations = (20, 10) if short else (100, 500)
    functions: dict[str, Callable[[], object]] = {}
    floors: dict[str, str] = {}
    out: dict[str, Any] = {}
    title = f"genetic search, {population} x {generations}"
    for net in ("resnet18",) if short else ("resnet18", "resnet50"):
        space = space_of(net)
        predictor, budget = fitted(space), budget_of(space)
        name = f"{net}, {len(space.layers)} layers"

        def search(
            space: QuantSpace = space, predictor: AccuracyPredictor = predictor, budget: BoundBudget = budget
        ) -> genetic.SearchResult:
            return genetic.genetic_search(
                space, lambda g: predictor.score(g), budget, seed=0, population=population, generations=generations
            )

        evaluations = search().evaluations
        configs = space.random_genomes(np.random.default_rng(0), evaluations)
        floor = f"{name}: {evaluations} predictions alone"
        functions |= {name: search, floor: lambda p=predictor, g=configs: p.score(g)}  # type: ignore[misc]
        floors[name] = floor
        out[f"{title}, {name}: where the time goes"] = shares(search, predictor)
    return {title: table(interleave(functions, 1 if short else 5), floors), **out}


def pareto_table(short: bool) -> dict[str, Any]:
    """NSGA-II and its floor."""
    population, generations = (20, 5) if short else (200, 200)
    net = "resnet18" if short else "resnet50"
    space = space_of(net)
    predictor, cost = fitted(space), COSTS["bitops"](space)
    rng = np.random.default_rng(0)
    configs = space.random_genomes(rng, population * (generations + 1))
    points = rng.normal(size=(2 * population, 2)).cumsum(0)
    crowd = genetic._individuals(
        genetic._ScoreAndCost,
        configs[: 2 * population],
        np.zeros(2 * population, np.intp),
        np.arange(2 * population),
        list(points.T),
    )

    def floor() -> None:
        predictor.score(configs)
        cost(configs)
        for _ in range(generations + 1):
            tools.selNSGA2(crowd, population, nd="log")

    name = f"{net}, {len(space.layers)} layers"
    below = f"{name}: predictions, costs and selection alone"
    functions: dict[str, Callable[[], object]] = {
        name: lambda: pareto_search(
            space, predictor.score, cost, seed=0, population=population, generations=generations
        ),
        below: floor,
    }
    return {f"NSGA-II, {population} x {generations}": table(interleave(functions, 1 if short else 5), {name: below})}


def lookup_table(short: bool) -> dict[str, Any]:
    """Costs and predictions of many configs."""
    count = 1000 if short else 100_000
    space = space_of("resnet18" if short else "resnet50")
    predictor = fitted(space)
    configs = space.random_genomes(np.random.default_rng(0), count)
    costs = [build(space) for build in COSTS.values()]
    together = CostTable(costs)
    index = costs[0].cells.index(configs)
    inputs = np.random.default_rng(0).normal(size=(count, 6 + 6 * len(space.layers))).astype(np.float32)
    weight = inputs[: predictor.recipe.members * predictor.recipe.hidden].T.copy()

    def gather() -> list[NDArray[np.float64]]:
        return [
            np.concatenate([cost.table.take(part).sum(0) for part in np.array_split(index, -(-count // 1024), 1)])
            for cost in costs
        ]

    functions: dict[str, Callable[[], object]] = {
        "all four costs together": lambda: together(configs),
        "four costs one after the other": lambda: [cost(configs) for cost in costs],
        "floor of costs": gather,
        "predictions": lambda: predictor.score(configs),
        "floor of predictions": lambda: inputs @ weight,
    }
    floors = {"predictions": "floor of predictions"}
    floors |= dict.fromkeys(("all four costs together", "four costs one after the other"), "floor of costs")
    return {f"{count} configs, {len(space.layers)} layers": table(interleave(functions, 1 if short else 15), floors)}


def growth_table(short: bool) -> dict[str, Any]:
    """Seconds of genetic searches that differ in one number."""
    nets = ("resnet18",) if short else tuple(NETS)
    cases = [(net, 392, 100) for net in nets] + [("resnet50", 49, 100)] * (not short)
    cases += [("resnet50", 392, population) for population in (50, 200, 400)] * (not short)
    functions: dict[str, Callable[[], object]] = {}
    for net, choices, population in cases:
        space = space_of(net, choices)
        predictor, budget = fitted(space), budget_of(space)
        name = f"{len(space.layers)} layers x {choices} choices, population {population}"

        def search(
            space: QuantSpace = space,
            score: Callable[[Genomes], NDArray[np.float64]] = predictor.score,
            budget: BoundBudget = budget,
            population: int = population,
        ) -> object:
            return genetic_search(space, score, budget, seed=0, population=population, generations=5 if short else 100)

        functions[name] = search
    timings = interleave(functions, 1 if short else 3)
    return {f"growth: {5 if short else 100} generations": table(timings, {})}


def run(size: Size) -> dict[str, Any]:
    """Genetic search with its parts, NSGA-II, 100,000 costs and predictions, and growth."""
    short = size == "short"
    return {**genetic_tables(short), **pareto_table(short), **lookup_table(short), **growth_table(short)}
