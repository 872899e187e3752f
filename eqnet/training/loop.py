"""The training loop on accelerate: one phase at a time; one place for schedule, checkpoints, resume, signals.

EQ-Net (arXiv 2308.07650) section 4.1: Adam, cosine schedule per iteration, gradients clipped by value. Learning rates and
configs are pure functions of (seed, step) and batches of (seed, epoch, batch), so a checkpoint holds only tensors, the
optimizer and generator states, and a resumed run equals an uninterrupted one bit for bit on CPU.

Departs from the official code: the schedule counts optimizer steps and so holds for any number of processes; resuming
restores everything; the loss of every subnet is logged, not only that of the smallest.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from eqnet.checkpoint import read_object, write_json
from eqnet.command import Interrupted
from eqnet.data import Batches, DataSplits
from eqnet.nn.kernels import SCALE_EPS
from eqnet.nn.supernet import Supernet, kept_batch_norm
from eqnet.run import Run
from eqnet.run_checkpoints import Checkpoint
from eqnet.settings import Settings
from eqnet.tracking import Tracker
from eqnet.training.optimizer import cosine

ComputeStep = Callable[[Tensor, Tensor, int], dict[str, Tensor]]
Evaluate = Callable[[nn.Module, int], dict[str, float]]
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # in the words of accelerate
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # ways of accelerate to divide a model
LOWER_RATE = 0.1  # factor on learning rates after training went back
STOP_CHECK_STEPS = 10  # processes agree on a received signal this often


class DivergedError(ValueError):
    """The loss is not finite."""


@dataclass(frozen=True)
class Setback:
    """Where training went back to because it had diverged: `setback.json` of the run, so that a resumed run knows.

    Attributes:
        phase: that diverged.
        step: of the checkpoint; learning rates are lower after it.
        reason: what was not finite.
    """

    phase: str
    step: int
    reason: str

    def factor(self, phase: str, step: int) -> float:
        """Of the learning rates of a step."""
        return LOWER_RATE if phase == self.phase and step >= self.step else 1.0

    @staticmethod
    def read(folder: Path) -> Setback | None:
        """That of a run, if any. Raises ValueError if its file is damaged."""
        path = folder / "setback.json"
        if not path.exists():
            return None
        data = read_object(path, "phase", "step", "reason")
        return Setback(data["phase"], data["step"], data["reason"])

    def write(self, folder: Path) -> None:
        """Writes the file."""
        write_json(folder / "setback.json", asdict(self))


def make_accelerator(settings: Settings) -> Accelerator:
    """The accelerator of a run: precision from the settings, devices and processes from `accelerate launch`.

    Raises:
        ValueError: the launch asks for what would train something else, or fail in the middle.
    """
    _check_launch()
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)  # active rows and BN statistics are per process
    # accelerate knows no other name for it yet
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(mixed_precision=PRECISIONS[settings.train.precision], kwargs_handlers=[ddp])
    set_seed(settings.seed, device_specific=True)
    return accelerator


def _check_launch() -> None:
    """Raises ValueError for options of `accelerate launch` that training does not work with."""
    sharded = [name for name in SHARDED if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]
    if sharded:
        raise ValueError(
            f"accelerate was asked for {sharded[0]}, but every process holds the whole supernet, whose layers override their "
            "weights; launch without it (data parallel training)."
        )
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise ValueError(
            "accelerate's gradient accumulation would only scale gradients; set train.accumulation instead."
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise ValueError("the launch asks for a dynamo backend; set train.compile=network instead.")


@dataclass(frozen=True)
class Phase:
    """What one phase of training consists of.

    Attributes:
        name: of its checkpoints and figures.
        model: what accelerate prepared.
        optimizer: likewise.
        epochs: its length.
        compute: (images, labels, step) -> loss parts; accumulates the gradients of a step.
        offset: optimizer steps of the phases before it, so that steps in the log run on.
        warmup_epochs: of the learning rate.
        supernet: the bare supernet whose step sizes are logged, if any.
        ema: the moving average that follows it, if any.
        evaluate: called with (bare model, step) every `train.evaluate_epochs`; returns figures to log.
        first: called so before the first step, after which the state is saved.
    """

    name: str
    model: nn.Module
    optimizer: Any
    epochs: int
    compute: ComputeStep
    offset: int = 0
    warmup_epochs: float = 0.0
    supernet: Supernet | None = None
    ema: ModelEmaV3 | None = None
    evaluate: Evaluate | None = None
    first: Evaluate | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What its checkpoints hold besides the prepared model."""
        return {} if self.ema is None else {"ema": self.ema}


