"""What additive scores are worth: ranking and accuracy after training, gap of the genetic search, time of a whole plan.

    python -m benchmarks.ilp_quality --run runs/ptq [--scores NAME ...] [--configs 200] [--json FILE] [--plan-images 64]

`--run` is the folder of a run, e.g. of `train.py train.epochs=0` (post-training). Prints

- Spearman between the negative loss of each score and measured validation accuracy over random configs, with a bootstrap interval;
- test accuracy of the exact plan of each score at three mean bits, and of the best uniform config within them (by validation);
- the gap of the genetic search to the exact optimum of one score at five budgets;
- CPU seconds to calibrate, score every format of one form and solve, for ResNet-18 at 224 px (random weights and images: times
  do not depend on them).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from rich.console import Console
from scipy.stats import spearmanr

from benchmarks.tables import save, show
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, open_data
from eqnet.scoring.evaluation import Evaluator, uniform_configs
from eqnet.scoring.scores import SCORES
from eqnet.scoring.sensitivity import Sensitivity
from eqnet.scoring.table import AccuracyTable, build_table, like_table
from eqnet.search import exact_search, genetic_search
from eqnet.search.exact import SCORE_BATCH, score_batches, score_formats
from eqnet.space import BoundBudget, Budget, Form, QuantSpace

FORM = Form.parse("channel-sym-asym")
SIZES = (3.0, 4.0, 5.0)  # mean bits of weights and of inputs
BUDGETS = ("3", "4", "5", "w=4,a=6", "w=3,a=8")
PAPER_GENERATIONS = 500  # of EQ-Net's search


def limit(space: QuantSpace, bits: float) -> BoundBudget:
    """The budget of a size: mean bits of weights and of inputs."""
    return Budget.parse(f"w={bits:g},a={bits:g}").bind(space)


def ranking(sensitivity: Sensitivity, evaluator: Evaluator, table: AccuracyTable) -> dict[str, Any]:
    """Spearman over the table, and its 95 % interval over 1000 bootstrap samples of configs."""
    score = -sensitivity.loss(evaluator.supernet.space)(table.genomes)
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(table), size=len(table)) for _ in range(1000)]
    samples = [spearmanr(score[i], table.accuracy[i]).statistic for i in draws]
    return {
        "Spearman": float(spearmanr(score, table.accuracy).statistic),
        "95 %": [float(q) for q in np.nanquantile(samples, (0.025, 0.975))],
    }


def best_uniform(evaluator: Evaluator, accelerator: Accelerator) -> dict[str, float]:
    """Test accuracy in percent of the uniform config of the best validation accuracy within each size."""
    space = evaluator.supernet.space
    configs = [config for _, _, config in uniform_configs(space)]
    genomes = space.encode_all(configs)
    affordable = limit(space, max(SIZES)).feasible(genomes)
    configs, genomes = [c for c, fits in zip(configs, affordable, strict=True) if fits], genomes[affordable]
    validation = evaluator.measure_all(configs, ["validation"], accelerator)[:, 0]
    row = {}
    for bits in SIZES:
        fits = limit(space, bits).feasible(genomes)
        best = configs[int(np.where(fits, validation, -1).argmax())]
        row[f"{bits:g} bit, %"] = float(evaluator.measure_all([best], ["test"], accelerator)[0, 0])
    return row


def accuracies(sensitivity: Sensitivity, evaluator: Evaluator, accelerator: Accelerator) -> dict[str, float]:
    """Test accuracy in percent of the exact plan at three sizes."""
    space = evaluator.supernet.space
    loss, plans = sensitivity.loss(space), []
    for bits in SIZES:
        budget = limit(space, bits)
        plans.append(space.decode(exact_search(loss, budget.costs, budget.limits, forms=space.forms).genome))
    tests = evaluator.measure_all(plans, ["test"], accelerator)[:, 0]
    return {f"{bits:g} bit, %": float(test) for bits, test in zip(SIZES, tests, strict=True)}


def gaps(sensitivity: Sensitivity, evaluator: Evaluator, run: Run) -> dict[str, Any]:
    """Loss of the genetic search above the exact optimum in percent, and seconds of both, by budget."""
    space, s, rows = evaluator.supernet.space, run.settings.search, {}
    loss = sensitivity.loss(space)
    for text in BUDGETS:
        budget = Budget.parse(text).bind(space)
        exact = exact_search(loss, budget.costs, budget.limits, forms=space.forms)
        rows[text] = {"exact, s": exact.seconds}
        for generations in (s.generations, PAPER_GENERATIONS):
            start = time.perf_counter()
            found = genetic_search(
                space,
                lambda genomes: -loss(genomes),
                budget,
                seed=run.settings.seed,
                population=s.population,
                generations=generations,
                mutation_probability=s.mutation_probability,
            )
            seconds = time.perf_counter() - start
            gap = 100 * (-float(found.scores[0]) / exact.loss - 1)
            rows[text] |= {f"gap of {generations} generations, %": gap, f"{generations} generations, s": seconds}
    return rows


def plan_seconds(images: int, size: int, scores: list[str]) -> dict[str, Any]:
    """CPU seconds of all threads for each part of a plan of ResNet-18."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(images, 3, size, size, generator=rng), torch.randint(0, 1000, (images,), generator=rng)
    supernet = Supernet.from_model(
        timm.create_model("resnet18"), (3, size, size), granularity=["channel"], symmetric=[True, False]
    )
    space = supernet.space.restrict_form(FORM)
    parts = list(zip(x.split(SCORE_BATCH), y.split(SCORE_BATCH), strict=True))
    start = time.process_time()
    supernet.calibrate([images for images, _ in parts])
    calibrated = time.process_time()
    rows = {}
    for name in scores:
        begin = time.process_time()
        loss = SCORES[name](supernet, space, parts, Accelerator(cpu=True), lambda: None).loss(space)
        scored = time.process_time()
        budget = Budget.parse("w=4,a=6").bind(space)
        exact_search(loss, budget.costs, budget.limits)
        row = {"calibrate": calibrated - start, "score": scored - begin, "solve": time.process_time() - scored}
        rows[name] = row | {"total": sum(row.values())}
    return rows


