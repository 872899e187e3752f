"""What training measures: a few subnets meanwhile, at its end every uniform config, or the one subnet that was trained.

The figures go to `evaluation.json`, the console, the tracker and the report; nothing here selects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from eqnet.checkpoint import load_float_weights, read_object, write_json
from eqnet.command import progress_bar
from eqnet.dashboard import track_training
from eqnet.data import DataSplits
from eqnet.html_report import report_at_end
from eqnet.nn.supernet import Supernet
from eqnet.report import plot_stability, plot_uniform, uniform_table
from eqnet.run import Run, create_float_model, versions
from eqnet.scoring.evaluation import DIVERGENCE, Evaluator, accuracy, evaluate_uniform, uniform_configs
from eqnet.space import COSTS, Budget
from eqnet.subnet import describe_subnet, save_subnet
from eqnet.tracking import Tracker
from eqnet.training.finetune import note_first_accuracy
from eqnet.training.metamix import budget_costs
from eqnet.training.stability import Stability

SPLITS = ["validation", "test"]


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
