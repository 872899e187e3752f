"""Low-cost proxy for quantization hyper-parameters: short runs rank candidate settings, the best is trained fully.

LCPAQ (arXiv 2402.17706) ranks learning rates and weight decay by short trainings. The schedule here is successive halving
(arXiv 1502.07943): every candidate is trained a little on a part of the training images, the best of them longer on more.
Each run has the whole learning-rate schedule of its length, starts from the same float weights or supernet, and is scored
on the validation split; the test split is not looked at. A run is an ordinary run's folder: one that was killed continues.

optuna's `SuccessiveHalvingPruner` is the asynchronous variant: it judges a trial by those that reported before it, so the
first always goes on and the result depends on the order. Here all candidates of a rung are known before it is judged.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table
from scipy.stats import qmc
from torch import nn

from eqnet.augment import keyed_rng
from eqnet.checkpoint import atomic_write_text, read_json, write_json
from eqnet.command import progress_bar
from eqnet.data import DataSplits
from eqnet.documents import read_yaml
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, open_data
from eqnet.scoring.evaluation import Evaluator, uniform_configs
from eqnet.settings import Settings, dump_settings
from eqnet.tracking import Tracker
from eqnet.training.finetune import complete_settings, note_first_accuracy, store_subnet
from eqnet.training.loop import DivergedError, make_accelerator
from eqnet.training.trainer import Trainer, export_facts

RUN_LENGTH = {
    "train.epochs",
    "train.checkpoint_steps",
    "train.log_steps",
    "train.evaluate_epochs",
    "train.evaluate_bits",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Range(_Strict):
    """Numbers between two limits, drawn evenly in their logarithm unless `log` is false."""

    low: float
    high: float
    log: bool = True

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("a range needs low < high, and low > 0 unless log is false")
        return self

    def at(self, share: float) -> float:
        """The number at a share in [0, 1) of the range, to three significant digits."""
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.3g}")


class Rung(_Strict):
    """How long the candidates of a rung are trained, and on which share of the training images."""

    epochs: int = Field(ge=1)
    fraction: float = Field(gt=0, le=1)


class TuneSettings(_Strict):
    """A file of `eqnet tune`.

    Attributes:
        output: folder of everything.
        settings: arguments of `train.py`: the full training, and the first candidate.
        candidates: settings below `train` to lists of values or ranges.
        trials: candidates drawn besides the first; None: every combination of the lists.
        rungs: short trainings, the cheapest first.
        reduction: of each rung one candidate in so many goes on.
        seed: of the draw.
    """

    output: str
    settings: list[str] = []
    candidates: dict[str, list[Any] | Range] = Field(min_length=1)
    trials: int | None = Field(None, ge=1)
    rungs: list[Rung] = Field(min_length=1)
    reduction: int = Field(3, ge=2)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> TuneSettings:
        for name, values in self.candidates.items():
            if not name.startswith("train.") or name in RUN_LENGTH:
                raise ValueError(f"candidates: {name!r} is not a hyper-parameter of training, such as train.lr")
            if isinstance(values, Range) and self.trials is None:
                raise ValueError(f"candidates: {name!r} is a range; say how many candidates to draw with trials")
            if values == []:
                raise ValueError(f"candidates: {name!r} is empty; give at least one value")
        return self

    @staticmethod
    def load(path: str | Path) -> TuneSettings:
        """Reads a YAML file.

        Raises:
            ValueError: one sentence naming the file, the key and what is wrong.
        """
        data = read_yaml(path)
        try:
            return TuneSettings.model_validate(data)
        except ValidationError as error:
            errors = error.errors()  # of a mapping that is no range, pydantic also says that it is no list
            first = next((e for e in errors if e["type"] != "list_type" or not isinstance(e["input"], dict)), errors[0])
            key = ".".join(str(part) for part in first["loc"] if not str(part).endswith(("]", "Range")))
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{path}: {key + ': ' if key else ''}{message}.") from error


Values = dict[str, Any]


def draw_candidates(spec: TuneSettings) -> list[Values]:
    """Changes to the settings: none first, then all combinations of the lists, or a Latin hypercube of `trials`."""
    axes = spec.candidates
    if spec.trials is None:
        rows = [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    else:
        shares = qmc.LatinHypercube(len(axes), rng=np.random.default_rng(spec.seed)).random(spec.trials)
        rows = [
            {
                n: a.at(u) if isinstance(a, Range) else a[int(u * len(a))]
                for (n, a), u in zip(axes.items(), row, strict=True)
            }
            for row in shares.tolist()
        ]
    return [{}, *rows]


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        candidates: changes to the settings.
        rungs: for each rung, candidate -> validation accuracy [%], None where training diverged.
        full: candidate -> validation accuracy [%] after full training.
        steps: optimizer steps of the rungs together, and of one full training.
    """

    candidates: list[Values]
    rungs: list[dict[int, float | None]]
    full: dict[int, float | None]
    steps: tuple[int, int]

    @property
    def order(self) -> list[int]:
        """Candidates, best first: by the last rung they reached, then by their accuracy there."""

        def key(i: int) -> tuple[float, ...]:
            reached = max(r for r, scores in enumerate(self.rungs) if i in scores)
            return (-reached, -_value(self.rungs[reached][i]), i)

        return sorted(range(len(self.candidates)), key=key)

    @property
    def cost_ratio(self) -> float:
        """Steps of the rungs and one full training against those of training every candidate fully."""
        return (self.steps[0] + self.steps[1]) / (len(self.candidates) * self.steps[1])


