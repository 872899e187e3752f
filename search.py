"""Searches a subnet of a trained supernet: `python search.py --budget 4 [--pareto] [settings.yaml ...] [key=value ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from rich.console import Console

from eqnet.checkpoint import read_json, save_tensors, write_json
from eqnet.command import make_console, progress_bar, run_command, start_cpu_processes
from eqnet.report import plot_bits, plot_front, plot_predictor, winner_table, write_front
from eqnet.run import Run, open_data, versions
from eqnet.scoring.evaluation import AccuracyTable, Evaluator, build_table, uniform_configs
from eqnet.scoring.predictor import AccuracyPredictor
from eqnet.search import genetic_search, pareto_search
from eqnet.settings import Settings, load_settings
from eqnet.space import ALL_FORMS, COSTS, BoundBudget, Budget, Form, Genomes, QuantConfig, QuantSpace
from eqnet.tracking import Tracker


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--budget", help="hard limits: 4 | w=3,a=4 | size=180KiB | bitops=1.2G, comma-joined")
    job.add_argument("--subnet", help="measure the config of this subnet.json instead of searching")
    parser.add_argument("--run", help="folder of the run (default: the latest below runs/)")
    parser.add_argument(
        "--form", choices=[f.name for f in ALL_FORMS], help="search one form (default: all of the space)"
    )
    parser.add_argument("--pareto", action="store_true", help="also the front between predicted accuracy and cost")
    parser.add_argument("settings", nargs="*", help="YAML files and key=value overrides of search.*, seed or tracking")
    return parser.parse_intermixed_args()


def main() -> None:
    """Table, predictor, search, re-ranking, result; builds what is missing."""
    arguments = parse_arguments()
    budget = None if arguments.budget is None else Budget.parse(arguments.budget)
    run = Run.open(arguments.run)
    settings = search_settings(run.settings, arguments.settings)
    supernet, _ = run.load_supernet()
    forms = [Form.parse(arguments.form)] if arguments.form else list(supernet.space.forms)
    space = supernet.space.restrict_form(forms[0]) if arguments.form else supernet.space
    bound = None if budget is None else budget.bind(space, settings.search.band)
    subnet = None if arguments.subnet is None else read_subnet(arguments.subnet, space)
    start_cpu_processes()
    accelerator = Accelerator()
    console = make_console()
    data = open_data(run)
    supernet.to(accelerator.device)
    evaluator = Evaluator.from_data(supernet, data, settings, accelerator.device)
    if bound is None:
        assert subnet is not None
        console.print(f"run {run.path}, {arguments.subnet}")
        return measure_subnet(subnet, space, evaluator, accelerator, console)
    console.print(f"run {run.path}, budget {budget}, {len(forms)} form(s)")
    tracker = Tracker(run.path, settings.tracking, settings.project, settings.model_dump(), accelerator.is_main_process)
    try:
        rows, folder = settings.search.table_size, run.path / "table"
        with progress_bar(console, "accuracy table", -(-rows // accelerator.num_processes)) as advance:
            table = build_table(evaluator, folder, rows, settings.seed, accelerator, advance)
        predictor = fit_predictor(run, settings, supernet.space, table, accelerator, tracker, console)
        search(arguments, run, settings, space, bound, evaluator, predictor, accelerator, tracker, console)
    finally:
        tracker.close()
    return None


def read_subnet(path: str, space: QuantSpace) -> QuantConfig:
    """The config of a `subnet.json`.

    Raises:
        ValueError: the file is missing, damaged, or its layers and formats are not those of the space.
    """
    document = read_json(path)
    try:
        config = QuantConfig.from_json(document["layers"])
        space.check(config)
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a subnet: it has no layers.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def measure_subnet(
    config: QuantConfig, space: QuantSpace, evaluator: Evaluator, accelerator: Accelerator, console: Console
) -> None:
    """Prints the measured accuracies and the costs of one config."""
    (row,) = evaluator.measure_all([config], ["validation", "test"], accelerator)
    costs = ", ".join(cost.format(cost.of(config)) for cost in (build(space) for build in COSTS.values()))
    console.print(f"validation {row[0]:.2f} %, test {row[1]:.2f} %; {costs}")


def search_settings(base: Settings, overrides: list[str]) -> Settings:
    """Settings of the run with overrides; only those that do not touch training may change.

    Raises:
        ValueError: an override of model, data, space or training.
    """
    settings = load_settings(overrides, base.model_dump())
    for section in ("model", "data", "space", "pretrain", "train", "output"):
        if getattr(settings, section) != getattr(base, section):
            raise ValueError(
                f"{section} belongs to the trained run and cannot change in a search; set search.*, seed or tracking."
            )
    return settings


def fit_predictor(
    run: Run,
    settings: Settings,
    space: QuantSpace,
    table: AccuracyTable,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> AccuracyPredictor:
    """Fits CQAP on the table, reports its rank quality on the held-out fifth and saves it."""
    predictor = AccuracyPredictor(space)
    metrics = predictor.fit(table.genomes, table.accuracy, seed=settings.seed)
    text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    console.print(f"predictor on {len(table)} configs; held-out fifth: {text}")
    if accelerator.is_main_process:
        predictor.save(run.path / "predictor.safetensors")
        assert predictor.held_out is not None
        picture = plot_predictor(*predictor.held_out, metrics, run.path / "predictor.png")
        tracker.log({f"predictor/{name}": value for name, value in metrics.items()}, tracker.last_step)
        tracker.image("predictor", picture)
    return predictor


def search(
    arguments: argparse.Namespace,
    run: Run,
    settings: Settings,
    space: QuantSpace,
    bound: BoundBudget,
    evaluator: Evaluator,
    predictor: AccuracyPredictor,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> None:
    """Genetic search, re-ranking of the best by measured accuracy, comparison with uniform configs, files."""
    s = settings.search

    def score(genomes: Genomes) -> NDArray[np.float64]:
        return predictor.score(genomes, space)

    with progress_bar(console, "genetic search", s.generations) as advance:
        result = genetic_search(
            space,
            score,
            bound,
            seed=settings.seed,
            population=s.population,
            generations=s.generations,
            mutation_probability=s.mutation_probability,
            top_k=s.top_k,
            progress=lambda *_: advance(),
        )
    uniform = [c for _, _, c in uniform_configs(space) if bound.feasible(space.encode_all([c]))[0]]
    finalists = [*map(space.decode, result.genomes), *uniform]
    predicted = score(space.encode_all(finalists))
    with progress_bar(
        console, f"measuring the best {len(result.genomes)} and {len(uniform)} uniform", len(finalists)
    ) as advance:
        measured = evaluator.measure_all(finalists, ["validation"], accelerator, advance)[:, 0]
    # a uniform config is a point of the space too: the winner is never measured worse than one within the budget
    order = sorted(range(len(finalists)), key=lambda i: (-measured[i], -predicted[i], i))
    best_uniform = next((i for i in order if i >= len(result.genomes)), None)
    chosen = [order[0]] if best_uniform is None else [order[0], best_uniform]
    tests = evaluator.measure_all([finalists[i] for i in chosen], ["test"], accelerator)[:, 0]
    found = [
        describe(finalists[i], space, float(predicted[i]), float(measured[i]), float(test))
        for i, test in zip(chosen, tests, strict=True)
    ]
    if not accelerator.is_main_process:
        return
    winner = finalists[order[0]]
    folder = new_folder(run.path / "search", str(Budget.parse(arguments.budget)), arguments)
    document = {
        "budget": str(Budget.parse(arguments.budget)),
        "seed": settings.seed,
        "versions": versions(),
        **found[0],
        "best_uniform_within_budget": found[1] if len(found) > 1 else None,
    }
    evaluator.supernet.set_config(winner)
    evaluator.supernet.recalibrate_bn(evaluator.bn_batches)
    save_tensors(folder / "subnet.safetensors", evaluator.supernet.extract().state_dict())
    write_json(folder / "subnet.json", document)
    console.print(winner_table(found, space))
    if order[0] == best_uniform:
        console.print("the winner is a uniform config: no searched one was measured better on the validation split")
    tracker.image("search/bits", plot_bits(winner, space, folder / "bits.png"))
    figures = {f"search/{name}": value for name, value in found[0]["accuracy"].items()}
    tracker.log(figures | {f"search/{name}": value for name, value in found[0]["cost"].items()}, tracker.last_step)
    tracker.table("search/winner", ["layer", "weight bits", "activation bits"], bit_rows(winner))
    if arguments.pareto:
        pareto(folder, space, bound, score, found[0], settings, tracker, console)
    console.print(f"saved {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def describe(
    config: QuantConfig, space: QuantSpace, predicted: float, validation: float, test: float
) -> dict[str, Any]:
    """What `subnet.json` says about a config."""
    genomes = space.encode_all([config])
    return {
        "form": space.form_name(config),
        "cost": {name: float(build(space)(genomes)[0]) for name, build in COSTS.items()},
        "accuracy": {"predicted": predicted, "validation": validation, "test": test},
        "layers": config.to_json(),
    }


def bit_rows(config: QuantConfig) -> list[list[Any]]:
    """One row per layer: name, weight bits, activation bits."""
    return [[name, c.weight.bits, "float" if c.act is None else c.act.bits] for name, c in config.items()]


def new_folder(parent: Path, budget: str, arguments: argparse.Namespace) -> Path:
    """A folder of its own for each search; earlier results stay."""
    stem = budget.replace("=", "").replace(",", "-") + (f"-{arguments.form}" if arguments.form else "")
    for suffix in ["", *(f"-{i}" for i in range(2, 10_000))]:
        folder = parent / f"{stem}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"{parent} holds ten thousand searches; clear it.")


def pareto(
    folder: Path,
    space: QuantSpace,
    bound: BoundBudget,
    score: Callable[[Genomes], NDArray[np.float64]],
    winner: dict[str, Any],
    settings: Settings,
    tracker: Tracker,
    console: Console,
) -> None:
    """The NSGA-II front between predicted accuracy and the budget's cost (BitOps if it limits several)."""
    cost = bound.costs[0] if len(bound.costs) == 1 else COSTS["bitops"](space)
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
    write_front(front.genomes, front.scores, space, folder / "pareto.csv")
    uniform = space.encode_all([c for _, _, c in uniform_configs(space)])
    unit, label = {"bits": (1, "mean bits"), "bytes": (2**10, "model size [KiB]"), "bitops": (1e9, "GBitOps")}[
        cost.unit
    ]
    picture = plot_front(
        {"cost": front.costs / unit, "accuracy": front.scores},
        {"cost": cost(uniform) / unit, "accuracy": score(uniform)},
        (winner["cost"][cost.name] / unit, winner["accuracy"]["predicted"]),
        label,
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
