"""The job of a search, once its run, scope and budget are open: find, measure, write, draw.

By method: a genetic search on the accuracy predictor, an exact or genetic one on a sum of scores (`plan`), one on a training-free
proxy. All end in `conclude`, which measures the winner on the test split once and writes its folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from rich.console import Console

from eqnet.checkpoint import write_json
from eqnet.command import progress_bar
from eqnet.dashboard import track_front, track_predictor, track_search
from eqnet.data import DataSplits
from eqnet.report import comparison_table, plot_bits, plot_front, plot_predictor, write_front
from eqnet.run import Run, versions
from eqnet.scoring.emq_trees import PREFIX
from eqnet.scoring.evaluation import Evaluator, uniform_configs
from eqnet.scoring.layer_statistics import gather
from eqnet.scoring.predictor import AccuracyPredictor, fitted_predictor
from eqnet.scoring.proxies import Proxy
from eqnet.scoring.table import build_table
from eqnet.search import Found, ParetoFront, exact_front, measured_search, pareto_search
from eqnet.search.exact import Method, Planned, linearised_gap, planned_search, score_batches, score_formats
from eqnet.search.proxy import proxy_search
from eqnet.search.scope import Scope, target_header
from eqnet.settings import Settings
from eqnet.space import BoundBudget, Budget, CostModel, Genomes
from eqnet.subnet import save_subnet
from eqnet.tracking import Tracker

FRONT_POINTS = 20  # limits of an exact front


@dataclass(frozen=True)
class Job:
    """What a search works with: the run and its settings, what may be searched (`scope`), within which limits (`bound`), what
    measures configs as the target runs them (`evaluator`), and where it reports."""

    arguments: argparse.Namespace
    run: Run
    settings: Settings
    scope: Scope
    bound: BoundBudget
    evaluator: Evaluator
    accelerator: Accelerator
    tracker: Tracker
    console: Console

    @property
    def front_cost(self) -> CostModel:
        """The cost of a front: the budget's, or BitOps if it limits several."""
        return self.bound.costs[0] if len(self.bound.costs) == 1 else self.scope.costs["bitops"](self.scope.space)


