"""Trains a supernet: `accelerate launch train.py [settings.yaml ...] [key=value ...] [--resume]`.

With `subnet=path/subnet.json` it fine-tunes that one config instead; with `metamix.budget=...` it selects one while training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from eqnet.checkpoint import load_float_weights, read_object, write_json
from eqnet.command import make_console, progress_bar, run_command, start_cpu_processes
from eqnet.dashboard import track_training
from eqnet.data import DataSplits
from eqnet.estimate import estimate_run
from eqnet.html_report import report_at_end
from eqnet.nn.supernet import Supernet
from eqnet.report import plot_stability, plot_uniform, uniform_table
from eqnet.run import Run, create_float_model, open_data, versions
from eqnet.scoring.evaluation import DIVERGENCE, Evaluator, accuracy, evaluate_uniform, uniform_configs
from eqnet.settings import Settings, load_settings
from eqnet.space import COSTS, Budget
from eqnet.subnet import describe_subnet, save_subnet
from eqnet.tracking import Tracker
from eqnet.training.backend import check_backend
from eqnet.training.finetune import build_supernet, complete_settings, note_first_accuracy, store_subnet
from eqnet.training.loop import make_accelerator
from eqnet.training.metamix import bind_budget, branch_configs, budget_costs
from eqnet.training.stability import Stability
from eqnet.training.trainer import Trainer, export_facts
from eqnet.usage import Used

SPLITS = ["validation", "test"]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", help="YAML files and key=value overrides, e.g. train.epochs=2; see docs/settings.md"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--resume", action="store_true", help="continue the run in output=..., or the latest one")
    way.add_argument(
        "--estimate",
        action="store_true",
        help="print time and memory of the run, of the finished one in output=... beside what it used; write nothing",
    )
    return parser


def main() -> None:
    """Opens or makes the run, trains what is left of it, evaluates and saves."""
    arguments = make_parser().parse_intermixed_args()
    output = load_settings(arguments.settings).output
    used = Used.read(Path(output)) if arguments.estimate and output is not None else Used()
    if arguments.resume or used.seconds:
        run = Run.resume(arguments.settings, output)
    else:
        run = Run.unsaved(complete_settings(arguments.settings))
    start_cpu_processes()
    accelerator = make_accelerator(run.settings)
    console = make_console()
    with accelerator.main_process_first():  # one process downloads
        data = open_data(run)
    if arguments.resume:
        if (run.path / "evaluation.json").exists():
            return console.print(f"{run.path} is finished; {next_step(run)}")
    else:
        check_backend(run.settings.train, accelerator)
        if not used.seconds:
            check_model(run.settings, data)
        if arguments.estimate:
            estimate = estimate_run(run.settings, data, accelerator)
            return console.print(estimate.beside(used) if used.seconds else estimate.describe(), soft_wrap=True)
        run = Run.create(run.settings, accelerator)
    with run.claimed():
        train(run, data, accelerator, console, resume=arguments.resume)
    return None


def train(run: Run, data: DataSplits, accelerator: Accelerator, console: Console, *, resume: bool) -> None:
    """Trains what is left of a run, evaluates and saves."""
    run.store_split(data, accelerator)
    store_subnet(run, accelerator)
    checkpoint, notes = run.checkpoints.newest() if resume else (None, [])
    for note in notes:
        console.print(note, style="yellow")
    console.print(f"run {run.path}: {run.settings.model.name} on {run.settings.data.name}, {data.num_classes} classes")
    console.print(
        f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test images; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    if checkpoint is not None:
        console.print(f"resuming the {checkpoint.phase} phase after step {checkpoint.step}")
    settings = run.settings
    tracker = Tracker(run.path, settings.tracking, settings.project, settings.model_dump(), accelerator.is_main_process)
    try:
        trainer = Trainer(run, accelerator, data, tracker, console, chosen_few(data, run, accelerator, console))
        supernet = trainer.fit(checkpoint)
        if accelerator.is_main_process:
            run.save_supernet(supernet, export_facts(data, run.path))
        evaluate(supernet, run, data, accelerator, tracker, console)
        console.print(f"used {run.usage.store(accelerator).describe()}")
    finally:
        tracker.close()


def check_model(settings: Settings, data: DataSplits) -> None:
    """Raises ValueError for a model, weights or space that cannot work, before anything is written."""
    source = None if settings.supernet is None else Run.open(settings.supernet).load_supernet()[0]
    model = create_float_model(settings.model, data.num_classes, data.input_size[0])
    supernet = build_supernet(Run.unsaved(settings), model, data.input_size)
    if source is not None:
        supernet.inherit(source)
    if settings.metamix.budget is not None:
        branch_configs(supernet.space)
        bind_budget(Run.unsaved(settings), supernet.space)


def next_step(run: Run) -> str:
    """What to do with a finished run."""
    if not run.settings.one_subnet:
        return f"search it with: python search.py --run {run.path} --budget 4"
    return f"its subnet is {run.path / 'subnet.json'}"


def chosen_few(
    data: DataSplits, run: Run, accelerator: Accelerator, console: Console
) -> Callable[[nn.Module, int], dict[str, float]]:
    """Evaluation during training: validation accuracy of the subnet, or of a few uniform bit-widths in the first form."""

    def measure(supernet: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(supernet, Supernet)
        evaluator = Evaluator.from_data(supernet, data, run.settings, accelerator.device)
        if run.settings.one_subnet:
            (row,) = evaluator.measure_all([supernet.space.largest()], ["validation"], accelerator)
            console.print(f"step {step}: validation accuracy [%] of the subnet: {row[0]:.2f}")
            if accelerator.is_main_process:
                note_first_accuracy(run, float(row[0]))
            return {"validation/subnet": float(row[0])}
        form = supernet.space.forms[0]
        bits = [b for b in run.settings.train.evaluate_bits if b in supernet.space.uniform_bits]
        results = evaluator.measure_all([supernet.space.uniform(b, form) for b in bits], ["validation"], accelerator)
        figures = {f"validation/{form.name}/{b}bit": float(r[0]) for b, r in zip(bits, results, strict=True)}
        text = "  ".join(f"{b} bit {r[0]:.2f}" for b, r in zip(bits, results, strict=True))
        console.print(f"step {step}: validation accuracy [%] in form {form.name}: {text}")
        return figures

    return measure


def evaluate(
    supernet: Supernet, run: Run, data: DataSplits, accelerator: Accelerator, tracker: Tracker, console: Console
) -> None:
    """The float model, and every uniform bit-width in every form or the subnet, on validation and test."""
    settings = run.settings
    evaluator = Evaluator.from_data(supernet, data, settings, accelerator.device)
    float_model = create_float_model(settings.model, data.num_classes, data.input_size[0], weights=False)
    load_float_weights(float_model, run.path / "float.safetensors")
    float_model.to(accelerator.device).eval()
    with run.usage.part("evaluation"):
        float_accuracy = {s: accuracy(float_model, evaluator.splits[s]) for s in SPLITS}
        measure = evaluate_subnet if settings.one_subnet else evaluate_supernet
        results = measure(evaluator, float_accuracy, run, accelerator, tracker, console)
    if accelerator.is_main_process:
        write_json(run.path / "evaluation.json", {"float": float_accuracy, **results})
        with run.usage.part("report"):
            track_training(tracker, run)
            report_at_end(run.path, console)
        names = sorted(p.name for p in run.path.glob("[!.]*") if p.is_file())
        console.print(f"saved {run.path}: {', '.join(names)}")
        console.print(f"next: {next_step(run)}")


def evaluate_supernet(
    evaluator: Evaluator,
    float_accuracy: dict[str, float],
    run: Run,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> dict[str, Any]:
    """Every uniform bit-width in every form."""
    total = len(uniform_configs(evaluator.supernet.space))
    with progress_bar(console, "evaluating uniform bit-widths", total) as advance:
        results = evaluate_uniform(evaluator, [*SPLITS, DIVERGENCE], accelerator, advance)
    if not accelerator.is_main_process:
        return {}
    console.print(uniform_table(results, "test", float_accuracy["test"]))
    with run.usage.part("report"):
        picture = plot_uniform(results, "test", float_accuracy["test"], run.path / "evaluation.png")
    means = {b: float(np.mean([r.accuracy["test"] for r in results if r.bits == b])) for b in {r.bits for r in results}}
    figures = {f"test/{r.form.name}/{r.bits}bit": r.accuracy["test"] for r in results}
    figures |= {f"test/mean/{b}bit": value for b, value in means.items()} | {"test/float": float_accuracy["test"]}
    figures["validation/mean"] = float(np.mean([r.accuracy["validation"] for r in results]))
    rows = [[r.form.name, r.bits, r.accuracy["validation"], r.accuracy["test"]] for r in results]
    tracker.log(figures, tracker.last_step)
    tracker.table("evaluation/uniform", ["form", "bits", "validation", "test"], rows)
    tracker.image("evaluation/heat_map", picture)
    return {"uniform": [r.to_json() for r in results]}


def evaluate_subnet(
    evaluator: Evaluator,
    float_accuracy: dict[str, float],
    run: Run,
    accelerator: Accelerator,
    tracker: Tracker,
    console: Console,
) -> dict[str, Any]:
    """The one config of the run: beside its accuracy before training; writes the files of a subnet."""
    space = evaluator.supernet.space
    config = space.largest()
    found = {s: float(evaluator.measure_all([config], [s], accelerator)[0, 0]) for s in SPLITS}
    if not accelerator.is_main_process:
        return {}
    accuracies = read_object(run.path / "subnet.json", "accuracy")["accuracy"] | found
    console.print(
        f"validation accuracy [%] before training the subnet {accuracies['validation_before']:.2f}, after "
        f"{found['validation']:.2f}, float {float_accuracy['validation']:.2f}; test {found['test']:.2f}, "
        f"float {float_accuracy['test']:.2f}"
    )
    header: dict[str, Any] = {"seed": run.settings.seed, "versions": versions()}
    if run.settings.metamix.budget is not None:
        header |= {"method": "metamix", "budget": str(Budget.parse(run.settings.metamix.budget))}
        report_stability(run, tracker, console)
    costs = COSTS if run.settings.metamix.budget is None else budget_costs(run.settings)
    document = {**header, **describe_subnet(config, space, accuracies, costs)}
    save_subnet(run.path, evaluator.supernet, config, evaluator.bn_batches, document)
    tracker.log({f"{s}/subnet": value for s, value in found.items()}, tracker.last_step)
    return {"subnet": accuracies}


def report_stability(run: Run, tracker: Tracker, console: Console) -> None:
    """How much the inputs of BN layers change with the bits before and after bit-meta training, as figures and as a picture."""
    found = {when: Stability.from_json(data) for when, data in read_object(run.path / "stability.json").items()}
    figures = {f"stability/{when}": stability.instability for when, stability in found.items()}
    console.print(
        "instability of BN inputs over bit-widths: " + ", ".join(f"{n} {s.instability:.3f}" for n, s in found.items())
    )
    tracker.log(figures, tracker.last_step)
    tracker.image("stability/bn_inputs", plot_stability(found, run.path / "stability.png"))


if __name__ == "__main__":
    run_command(main)
