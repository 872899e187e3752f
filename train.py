"""Trains a supernet: `accelerate launch train.py [settings.yaml ...] [key=value ...] [--resume]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from eqnet.checkpoint import load_float_weights, write_json
from eqnet.command import make_console, progress_bar, run_command, start_cpu_processes
from eqnet.data import DataSplits
from eqnet.nn.supernet import Supernet, trace_layers
from eqnet.report import plot_uniform, uniform_table
from eqnet.run import Run, create_float_model, open_data
from eqnet.scoring.evaluation import Evaluator, accuracy, evaluate_uniform
from eqnet.settings import Settings, load_settings
from eqnet.space import QuantSpace
from eqnet.tracking import Tracker
from eqnet.training.loop import Trainer, export_facts, make_accelerator


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", help="YAML files and key=value overrides, e.g. train.epochs=2; see docs/settings.md"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in output=..., or the latest one")
    return parser.parse_intermixed_args()


def main() -> None:
    """Opens or makes the run, trains what is left of it, evaluates and saves."""
    arguments = parse_arguments()
    settings = load_settings(arguments.settings)
    run = Run.resume(arguments.settings, settings.output) if arguments.resume else Run.unsaved(settings)
    start_cpu_processes()
    accelerator = make_accelerator(run.settings)
    console = make_console()
    with accelerator.main_process_first():  # one process downloads
        data = open_data(run)
    if arguments.resume:
        if (run.path / "evaluation.json").exists():
            return console.print(
                f"{run.path} is finished; search it with: python search.py --run {run.path} --budget 4"
            )
    else:
        check_model(settings, data)
        run = Run.create(settings, accelerator)
    run.store_split(data, accelerator)
    checkpoint, notes = run.newest_checkpoint() if arguments.resume else (None, [])
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
    finally:
        tracker.close()


def check_model(settings: Settings, data: DataSplits) -> None:
    """Raises ValueError for a model, weights or space that cannot work, before anything is written."""
    layers = trace_layers(create_float_model(settings.model, data.num_classes, data.input_size[0]), data.input_size)
    QuantSpace.from_layers(layers, **settings.space.model_dump())


def chosen_few(
    data: DataSplits, run: Run, accelerator: Accelerator, console: Console
) -> Callable[[nn.Module, int], dict[str, float]]:
    """Evaluation during training: validation accuracy of a few uniform bit-widths in the first form."""

    def measure(supernet: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(supernet, Supernet)
        form = supernet.space.forms[0]
        bits = [b for b in run.settings.train.evaluate_bits if b in supernet.space.uniform_bits]
        evaluator = Evaluator.from_data(supernet, data, run.settings, accelerator.device)
        results = evaluator.measure_all([supernet.space.uniform(b, form) for b in bits], ["validation"], accelerator)
        figures = {f"validation/{form.name}/{b}bit": float(r[0]) for b, r in zip(bits, results, strict=True)}
        text = "  ".join(f"{b} bit {r[0]:.2f}" for b, r in zip(bits, results, strict=True))
        console.print(f"step {step}: validation accuracy [%] in form {form.name}: {text}")
        return figures

    return measure


def evaluate(
    supernet: Supernet, run: Run, data: DataSplits, accelerator: Accelerator, tracker: Tracker, console: Console
) -> None:
    """The float model and every uniform bit-width in every form, on validation and test."""
    settings, splits = run.settings, ["validation", "test"]
    evaluator = Evaluator.from_data(supernet, data, settings, accelerator.device)
    float_model = create_float_model(settings.model, data.num_classes, data.input_size[0], weights=False)
    load_float_weights(float_model, run.path / "float.safetensors")
    float_model.to(accelerator.device).eval()
    float_accuracy = {s: accuracy(float_model, evaluator.splits[s]) for s in splits}
    total = len(supernet.space.forms) * len(supernet.space.uniform_bits)
    with progress_bar(console, "evaluating uniform bit-widths", -(-total // accelerator.num_processes)) as advance:
        results = evaluate_uniform(evaluator, splits, accelerator, advance)
    if not accelerator.is_main_process:
        return
    console.print(uniform_table(results, "test", float_accuracy["test"]))
    picture = plot_uniform(results, "test", float_accuracy["test"], run.path / "evaluation.png")
    means = {b: float(np.mean([r.accuracy["test"] for r in results if r.bits == b])) for b in {r.bits for r in results}}
    figures = {f"test/{r.form.name}/{r.bits}bit": r.accuracy["test"] for r in results}
    figures |= {f"test/mean/{b}bit": value for b, value in means.items()} | {"test/float": float_accuracy["test"]}
    rows = [[r.form.name, r.bits, r.accuracy["validation"], r.accuracy["test"]] for r in results]
    tracker.log(figures, tracker.last_step)
    tracker.table("uniform", ["form", "bits", "validation", "test"], rows)
    tracker.image("evaluation", picture)
    write_json(run.path / "evaluation.json", {"float": float_accuracy, "uniform": [r.to_json() for r in results]})
    console.print(f"saved {run.path / 'supernet.safetensors'}, evaluation.json and {picture}")
    console.print("next: python search.py --budget 4")


if __name__ == "__main__":
    run_command(main)
