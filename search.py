"""Searches a subnet of a trained supernet: `python search.py --budget 4 [--target NAME] [--pareto] [key=value ...]`."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from rich.console import Console

from eqnet.command import make_console, run_command, start_cpu_processes
from eqnet.html_report import report_at_end
from eqnet.nn.specialize import specialize
from eqnet.run import Run, open_data
from eqnet.run_files import Evaluation, read_facts
from eqnet.scoring.emq_trees import find_proxy
from eqnet.scoring.evaluation import DIVERGENCE, VALIDATION, Evaluator, UniformAccuracy
from eqnet.scoring.proxies import PROXIES, Proxy
from eqnet.scoring.table import like_table, read_rows
from eqnet.search.exact import METHODS, choose_method
from eqnet.search.scope import Scope, open_scope, read_target_subnet, search_settings
from eqnet.search_job import Job, plan, search, search_proxy
from eqnet.settings import Settings
from eqnet.space import ALL_FORMS, Budget, Form, QuantConfig
from eqnet.space.hardware import load_target
from eqnet.tracking import Tracker


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument(
        "--budget",
        help="hard limits: 4 | w=3,a=4 | size=180KiB | bitops=1.2G | latency=2ms | max_act=8KiB, comma-joined",
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
    parser.add_argument(
        "--method", choices=[*METHODS, "emq", "metamix"], default="genetic", help="how to search (default: genetic)"
    )
    parser.add_argument(
        "--score", help="search on this additive score, or with emq this proxy, instead of an accuracy predictor"
    )
    parser.add_argument("--pareto", action="store_true", help="also the front between predicted accuracy and cost")
    parser.add_argument("settings", nargs="*", help="YAML files and key=value overrides of search.*, seed or tracking")
    return parser


def main() -> None:
    """Table, predictor, search, re-ranking, result; builds what is missing."""
    arguments = make_parser().parse_intermixed_args()
    budget = None if arguments.budget is None else Budget.parse(arguments.budget)
    proxy = choose_proxy(arguments.score) if arguments.method == "emq" else None
    plain = arguments.method in ("emq", "metamix") or (arguments.method == "genetic" and arguments.score is None)
    method, score = (None, "") if plain else choose_method(arguments.method, arguments.score)
    run = Run.open(arguments.run)
    if budget is not None:
        refuse_metamix(arguments, run)
    if budget is not None and run.settings.subnet is not None:
        raise ValueError(
            f"{run.path} trained one subnet, there is nothing to search; name its supernet's run with --run."
        )
    settings = search_settings(run.settings, arguments.settings)
    integer = like_table(run.path / "table", settings.search.integer)
    settings = settings.model_copy(update={"search": settings.search.model_copy(update={"integer": integer})})
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
    layout = torch.channels_last if settings.train.channels_last else torch.contiguous_format  # as in training
    supernet.to(accelerator.device).to(memory_format=layout)
    trained = Evaluator.from_data(supernet, data, settings, accelerator.device)
    if bound is not None and plain and proxy is None and settings.train.compile != "off":
        trained.compile_for(configs_to_measure(run, settings) // accelerator.num_processes)
    evaluator = trained if target is None else trained.of(specialize(supernet, target))
    console.print(f"run {run.path}, {f'budget {budget}' if subnet is None else arguments.subnet}")
    console.print(scope.describe())
    if bound is None:
        assert subnet is not None
        return measure_subnet(subnet, scope, evaluator, accelerator, console)
    trained.learn_uniform(measured_uniform(run, settings))
    tracker = Tracker(run.path, settings.tracking, settings.project, settings.model_dump(), accelerator.is_main_process)
    job = Job(arguments, run, settings, scope, bound, evaluator, accelerator, tracker, console)
    try:
        if proxy is not None:
            search_proxy(job, proxy, data)
        elif method is None:
            search(job, trained)
        else:
            plan(job, method, score, data)
    finally:
        tracker.close()
    if accelerator.is_main_process:
        report_at_end(run.path, console)
    return None


def configs_to_measure(run: Run, settings: Settings) -> int:
    """How many configs a search on the predictor measures: missing rows of the table, and the winners of its rounds."""
    s, rows = settings.search, dict(read_rows(run.path / "table", (VALIDATION, DIVERGENCE)))
    return max(s.table_size - len(rows), 0) + s.rounds * s.top_k


def measured_uniform(run: Run, settings: Settings) -> list[UniformAccuracy]:
    """The uniform configs that the run was evaluated on, unless this search measures on other images."""

    def images(of: Settings) -> tuple[int, int, int | None]:
        return of.seed, of.search.bn_images, of.search.max_validation_images

    evaluation = read_facts(run.path / "evaluation.json", Evaluation)
    if evaluation is None or images(settings) != images(run.settings):
        return []
    names = ("validation", "test", "divergence")
    return [
        UniformAccuracy(u.bits, Form.parse(u.form), {n: value for n in names if (value := getattr(u, n)) is not None})
        for u in evaluation.uniform
    ]


def refuse_metamix(arguments: argparse.Namespace, run: Run) -> None:
    """Raises ValueError if bits were, or are asked to be, selected in training."""
    if run.settings.metamix.budget is not None:
        raise ValueError(f"{run.path} selected its bits while training; its subnet is {run.path / 'subnet.json'}.")
    if arguments.method == "metamix":
        raise ValueError(
            f"MetaMix selects bits while training and not in a search: `accelerate launch train.py "
            f"metamix.budget={arguments.budget} model.weights={run.path}` starts from the float model of this run."
        )


def choose_proxy(name: str | None) -> Proxy:
    """The proxy of a command line. Raises ValueError if there is none of that name."""
    if name is None:
        raise ValueError(f"--method emq needs --score, one of {', '.join(PROXIES)}, or emq:FILE.")
    return find_proxy(name)


def measure_subnet(
    config: QuantConfig, scope: Scope, evaluator: Evaluator, accelerator: Accelerator, console: Console
) -> None:
    """Prints the measured accuracies and the costs of one config."""
    (row,) = evaluator.measure_all([config], ["validation", "test"], accelerator)
    costs = ", ".join(cost.format(cost.of(config)) for cost in (build(scope.space) for build in scope.costs.values()))
    console.print(f"validation {row[0]:.2f} %, test {row[1]:.2f} %; {costs}")


if __name__ == "__main__":
    run_command(main)
