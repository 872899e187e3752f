"""Searches a subnet of a trained supernet: `python search.py --budget 4 [--target NAME] [--pareto] [key=value ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from rich.console import Console

from eqnet.checkpoint import write_json
from eqnet.command import make_console, progress_bar, run_command, start_cpu_processes
from eqnet.data import DataSplits
from eqnet.nn.specialize import specialize
from eqnet.report import comparison_table, plot_bits, plot_front, plot_predictor, write_front
from eqnet.run import Run, open_data, versions
from eqnet.scoring.evaluation import AccuracyTable, Evaluator, build_table, uniform_configs
from eqnet.scoring.predictor import AccuracyPredictor, fitted_predictor
from eqnet.search import Found, exact_front, measured_search, pareto_search
from eqnet.search.exact import METHODS, Method, Planned, choose_method, planned_search, score_batches, score_formats
from eqnet.search.scope import Scope, open_scope, read_target_subnet, search_settings, target_header
from eqnet.settings import Settings
from eqnet.space import ALL_FORMS, BoundBudget, Budget, Genomes, QuantConfig, QuantSpace
from eqnet.space.hardware import load_target
from eqnet.subnet import save_subnet
from eqnet.tracking import Tracker

FRONT_POINTS = 20  # limits of an exact front


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument(
        "--budget", help="hard limits: 4 | w=3,a=4 | size=180KiB | bitops=1.2G | latency=2ms, comma-joined"
    )
    job.add_argument("--subnet", help="measure the config of this subnet.json instead of searching")
    parser.add_argument("--run", help="folder of the run (default: the latest below runs/)")
    parser.add_argument("--target", help="hardware target, by name or file: search what it runs, as it runs it")
    parser.add_argument(
        "--latency-table", help="times of layers on the device (default: latency/<target>.json of the run)"
    )
    parser.add_argument(
        "--form", choices=[f.name for f in ALL_FORMS], help="search one form (default: all of the space)"
    )
    parser.add_argument("--method", choices=METHODS, default="genetic", help="how to search (default: genetic)")
    parser.add_argument("--score", help="search on this additive score instead of an accuracy predictor")
    parser.add_argument("--pareto", action="store_true", help="also the front between predicted accuracy and cost")
    parser.add_argument("settings", nargs="*", help="YAML files and key=value overrides of search.*, seed or tracking")
    return parser.parse_intermixed_args()


def main() -> None:
    """Table, predictor, search, re-ranking, result; builds what is missing."""
    arguments = parse_arguments()
    budget = None if arguments.budget is None else Budget.parse(arguments.budget)
    additive = arguments.score is not None or arguments.method != "genetic"
    method, score = choose_method(arguments.method, arguments.score) if additive else (None, "")
    run = Run.open(arguments.run)
    if budget is not None and run.settings.subnet is not None:
        raise ValueError(
            f"{run.path} trained one subnet, there is nothing to search; name its supernet's run with --run."
        )
    settings = search_settings(run.settings, arguments.settings)
    supernet, _ = run.load_supernet()
    target = None if arguments.target is None else load_target(arguments.target)
    subnet = None
    if arguments.subnet is not None:
        subnet, target = read_target_subnet(arguments.subnet, supernet.space, target)
    scope = open_scope(
        supernet.space,
        run.path,
        budget=budget,
        target=target,
        form=arguments.form,
        latency_table=arguments.latency_table,
    )
    bound = None if budget is None else budget.bind(scope.space, settings.search.band, scope.costs)
    if subnet is not None:
        scope.space.check(subnet)
    start_cpu_processes()
    accelerator = Accelerator()
    console = make_console()
    data = open_data(run)
    supernet.to(accelerator.device)
    trained = Evaluator.from_data(supernet, data, settings, accelerator.device)
    evaluator = trained if target is None else trained.of(specialize(supernet, target))
    console.print(f"run {run.path}, {f'budget {budget}' if subnet is None else arguments.subnet}")
    console.print(scope.describe())
    if bound is None:
        assert subnet is not None
        return measure_subnet(subnet, scope, evaluator, accelerator, console)
    tracker = Tracker(run.path, settings.tracking, settings.project, settings.model_dump(), accelerator.is_main_process)
    try:
        if method is not None:
            return plan(
                arguments, run, settings, method, score, scope, bound, data, evaluator, accelerator, tracker, console
            )
        rows, folder = settings.search.table_size, run.path / "table"
        with progress_bar(console, "accuracy table", -(-rows // accelerator.num_processes)) as advance:
            table = build_table(trained, folder, rows, settings.seed, accelerator, advance)
        predictor = fit_predictor(run, settings, supernet.space, table, accelerator, tracker, console)
        search(arguments, run, settings, scope, bound, table, predictor, evaluator, accelerator, tracker, console)
    finally:
        tracker.close()
    return None


def measure_subnet(
    config: QuantConfig, scope: Scope, evaluator: Evaluator, accelerator: Accelerator, console: Console
) -> None:
    """Prints the measured accuracies and the costs of one config."""
    (row,) = evaluator.measure_all([config], ["validation", "test"], accelerator)
    costs = ", ".join(cost.format(cost.of(config)) for cost in (build(scope.space) for build in scope.costs.values()))
    console.print(f"validation {row[0]:.2f} %, test {row[1]:.2f} %; {costs}")


def fit_predictor(
    run: Run,
    settings: Settings,
    space: QuantSpace,
    table: AccuracyTable,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> AccuracyPredictor:
    """CQAP fitted on the table (once per table); reports its rank quality on the held-out fifth and saves it."""
    path = run.path / "predictor.safetensors"
    predictor, fresh = fitted_predictor(space, table.genomes, table.accuracy, seed=settings.seed, path=path)
    metrics = predictor.metrics
    text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    console.print(f"predictor on {len(table)} configs; held-out fifth: {text}")
    if fresh and accelerator.is_main_process:
        predictor.save(path)
        assert predictor.held_out is not None
        picture = plot_predictor(*predictor.held_out, metrics, run.path / "predictor.png")
        tracker.log({f"predictor/{name}": value for name, value in metrics.items()}, tracker.last_step)
        tracker.image("predictor", picture)
    return predictor


def search(
    arguments: argparse.Namespace,
    run: Run,
    settings: Settings,
    scope: Scope,
    bound: BoundBudget,
    table: AccuracyTable,
    predictor: AccuracyPredictor,
    evaluator: Evaluator,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> None:
    """Searches, measures the best on the test split once, beside the best uniform config, and writes the files."""
    s, space = settings.search, scope.space
    with progress_bar(console, "search and measurement", s.rounds * s.generations) as advance:
        found = measured_search(space, bound, table, predictor, evaluator, s, settings.seed, accelerator, advance)
    folder, won = conclude(arguments, run, settings, found, scope, {}, None, evaluator, accelerator, tracker, console)
    if folder is not None and arguments.pareto:
        pareto(folder, scope, bound, predictor, won, settings, tracker, console)
    if folder is not None:
        console.print(f"saved {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def conclude(
    arguments: argparse.Namespace,
    run: Run,
    settings: Settings,
    found: Found,
    scope: Scope,
    facts: dict[str, Any],
    score: str | None,
    evaluator: Evaluator,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> tuple[Path | None, dict[str, Any]]:
    """Measures the best on the test split once, beside the best uniform config, and writes the files.

    Returns:
        The folder (None on all but the main process), and what is written about the winner.
    """
    budget, space = str(Budget.parse(arguments.budget)), scope.space
    rivals = [*found.searched[:1], *found.uniform[:1]]
    tests = evaluator.measure_all([c.config for c in rivals], ["test"], accelerator)[:, 0]
    if not accelerator.is_main_process:
        return None, {}
    rows = [c.to_json(space, scope.costs, float(test)) for c, test in zip(rivals, tests, strict=True)]
    searched, uniform = (rows[0] if found.searched else None), (rows[-1] if found.uniform else None)
    best = found.best
    won = rows[rivals.index(best)]
    console.print(comparison_table({"searched": searched, "uniform": uniform}, space, scope.costs, score))
    if won is not searched:
        console.print("a uniform config was measured best on the validation split; it is the result")
    names = [arguments.form, *([arguments.method, score] if score is not None else [])]
    target = None if scope.target is None else scope.target.name
    folder = run.new_search_folder(budget, target, "-".join(filter(None, names)))
    table_file = None if scope.latency_table is None else str(scope.latency_table)
    header = {"budget": budget, "seed": settings.seed, "versions": versions(), "latency_table": table_file, **facts}
    document = {**header, **target_header(scope.target), **won, "best_searched": searched, "best_uniform": uniform}
    save_subnet(folder, evaluator.supernet, best.config, evaluator.bn_batches, document)
    tracker.image("search/bits", plot_bits(best.config, space, folder / "bits.png"))
    tracker.log({f"search/{name}": value for name, value in (won["accuracy"] | won["cost"]).items()}, tracker.last_step)
    bits = [[name, c.weight.bits, "float" if c.act is None else c.act.bits] for name, c in best.config.items()]
    tracker.table("search/subnet", ["layer", "weight bits", "activation bits"], bits)
    return folder, won


def plan(
    arguments: argparse.Namespace,
    run: Run,
    settings: Settings,
    method: Method,
    score: str,
    scope: Scope,
    bound: BoundBudget,
    data: DataSplits,
    evaluator: Evaluator,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> None:
    """Scores every format, searches on the sum of scores, measures the winner beside the best uniform config."""
    batches = score_batches(data, settings, accelerator.device)
    total = len(bound.space.layers) * len(range(accelerator.process_index, len(batches), accelerator.num_processes))
    with progress_bar(console, f"score {score}", total) as advance:
        sensitivity = score_formats(score, evaluator, bound.space, batches, accelerator, advance)
    planned = planned_search(method, sensitivity, bound, evaluator, settings.search, settings.seed, accelerator)
    exact = planned.exact
    proof = "proven" if exact.optimal else f"proven up to {100 * exact.gap:.2g} %"
    console.print(f"smallest {score} loss within the budget: {exact.loss:.6g}, {proof} in {exact.seconds:.2f} s")
    if method.solver == "genetic":
        console.print(f"optimality gap of the genetic search: {100 * planned.gap:.3g} %")
    facts = {
        "method": arguments.method,
        "score": score,
        "optimum": exact.loss,
        "bound": exact.bound,
        "gap": planned.gap,
    }
    folder, won = conclude(
        arguments, run, settings, planned.found, scope, facts, score, evaluator, accelerator, tracker, console
    )
    if folder is None:
        return
    write_json(folder / "sensitivity.json", sensitivity.to_json())
    if arguments.pareto or method.front:
        plan_front(folder, scope, bound, planned, score, won, settings, tracker, console)
    console.print(f"saved {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def plan_front(
    folder: Path,
    scope: Scope,
    bound: BoundBudget,
    planned: Planned,
    score: str,
    chosen: dict[str, Any],
    settings: Settings,
    tracker: Tracker,
    console: Console,
) -> None:
    """The exact front between loss and the budget's cost (BitOps if it limits several), and NSGA-II's on top."""
    space, loss = scope.space, planned.loss
    cost = bound.costs[0] if len(bound.costs) == 1 else scope.costs["bitops"](space)
    with progress_bar(console, "exact front", FRONT_POINTS) as advance:
        exact = exact_front(loss, cost, points=FRONT_POINTS, forms=space.forms or None, progress=advance)
    genetic = None
    if np.isfinite(loss.table).all():
        with progress_bar(console, "NSGA-II", settings.search.generations) as advance:
            genetic = pareto_search(
                space,
                lambda genomes: -loss(genomes),
                cost,
                seed=settings.seed,
                population=2 * settings.search.population,
                generations=settings.search.generations,
                mutation_probability=settings.search.mutation_probability,
                progress=lambda *_: advance(),
            )
    write_front(exact.genomes, exact.scores, space, scope.costs, folder / "pareto.csv", score)
    uniform = space.encode_all([c for _, _, c in uniform_configs(space)])
    picture = plot_front(
        (exact.costs, exact.scores),
        (cost(uniform), -loss(uniform)),
        (chosen["cost"][cost.name], chosen["accuracy"]["predicted"]),
        cost,
        folder / "pareto.png",
        score=score,
        genetic=None if genetic is None else (genetic.costs, genetic.scores),
    )
    tracker.image("search/pareto", picture)
    console.print(
        f"exact front: {len(exact.costs)} configs from {cost.format(exact.costs[0])} to {cost.format(exact.costs[-1])}"
    )


def pareto(
    folder: Path,
    scope: Scope,
    bound: BoundBudget,
    predictor: AccuracyPredictor,
    chosen: dict[str, Any],
    settings: Settings,
    tracker: Tracker,
    console: Console,
) -> None:
    """The NSGA-II front between predicted accuracy and the budget's cost (BitOps if it limits several)."""
    space = scope.space
    cost = bound.costs[0] if len(bound.costs) == 1 else scope.costs["bitops"](space)

    def score(genomes: Genomes) -> NDArray[np.float64]:
        return predictor.score(genomes, space)

    with progress_bar(console, "Pareto front", settings.search.generations) as advance:
        front = pareto_search(
            space,
            score,
            cost,
            seed=settings.seed,
            population=2 * settings.search.population,
            generations=settings.search.generations,
            mutation_probability=settings.search.mutation_probability,
            progress=lambda *_: advance(),
        )
    write_front(front.genomes, front.scores, space, scope.costs, folder / "pareto.csv")
    uniform = space.encode_all([c for _, _, c in uniform_configs(space)])
    picture = plot_front(
        (front.costs, front.scores),
        (cost(uniform), score(uniform)),
        (chosen["cost"][cost.name], chosen["accuracy"]["predicted"]),
        cost,
        folder / "pareto.png",
    )
    tracker.image("search/pareto", picture)
    tracker.table(
        "search/front",
        [cost.name, "predicted"],
        [[float(c), float(a)] for c, a in zip(front.costs, front.scores, strict=True)],
    )
    console.print(
        f"front: {len(front.costs)} configs from {cost.format(front.costs[0])} to {cost.format(front.costs[-1])}"
    )


if __name__ == "__main__":
    run_command(main)