def main() -> None:
    """Prints the tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--plan-images", type=int, default=64)
    parser.add_argument("--plan-size", type=int, default=224)
    parser.add_argument("--plan-scores", nargs="*", choices=SCORES, default=["fisher", "gradient"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, accelerator = Console(width=200, highlight=False), Accelerator()
    run = Run.open(arguments.run)
    supernet, _ = run.load_supernet()
    data = open_data(run)
    supernet.to(accelerator.device).to(memory_format=torch.channels_last)
    integer = like_table(run.path / "table", run.settings.search.integer)
    settings = run.settings.model_copy(update={"search": run.settings.search.model_copy(update={"integer": integer})})
    evaluator = Evaluator.from_data(supernet, data, settings, accelerator.device)
    evaluator.compile_for(arguments.configs)
    table = build_table(evaluator, run.path / "table", arguments.configs, run.settings.seed, accelerator)
    batches = score_batches(data, run.settings, accelerator.device)
    scores: dict[str, Any] = {"best uniform": best_uniform(evaluator, accelerator)}
    for name in arguments.scores:
        start = time.perf_counter()
        found = score_formats(name, evaluator, supernet.space, batches, accelerator, lambda: None)
        row: dict[str, Any] = {"seconds": time.perf_counter() - start, **ranking(found, evaluator, table)}
        scores[name] = row | accuracies(found, evaluator, accelerator)
        if name == arguments.scores[0]:
            gap = gaps(found, evaluator, run)
    rows = {"scores": scores, f"genetic search on {arguments.scores[0]}": gap}
    if arguments.plan_scores:
        plan = plan_seconds(arguments.plan_images, arguments.plan_size, arguments.plan_scores)
        rows["plan of ResNet-18, CPU seconds"] = plan
    show(console, f"{run.path.name}, {len(table)} configs", rows)
    if arguments.json is not None:
        save(
            arguments.json,
            rows,
            data=Path(run.settings.data.name).stem,
            model=run.settings.model.name,
            configs=len(table),
        )


if __name__ == "__main__":
    main()