def search(job: Job, trained: Evaluator) -> None:
    """Genetic search on the accuracy predictor.

    Args:
        job: whose evaluator measures the winners.
        trained: measures the table that the predictor learns: the supernet as trained, whatever the target.
    """
    s, seed = job.settings.search, job.settings.seed
    with progress_bar(job.console, "accuracy table", s.table_size) as advance:
        table = build_table(trained, job.run.path / "table", s.table_size, seed, job.accelerator, advance)
    path = job.run.path / "predictor.safetensors"
    labels = table.labels(s.measure)
    predictor, fresh = fitted_predictor(
        trained.supernet.space, table.genomes, labels, table.accuracy, seed=seed, path=path
    )
    text = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in predictor.metrics.items())
    job.console.print(f"predictor on {len(table)} configs; held-out fifth: {text}")
    if fresh and job.accelerator.is_main_process:
        save_predictor(job, predictor, path)
    space = job.scope.space
    with progress_bar(job.console, "search and measurement", s.rounds * s.generations) as advance:
        found = measured_search(space, job.bound, table, predictor, job.evaluator, s, seed, job.accelerator, advance)
    folder, won = conclude(job, found, {}, None)
    if folder is None:
        return
    (winner,) = space.encode_all([found.best.config])
    gap = linearised_gap(lambda genomes: predictor.score(genomes, space), winner, job.bound)
    job.console.print(
        f"optimality gap of the predictor linearised around the result: {gap.gain:z.2f} %"
        f"{'' if gap.proven else ' or more'}; the predictor itself gives that optimum {gap.found:+z.2f} %"
    )
    if job.arguments.pareto:
        front = genetic_front(job, "Pareto front", lambda genomes: predictor.score(genomes, space))
        draw_front(job, folder, won, front, lambda genomes: predictor.score(genomes, space))
    job.console.print(f"saved {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def save_predictor(job: Job, predictor: AccuracyPredictor, path: Path) -> None:
    """The predictor, its rank quality on the held-out fifth, and a picture of it."""
    predictor.save(path)
    assert predictor.held_out is not None
    picture = plot_predictor(predictor.held_out, job.run.path / "predictor.png")
    metrics = {f"predictor/{name}": value for name, value in predictor.metrics.items()}
    job.tracker.log(metrics, job.tracker.last_step)
    job.tracker.image("predictor/picture", picture)
    track_predictor(job.tracker, job.run, predictor)


def plan(job: Job, method: Method, score: str, data: DataSplits) -> None:
    """Scores every format, searches on the sum of scores, measures the winner beside the best uniform config."""
    accelerator, space = job.accelerator, job.bound.space
    batches = score_batches(data, job.settings, accelerator.device)
    total = len(space.layers) * len(range(accelerator.process_index, len(batches), accelerator.num_processes))
    with progress_bar(job.console, f"score {score}", total) as advance:
        sensitivity = score_formats(score, job.evaluator, space, batches, accelerator, advance)
    planned = planned_search(
        method, sensitivity, job.bound, job.evaluator, job.settings.search, job.settings.seed, accelerator
    )
    exact = planned.exact
    proof = "proven" if exact.optimal else f"proven up to {100 * exact.gap:.2g} %"
    job.console.print(f"smallest {score} loss within the budget: {exact.loss:.6g}, {proof} in {exact.seconds:.2f} s")
    if method.solver == "genetic":
        job.console.print(f"optimality gap of the genetic search: {100 * planned.gap:.3g} %")
    facts = {"method": job.arguments.method, "score": score}
    facts |= {"optimum": exact.loss, "bound": exact.bound, "gap": planned.gap}
    folder, won = conclude(job, planned.found, facts, score)
    if folder is None:
        return
    write_json(folder / "sensitivity.json", sensitivity.to_json())
    if job.arguments.pareto or method.front:
        exact_fronts(job, folder, won, planned, score)
    job.console.print(f"saved {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def search_proxy(job: Job, proxy: Proxy, data: DataSplits) -> None:
    """Gathers statistics of the layers, searches on a proxy, measures the winners beside the best uniform config."""
    supernet, space = job.evaluator.supernet, job.bound.space
    batches = score_batches(data, job.settings, job.accelerator.device)
    job.evaluator.recalibrate_float()
    with progress_bar(job.console, "statistics of the layers", len(proxy.needs) + 1) as advance:
        statistics = gather(supernet, space, batches, job.accelerator, advance, proxy.needs)
    how = "integer programming, proven" if proxy.additive else "genetic search"
    kind = "is a sum over layers" if proxy.additive else "is not a sum over layers"
    job.console.print(f"{proxy.name} {kind}: {how}", markup=False)
    s = job.settings.search
    with progress_bar(job.console, "search", 0 if proxy.additive else s.generations) as advance:
        result = proxy_search(
            proxy, statistics, job.bound, job.evaluator, s, job.settings.seed, job.accelerator, advance
        )
    facts = {"method": "emq", "score": proxy.name, "additive": proxy.additive}
    folder, _ = conclude(job, result.found, facts, Path(proxy.name.removeprefix(PREFIX)).stem)
    if folder is not None:
        job.console.print(f"saved {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def conclude(job: Job, found: Found, facts: dict[str, Any], score: str | None) -> tuple[Path | None, dict[str, Any]]:
    """Measures the best on the test split once, beside the best uniform config, and writes the files.

    Args:
        job: the search.
        found: what it measured on the validation split.
        facts: what else the subnet's file says.
        score: the additive score that was searched on, None for the predictor.

    Returns:
        The folder (None on all but the main process), and what is written about the winner.
    """
    scope, space, evaluator = job.scope, job.scope.space, job.evaluator
    rivals = [*found.searched[:1], *found.uniform[:1]]
    tests = evaluator.measure_all([c.config for c in rivals], ["test"], job.accelerator)[:, 0]
    if not job.accelerator.is_main_process:
        return None, {}
    rows = [c.to_json(space, scope.costs, float(test)) for c, test in zip(rivals, tests, strict=True)]
    searched, uniform = (rows[0] if found.searched else None), (rows[-1] if found.uniform else None)
    best = found.best
    won = rows[rivals.index(best)]
    job.console.print(comparison_table({"searched": searched, "uniform": uniform}, space, scope.costs, score))
    if won is not searched:
        job.console.print("a uniform config was measured best on the validation split; it is the result")
    budget, target = str(Budget.parse(job.arguments.budget)), None if scope.target is None else scope.target.name
    names = [job.arguments.form, *([job.arguments.method, score] if score is not None else [])]
    folder = job.run.new_search_folder(budget, target, "-".join(filter(None, names)))
    table_file = None if scope.latency_table is None else str(scope.latency_table)
    header = {"budget": budget, "seed": job.settings.seed, "measure": found.measure}
    header |= {"versions": versions(), "latency_table": table_file, **facts}
    document = {**header, **target_header(scope.target), **won, "best_searched": searched, "best_uniform": uniform}
    save_subnet(folder, evaluator.supernet, best.config, evaluator.bn_batches, document)
    tracker, figures = job.tracker, {**won["accuracy"], "divergence": won["divergence"], **won["cost"]}
    tracker.image("search/bits", plot_bits(best.config, space, folder / "bits.png"))
    tracker.log({f"search/{name}": value for name, value in figures.items()}, tracker.last_step)
    tested = {c.config: float(test) for c, test in zip(rivals, tests, strict=True)}
    track_search(tracker, found, tested, space, scope.costs, job.front_cost)
    sources = ["supernet", *(["predictor"] if score is None else [])]
    files = [folder / "subnet.json", folder / "subnet.safetensors"]
    tracker.artifact(f"subnet-{folder.name}", "subnet", files, facts=figures, made_from=sources)
    return folder, won


# -- fronts -----------------------------------------------------------------------------------------------------------

Score = Callable[[Genomes], NDArray[np.float64]]


def genetic_front(job: Job, title: str, score: Score) -> ParetoFront:
    """NSGA-II between a score and the cost."""
    s = job.settings.search
    with progress_bar(job.console, title, s.generations) as advance:
        return pareto_search(
            job.scope.space,
            score,
            job.front_cost,
            seed=job.settings.seed,
            population=2 * s.population,
            generations=s.generations,
            mutation_probability=s.mutation_probability,
            progress=lambda *_: advance(),
        )


def exact_fronts(job: Job, folder: Path, chosen: dict[str, Any], planned: Planned, score: str) -> None:
    """The exact front between loss and cost, and NSGA-II's on top."""
    loss = planned.loss

    def negative(genomes: Genomes) -> NDArray[np.float64]:
        return -loss(genomes)

    with progress_bar(job.console, "exact front", FRONT_POINTS) as advance:
        exact = exact_front(
            loss, job.front_cost, points=FRONT_POINTS, forms=job.scope.space.forms or None, progress=advance
        )
    finite = bool(np.isfinite(loss.table).all())
    draw_front(job, folder, chosen, exact, negative, score, genetic_front(job, "NSGA-II", negative) if finite else None)


def draw_front(
    job: Job,
    folder: Path,
    chosen: dict[str, Any],
    front: ParetoFront,
    value: Score,
    score: str | None = None,
    genetic: ParetoFront | None = None,
) -> None:
    """Writes a front as a table and as a picture, with the uniform configs and the chosen one.

    Args:
        job: the search.
        folder: where the files go.
        chosen: what is written about the winner.
        front: to write; exact if there is an additive score.
        value: predicted accuracy, or the negative loss.
        score: name of the additive score.
        genetic: a front to draw on top.
    """
    space, cost = job.scope.space, job.front_cost
    write_front(front.genomes, front.scores, space, job.scope.costs, folder / "pareto.csv", score)
    uniform = space.encode_all([c for _, _, c in uniform_configs(space)])
    star = (chosen["cost"][cost.name], chosen["accuracy"]["predicted"])
    picture = plot_front(
        (front.costs, front.scores),
        (cost(uniform), value(uniform)),
        star,
        cost,
        folder / "pareto.png",
        score=score,
        genetic=None if genetic is None else (genetic.costs, genetic.scores),
    )
    job.tracker.image("search/pareto", picture)
    rivals = list(zip(cost(uniform).tolist(), value(uniform).tolist(), strict=True))
    axes = (cost.name, "predicted [%]" if score is None else f"negative {score} loss")
    track_front(job.tracker, front, rivals, star, axes)
    ends = f"{cost.format(front.costs[0])} to {cost.format(front.costs[-1])}"
    job.console.print(f"{'front' if score is None else 'exact front'}: {len(front.costs)} configs from {ends}")