class Loop:
    """Runs phases of one run.

    Args:
        run: the folder; its settings define everything.
        accelerator: from `make_accelerator`.
        data: the splits.
        tracker: receives figures.
        console: where progress is shown, on the main process.
        recover: go back to the last checkpoint once if training diverges.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        data: DataSplits,
        tracker: Tracker,
        console: Console,
        recover: bool = True,
    ) -> None:
        self.recover = recover
        self.run, self.accelerator, self.tracker, self.console = run, accelerator, tracker, console
        self.settings = run.settings
        self.batches = Batches(
            data.train,
            self.settings.data.batch_size,
            seed=self.settings.seed,
            device=accelerator.device,
            train=True,
            augment=self.settings.data.augment,
            mean=data.mean,
            std=data.std,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            workers=self.settings.data.workers,
        )
        self._stop_signal = 0

    def train(self, phase: Phase, resume: Checkpoint | None) -> None:
        """Runs what is left of a phase after the checkpoint `resume` of it (None: all of it).

        If training diverges, it goes back to the newest checkpoint and on with a lower learning rate, once in a run.

        Raises:
            ValueError: the checkpoint does not fit, or cannot be written.
            DivergedError: the loss is not finite, for the second time if it may go back; the last checkpoint is intact.
            Interrupted: a signal arrived within `catch_signals`; a checkpoint was written.
        """
        step = 0
        if resume is not None:
            self.run.checkpoints.load(self.accelerator, resume, phase.modules)
            step = resume.step
        self.tracker.rewind(phase.offset + step)
        if resume is None:
            if phase.first is not None:
                self._evaluate(phase.first, phase, 0)
            self._save(phase, 0)
        while True:
            try:
                with self.run.usage.part(phase.name):
                    return self._steps(phase, step)
            except DivergedError as error:
                step = self._go_back(phase, error)

    def _steps(self, phase: Phase, step: int) -> None:
        """The steps of a phase after `step`."""
        t, per_epoch, optimizer = self.settings.train, len(self.batches), phase.optimizer
        total, warmup = phase.epochs * per_epoch, round(phase.warmup_epochs * per_epoch)
        setback = Setback.read(self.run.path)
        phase.model.train()
        with self._bar(phase.name, total, step) as advance:
            while step < total:
                epoch, first = divmod(step, per_epoch)
                for images, labels in self.batches.epoch(epoch, first):
                    factor = cosine(step, total, warmup) * (
                        1.0 if setback is None else setback.factor(phase.name, step)
                    )
                    parts = self.gradients(phase, images, labels, step, factor)
                    check = (step + 1) % t.log_steps == 0 or (step + 1) % t.checkpoint_steps == 0 or step + 1 == total
                    if check:
                        self._check_finite(parts, phase.name, step)
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                    if phase.ema is not None:
                        phase.ema.update(phase.supernet)
                    if step % t.log_steps == 0 or step == total:
                        self._log(phase, parts, phase.offset + step)
                    advance(parts)
                    # before the checkpoint, so that a resumed run neither misses nor repeats an evaluation
                    due = t.evaluate_epochs and step % (t.evaluate_epochs * per_epoch) == 0 and step < total
                    if phase.evaluate is not None and due:
                        self._evaluate(phase.evaluate, phase, step)
                        phase.model.train()
                    if self._stopping(step):
                        self._save(phase, step)
                        raise Interrupted(
                            f"stopped after step {step} of the {phase.name} phase, saved; continue with --resume"
                        )
                    if step % t.checkpoint_steps == 0 and step < total:
                        self._save(phase, step)
        self._save(phase, step)

    def gradients(self, phase: Phase, images: Tensor, labels: Tensor, step: int, factor: float) -> dict[str, Tensor]:
        """Sets the learning rates of a step to `factor` of their peaks, and its clipped gradients; returns the loss parts."""
        for group in phase.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        parts = phase.compute(images, labels, step)
        parameters = [p for group in phase.optimizer.param_groups for p in group["params"]]
        if self.settings.train.clip_value is not None:
            self.accelerator.clip_grad_value_(parameters, self.settings.train.clip_value)
        if self.settings.train.clip_norm is not None:
            self.accelerator.clip_grad_norm_(parameters, self.settings.train.clip_norm)
        return parts

    def _save(self, phase: Phase, step: int) -> None:
        """A checkpoint; weights that are not finite are not saved, so that there is a good one to go back to."""
        weights = {n: p.detach().abs().max() for n, p in phase.model.named_parameters() if p.numel()}
        self._check_finite(weights, phase.name, step - 1, kind="weight")
        self.run.checkpoints.save(self.accelerator, phase.name, step, phase.modules)
        self.run.usage.store(self.accelerator)

    def _go_back(self, phase: Phase, error: DivergedError) -> int:
        """Restores the newest checkpoint of the phase and lowers its learning rates; returns the step. All processes agree.

        Raises:
            DivergedError: it may not, has done so before, or no checkpoint is left.
        """
        checkpoint = self.run.checkpoints.newest()[0]
        if not self.recover or Setback.read(self.run.path) or checkpoint is None or checkpoint.phase != phase.name:
            raise DivergedError(
                f"{error}; training stopped and the last checkpoint is kept: lower the learning rate (train.lr, pretrain.lr) "
                "or set train.clip_norm."
            ) from error
        self.accelerator.wait_for_everyone()  # before the main process writes what the others have looked for
        if self.accelerator.is_main_process:
            Setback(phase.name, checkpoint.step, str(error)).write(self.run.path)
        self.accelerator.wait_for_everyone()
        phase.optimizer.zero_grad()
        self.run.checkpoints.load(self.accelerator, checkpoint, phase.modules)
        self.tracker.rewind(phase.offset + checkpoint.step)
        self.console.print(
            f"{error}; back to step {checkpoint.step}, and on with {LOWER_RATE:g} times the learning rates",
            style="yellow",
        )
        return checkpoint.step

    def _evaluate(self, evaluate: Evaluate, phase: Phase, step: int) -> None:
        """Logs the chosen few; leaves configs and BN statistics as they were."""
        model = phase.supernet if phase.ema is None else phase.ema.module
        assert model is not None
        with kept_batch_norm(model), self.run.usage.part("evaluation"):
            self.tracker.log(evaluate(model, phase.offset + step), phase.offset + step)

    def _check_finite(self, values: Mapping[str, Tensor], phase: str, step: int, kind: str = "loss part") -> None:
        """Raises DivergedError on all processes if a value is not finite on one of them."""
        names = [name for name in values if name != "total"]
        bad = ~torch.isfinite(torch.stack([values[name].float() for name in names]))
        found = self.accelerator.reduce(bad.float(), reduction="sum").tolist()
        name = next((n for n, count in zip(names, found, strict=True) if count), None)
        if name is not None:
            raise DivergedError(f"the {kind} {name!r} is not finite after {step + 1} steps of the {phase} phase")

    def _log(self, phase: Phase, parts: Mapping[str, Tensor], step: int) -> None:
        names, optimizer = list(parts), phase.optimizer
        values = self.accelerator.reduce(torch.stack([parts[n].float() for n in names]), reduction="mean").tolist()
        figures = {f"{phase.name}/{n}": v for n, v in zip(names, values, strict=True)}
        figures[f"{phase.name}/lr"] = optimizer.param_groups[0]["lr"]
        figures[f"{phase.name}/step_size_lr"] = optimizer.param_groups[-1]["lr"]
        self.tracker.log(figures, step)
        if (
            phase.supernet is not None
            and step % (10 * self.settings.train.log_steps) == 0
            and self.accelerator.is_main_process
        ):
            scales = {
                f"step_size/{n}": q.scale.detach().clamp_min(SCALE_EPS).log2().float().cpu().numpy()
                for n, q in phase.supernet.quantizers()
            }
            self.tracker.histograms(scales, step)

    @contextmanager
    def _bar(self, phase: str, total: int, done: int) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.accelerator.is_main_process) as progress:
            task = progress.add_task(f"{phase} training", total=total, completed=done, loss="")
            count = done

            def advance(parts: Mapping[str, Tensor]) -> None:
                nonlocal count
                count += 1
                if count % self.settings.train.log_steps == 0:
                    tasks = [
                        f"{n.removeprefix('task/')} {float(v):.3f}" for n, v in parts.items() if n.startswith("task")
                    ]
                    progress.update(task, loss="  ".join(tasks))
                progress.advance(task)

            yield advance

    # -- signals ------------------------------------------------------------------------------------------------------

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end a phase after the step at hand."""

        def note(number: int, frame: Any) -> None:
            self._stop_signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stopping(self, step: int) -> bool:
        """Whether to stop after this step; all processes answer alike."""
        if self.accelerator.num_processes == 1:
            return self._stop_signal != 0
        if step % STOP_CHECK_STEPS:
            return False
        flag = torch.tensor([float(self._stop_signal)], device=self.accelerator.device)
        self._stop_signal = int(self.accelerator.gather(flag).max())
        return self._stop_signal != 0
