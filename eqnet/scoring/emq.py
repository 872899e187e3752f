"""Proxies that evolve (EMQ, arXiv 2307.10554, section 4.3): trees of `emq_trees`, bred to order the search half of a benchmark.

Each step crosses or mutates one or two parents of the better half of the population. Diversity-prompting selection: a fresh
random tree competes with the child, and the better of the two enters. The worst leaves, so the size of the population is
constant and the best never leaves. Compatibility screening: trees whose canonical form was seen, and trees whose scores are not
finite, almost constant, or order the configs like those of a tree that was seen, cost no evaluation. Operation sampling
prioritisation: operations and inputs are drawn by their weights.

Fitness is the magnitude of Spearman's correlation with measured accuracy on the search half, less a little for each node, so
that of two equal trees the shorter wins; the sign becomes part of the proxy. The held-out half is never looked at.

Departs from the official code: configs are the whole search half instead of 50 drawn with replacement; signs are kept; children
are scored themselves; every random number comes from the seed, and an interrupted evolution continues exactly.

Shape legend: `N` configs.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from deap import gp
from numpy.typing import NDArray
from scipy.stats import rankdata

from eqnet.checkpoint import read_json, write_json
from eqnet.scoring.emq_trees import EvolvedProxy, canonical, names_of, parse
from eqnet.scoring.emq_variation import Grower, crossed
from eqnet.scoring.layer_statistics import LayerStatistics
from eqnet.scoring.mqbench import Benchmark

Floats = NDArray[np.float64]
PARSIMONY = 2e-4  # of fitness, for each node
_TRIES = 50  # trees drawn for one that passes the screening
_SAVE_EVERY = 25  # evaluations
_LEAST_DISTINCT = 0.2  # of the scores of a proxy that is not constant


@dataclass(frozen=True)
class EvolutionSettings:
    """Sizes and parts of an evolution.

    Attributes:
        evaluations: trees whose fitness is computed.
        population: trees that live at a time.
        crossover: part of the children that are crossovers; the others are mutants.
        screening: see the module.
        diversity: see the module.
        priority: draw operations and inputs by their weights, not uniformly.
        scores: additive scores may be inputs; otherwise only the statistics of EMQ.
    """

    evaluations: int = 1000
    population: int = 50
    crossover: float = 0.5
    screening: bool = True
    diversity: bool = True
    priority: bool = True
    scores: bool = True

    def __post_init__(self) -> None:
        if self.population < 4 or self.evaluations < self.population:
            raise ValueError(
                f"an evolution needs a population of at least 4 and as many evaluations; got {self.population} and "
                f"{self.evaluations}."
            )


@dataclass
class Individual:
    """A tree that was evaluated: fitness, Spearman's correlation on the search half with its sign."""

    tree: gp.PrimitiveTree
    fitness: float
    spearman: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"tree": names_of(self.tree), "fitness": self.fitness, "spearman": self.spearman}


@dataclass
class Evolution:
    """The state of an evolution, and its result.

    Attributes:
        population: best first.
        history: (evaluations, best fitness) whenever the best changed.
        evaluations: fitnesses computed.
        wasted: evaluations of trees with no valid score, or one that orders configs as another does.
        rejected: trees that cost no evaluation, by reason.
    """

    population: list[Individual] = field(default_factory=list)
    history: list[tuple[int, float]] = field(default_factory=list)
    evaluations: int = 0
    wasted: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: {"form": 0, "invalid": 0, "behaviour": 0})
    forms: set[str] = field(default_factory=set)
    behaviours: set[str] = field(default_factory=set)

    @property
    def best(self) -> Individual:
        """The fittest tree."""
        return self.population[0]

    def proxy(self, index: int = 0) -> EvolvedProxy:
        """A member of the population with its direction."""
        member = self.population[index]
        return EvolvedProxy(member.tree, 1 if member.spearman >= 0 else -1)