def _value(score: float | None) -> float:
    return -math.inf if score is None else score


def tune(spec: TuneSettings, console: Console, *, all_fully: bool = False) -> Tuned:
    """Runs what is missing below `spec.output`, and writes `best.yaml` and `tune.json` there.

    Args:
        spec: the job; a folder of another job is refused.
        console: where progress is shown.
        all_fully: train every candidate fully, to see how well the rungs rank them.

    Raises:
        ValueError: settings that do not work, a folder of another job, or every candidate diverged.
    """
    candidates: list[Values] = []
    wanted: list[Settings] = []
    for values in draw_candidates(spec):
        if (settings := _settings(spec, values)) not in wanted:
            candidates.append(values)
            wanted.append(settings)
    folder, base = Path(spec.output), wanted[0]
    everything = open_data(Run.unsaved(base))
    for rung in spec.rungs:
        _share(base, everything, rung.fraction)
    _claim(folder, spec)
    if base.subnet is None and base.pretrain_epochs:  # all candidates start from one float model
        _train(folder / "float", _changed(base, metamix={"budget": None}, train={"epochs": 0}), everything, console)
        own = {"model": {"weights": str(folder / "float")}, "pretrain": {"epochs": 0}}
        wanted = [_changed(settings, **own) for settings in wanted]
    rungs: list[dict[int, float | None]] = []
    alive, steps = list(range(len(candidates))), 0
    for number, rung in enumerate(spec.rungs, 1):
        statistics = {"mean": list(everything.mean), "std": list(everything.std)}  # those of all images
        short = [_changed(s, train={"epochs": rung.epochs}, data=statistics) for s in wanted]
        data = _part(short[0], everything, rung.fraction)
        scores = {}
        with progress_bar(
            console, f"rung {number}: {rung.epochs} epochs, {len(data.train)} images", len(alive)
        ) as advance:
            for i in alive:
                scores[i], length = _train(folder / f"rung{number}" / f"{i:03d}", short[i], data, console)
                steps += length
                advance()
        rungs.append(scores)
        ranked = sorted(alive, key=lambda i: (-_value(scores[i]), i))
        alive = ranked[: 1 if number == len(spec.rungs) else math.ceil(len(ranked) / spec.reduction)]
    full: dict[int, float | None] = {}
    chosen, rest = alive[0], [i for i in range(len(candidates)) if i != alive[0]] if all_fully else []
    if rungs[-1][chosen] is None:
        raise ValueError(f"every candidate of {spec.output} diverged; lower the learning rates.")
    with progress_bar(console, "full training", 1 + len(rest)) as advance:
        for i in [chosen, *rest]:
            full[i], full_steps = _train(folder / "full" / f"{i:03d}", wanted[i], everything, console)
            advance()
    result = Tuned(candidates, rungs, full, (steps, full_steps))
    atomic_write_text(folder / "best.yaml", dump_settings(_changed(wanted[chosen], output=None)))
    rows = [
        {"changes": values, "rungs": [s[i] for s in rungs if i in s], "full": full.get(i)}
        for i, values in enumerate(candidates)
    ]
    write_json(folder / "tune.json", {"candidates": rows, "best": chosen, "cost_ratio": result.cost_ratio})
    return result


def show(result: Tuned, console: Console) -> None:
    """Prints the candidates, best first."""
    table = Table("candidate", *[f"rung {r}" for r in range(1, len(result.rungs) + 1)], "full", "changes")
    for i in result.order:
        cells = [_cell(scores, i) for scores in (*result.rungs, result.full)]
        table.add_row(str(i), *cells, ", ".join(f"{k}={v}" for k, v in result.candidates[i].items()) or "none")
    table.title, table.title_justify = "validation accuracy [%]", "left"
    console.print(table)
    console.print(f"{100 * result.cost_ratio:.1f} % of the steps of training all {len(result.candidates)} fully")


