"""Trains a supernet: `accelerate launch train.py [settings.yaml ...] [key=value ...] [--resume]`.

With `subnet=path/subnet.json` it fine-tunes that one config instead; with `metamix.budget=...` it selects one while training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from eqnet.command import make_console, run_command, start_cpu_processes
from eqnet.data import DataSplits
from eqnet.estimate import estimate_run
from eqnet.run import Run, create_float_model, open_data
from eqnet.run_evaluation import chosen_few, evaluate
from eqnet.settings import Settings, load_settings
from eqnet.tracking import Tracker
from eqnet.training.backend import check_backend
from eqnet.training.finetune import build_supernet, complete_settings, store_subnet
from eqnet.training.loop import make_accelerator
from eqnet.training.metamix import bind_budget, branch_configs
from eqnet.training.trainer import Trainer, export_facts
from eqnet.usage import Used


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
        if accelerator.is_main_process:
            names = sorted(p.name for p in run.path.glob("[!.]*") if p.is_file())
            console.print(f"saved {run.path}: {', '.join(names)}")
            console.print(f"next: {next_step(run)}")
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


if __name__ == "__main__":
    run_command(main)