def evolve(
    benchmark: Benchmark,
    statistics: LayerStatistics,
    settings: EvolutionSettings,
    seed: int,
    state: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> Evolution:
    """Breeds proxies on the search half of a benchmark; the same seed gives the same result.

    Args:
        benchmark: measured configs.
        statistics: of the layers of its space.
        settings: of the evolution.
        seed: of all random choices.
        state: file to which the state is written now and then, and from which an interrupted evolution continues.
        progress: called once per evaluation.

    Raises:
        ValueError: accuracies of the search half are all equal, or `state` belongs to another evolution.
    """
    run = _Run(benchmark, statistics, settings, seed, state)
    for _ in range(run.found.evaluations):
        if progress is not None:
            progress()
    while run.found.evaluations < settings.evaluations:
        before = run.found.evaluations
        run.step()
        for _ in range(run.found.evaluations - before):
            if progress is not None:
                progress()
        run.save(settings.evaluations if before // _SAVE_EVERY < run.found.evaluations // _SAVE_EVERY else None)
    run.save(settings.evaluations)
    return run.found


class _Run:
    """What an evolution works with."""

    def __init__(
        self,
        benchmark: Benchmark,
        statistics: LayerStatistics,
        settings: EvolutionSettings,
        seed: int,
        state: Path | None,
    ) -> None:
        self.genomes, accuracy = benchmark.half(search=True)
        if np.ptp(accuracy) == 0:
            raise ValueError("all accuracies of the search half are equal; no proxy can be better than another.")
        self.ranks = _standard_ranks(accuracy)
        self.statistics, self.settings, self.state = statistics, settings, state
        table = hashlib.sha256(self.genomes.tobytes() + accuracy.tobytes()).hexdigest()
        self.identity = {"settings": {**asdict(settings), "evaluations": None}, "seed": seed, "table": table}
        self.rng = np.random.default_rng((seed, 5))
        self.grower = Grower(statistics, priority=settings.priority, scores=settings.scores)
        self.found = Evolution()
        if state is not None and state.exists():
            self._load(state)

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One more tree in the population, or one child against one fresh tree."""
        population, s = self.found.population, self.settings
        if len(population) < s.population:
            self._enter(self._evaluated(lambda: self.grower.grow(self.rng)))
            return
        child = self._evaluated(self._child)
        if s.diversity and self.found.evaluations < s.evaluations:
            fresh = self._evaluated(lambda: self.grower.grow(self.rng))
            if fresh is not None and (child is None or fresh.fitness > child.fitness):
                child = fresh
        self._enter(child)

    def _child(self) -> gp.PrimitiveTree:
        parents = self.found.population[: max(2, len(self.found.population) // 2)]
        first, second = (parents[i].tree for i in self.rng.choice(len(parents), 2, replace=False))
        if self.rng.random() < self.settings.crossover:
            return crossed(first, second, self.rng)
        return self.grower.mutated(first, self.rng)

    def _enter(self, individual: Individual | None) -> None:
        if individual is None:
            return
        population = self.found.population
        best = population[0].fitness if population else -1.0
        population.append(individual)
        population.sort(key=lambda member: -member.fitness)
        del population[self.settings.population :]
        if population[0].fitness > best:
            self.found.history.append((self.found.evaluations, population[0].fitness))

    def _evaluated(self, draw: Callable[[], gp.PrimitiveTree]) -> Individual | None:
        """A tree and its fitness; None if it has none, or after too many tries."""
        found, screening = self.found, self.settings.screening
        for _ in range(_TRIES):
            tree = draw()
            form = _digest(canonical(tree).encode())
            if screening and form in found.forms:
                found.rejected["form"] += 1
                continue
            found.forms.add(form)
            scores = EvolvedProxy(tree).scores(self.statistics, self.genomes)
            valid = _is_valid(scores)
            ranks = _standard_ranks(scores) if valid else scores
            # an order and its reverse are one behaviour
            behaviour = _digest((ranks * np.sign(ranks[np.flatnonzero(ranks)[:1]].sum())).tobytes()) if valid else ""
            repeated = behaviour in found.behaviours
            if screening and (not valid or repeated):
                found.rejected["behaviour" if valid else "invalid"] += 1
                continue
            found.evaluations += 1
            found.wasted += not valid or repeated
            if not valid:
                return None
            found.behaviours.add(behaviour)
            spearman = float(ranks @ self.ranks)
            return Individual(tree, abs(spearman) - PARSIMONY * len(tree), spearman)
        return None

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self, when: int | None) -> None:
        """Writes the state, unless `when` is None."""
        if self.state is None or when is None:
            return
        found = self.found
        data = {
            **self.identity,
            "random": self.rng.bit_generator.state,
            "population": [member.to_json() for member in found.population],
            "history": found.history,
            "evaluations": found.evaluations,
            "wasted": found.wasted,
            "rejected": found.rejected,
            "forms": sorted(found.forms),
            "behaviours": sorted(found.behaviours),
        }
        write_json(self.state, data)

    def _load(self, path: Path) -> None:
        data = read_json(path)
        if any(data.get(key) != value for key, value in self.identity.items()):
            raise ValueError(
                f"'{path}' belongs to another evolution (table, seed or settings); give another --output, or move it away."
            )
        members = [Individual(parse(m["tree"]), m["fitness"], m["spearman"]) for m in data["population"]]
        history = [(int(n), float(f)) for n, f in data["history"]]
        sets = set(data["forms"]), set(data["behaviours"])
        self.found = Evolution(members, history, data["evaluations"], data["wasted"], data["rejected"], *sets)
        self.rng.bit_generator.state = data["random"]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _standard_ranks(values: Floats) -> Floats:
    """Ranks of mean 0 and length 1, so that a product of two is Spearman's correlation, [N]."""
    ranks = rankdata(values)
    ranks -= ranks.mean()
    out: Floats = ranks / np.linalg.norm(ranks)
    return out


def _is_valid(scores: Floats) -> bool:
    """Finite, and not constant nor almost so, relative to their size."""
    if not np.isfinite(scores).all():
        return False
    spread = np.ptp(scores)
    if spread <= 1e-9 * np.abs(scores).max():
        return False
    return len(np.unique((scores / spread).round(9))) > _LEAST_DISTINCT * len(scores)


# -- several seeds ----------------------------------------------------------------------------------------------------

_report: Any = None  # in a worker: the queue that counts evaluations


def evolve_seeds(
    benchmark: Benchmark,
    statistics: LayerStatistics,
    settings: EvolutionSettings,
    seeds: Sequence[int],
    folder: Path,
    processes: int = 1,
    progress: Callable[[], None] | None = None,
) -> dict[int, Evolution]:
    """Evolutions of several seeds, in several processes; each keeps its state in `folder/seed-<number>.json`.

    Args:
        benchmark: see `evolve`, as for `statistics` and `settings`.
        statistics: ...
        settings: ...
        seeds: of the evolutions.
        folder: made if it is missing.
        processes: that share the seeds.
        progress: called once per evaluation of any of them.

    Raises:
        ValueError: as `evolve`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {seed: (benchmark, statistics, settings, seed, folder / f"seed-{seed}.json") for seed in seeds}
    if processes > 1 and len(seeds) > 1:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        with ProcessPoolExecutor(processes, context, _start_worker, (queue,)) as pool:
            futures = [pool.submit(_work, job) for job in jobs.values()]
            while not all(future.done() for future in futures):
                with contextlib.suppress(Empty):
                    queue.get(timeout=0.2)
                    if progress is not None:
                        progress()
            for future in futures:
                future.result()
        progress = None
    return {seed: evolve(benchmark, statistics, settings, seed, job[-1], progress) for seed, job in jobs.items()}


def _start_worker(queue: Any) -> None:
    global _report
    _report = queue


def _work(job: tuple[Benchmark, LayerStatistics, EvolutionSettings, int, Path]) -> None:
    evolve(*job, progress=lambda: _report.put(None))