def _cell(scores: dict[int, float | None], i: int) -> str:
    if i not in scores:
        return ""
    score = scores[i]
    return "diverged" if score is None else f"{score:.2f}"


def _settings(spec: TuneSettings, values: Values) -> Settings:
    settings = complete_settings([*spec.settings, *(f"{name}={json.dumps(v)}" for name, v in values.items())])
    if settings.output is not None:
        raise ValueError(f"output={settings.output} is set among the settings; the folder is that of the tuning.")
    return settings


def _changed(settings: Settings, **changes: Any) -> Settings:
    """Settings with values replaced, whole sections of them key by key."""
    data = settings.model_dump()
    for name, value in changes.items():
        data[name] = data[name] | value if isinstance(value, dict) else value
    return Settings.model_validate(data)


def _claim(folder: Path, spec: TuneSettings) -> None:
    """Notes the job in its folder, or raises ValueError if the folder holds another."""
    stored, job = folder / "job.json", spec.model_dump()
    if stored.exists():
        if read_json(stored) != job:
            raise ValueError(f"{folder} holds a tuning with other settings; give another output, or move it away.")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not the folder of a tuning; give another output.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stored, job)


def _share(settings: Settings, everything: DataSplits, fraction: float) -> int:
    """How many training images a fraction is; ValueError if they do not make a batch."""
    count = round(fraction * len(everything.train))
    if count < settings.data.batch_size:
        raise ValueError(
            f"a fraction of {fraction} leaves {count} training images, less than data.batch_size={settings.data.batch_size}."
        )
    return count


def _part(settings: Settings, everything: DataSplits, fraction: float) -> DataSplits:
    """The splits with a random share of the training images; validation and test stay."""
    numbers = everything.indices["train"]
    chosen = keyed_rng(settings.seed, "subset").permutation(len(numbers))[: _share(settings, everything, fraction)]
    return open_data(Run.unsaved(settings), {**everything.indices, "train": sorted(numbers[i] for i in chosen)})


def _train(folder: Path, settings: Settings, data: DataSplits, console: Console) -> tuple[float | None, int]:
    """Trains a run in `folder`, or what is left of it; its validation accuracy [%] (None: diverged) and its steps."""
    if (folder / "score.json").exists():
        result = read_json(folder / "score.json")
        return result["validation"], result["steps"]
    begun = (folder / "settings.yaml").exists()
    settings = _changed(settings, output=str(folder))
    accelerator = make_accelerator(settings)
    run = Run(folder, settings) if begun else Run.create(settings, accelerator)
    with run.claimed():
        return _fit(run, data, accelerator, console)


def _fit(run: Run, data: DataSplits, accelerator: Accelerator, console: Console) -> tuple[float | None, int]:
    """`_train` in a folder that no other command works in."""
    folder, settings = run.path, run.settings
    run.store_split(data, accelerator)
    store_subnet(run, accelerator)

    def measure(supernet: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(supernet, Supernet)
        score = _score(supernet, run, data, accelerator)
        if settings.one_subnet:
            note_first_accuracy(run, score)
        return {"validation/mean": score}

    tracker = Tracker(folder, "none", settings.project, {})
    trainer = Trainer(run, accelerator, data, tracker, Console(quiet=True), measure, recover=False)
    steps = sum(count for name, count in trainer.epochs.items() if name != "pretrain") * len(trainer.loop.batches)
    score: float | None = None
    try:
        supernet = trainer.fit(run.checkpoints.newest()[0])
        run.save_supernet(supernet, export_facts(data, folder))
        score = _score(supernet, run, data, accelerator)
    except DivergedError as error:
        console.print(f"{folder}: {error}", style="yellow")
    finally:
        tracker.close()
    write_json(folder / "score.json", {"validation": score, "steps": steps})
    return score, steps


def _score(supernet: Supernet, run: Run, data: DataSplits, accelerator: Accelerator) -> float:
    """Validation accuracy [%]: of the subnet, or the mean over uniform configs of `train.evaluate_bits` in all forms."""
    evaluator = Evaluator.from_data(supernet, data, run.settings, accelerator.device)
    space, bits = supernet.space, run.settings.train.evaluate_bits
    uniform = uniform_configs(space)
    configs = [c for b, _, c in uniform if b in bits] or [c for _, _, c in uniform]
    if run.settings.one_subnet:
        configs = [space.largest()]
    return float(evaluator.measure_all(configs, ["validation"], accelerator).mean())
