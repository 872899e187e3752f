"""What a training will take: a few timed steps of each of its phases on this machine, in a folder that is removed again."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from eqnet.data import DataSplits
from eqnet.nn.supernet import Supernet
from eqnet.run import Run
from eqnet.run_checkpoints import KEPT_CHECKPOINTS, Checkpoint
from eqnet.scoring.evaluation import Evaluator, uniform_configs
from eqnet.settings import Settings
from eqnet.tracking import Tracker
from eqnet.training.cuda_graph import WARM_UP_STEPS
from eqnet.training.loop import Loop, Phase
from eqnet.training.trainer import Trainer
from eqnet.usage import Used, bytes_text, clock, peak_memory

WARM_UP, TIMED = 2, 4  # steps of each phase on CPU


@dataclass
class Estimate:
    """What was measured and what follows for a whole run.

    Attributes:
        steps: optimizer steps of each phase.
        seconds: of each phase, of the start and of evaluations.
        memory: bytes at the peak, of this process on CPU, of its device on a GPU.
        disk: bytes of the checkpoints while one is written.
    """

    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    disk: int = 0

    def describe(self) -> str:
        """Lines for the console."""
        parts = [
            f"{name} {clock(seconds)}" + (f" ({self.steps[name]} steps)" if name in self.steps else "")
            for name, seconds in self.seconds.items()
        ]
        return (
            f"estimated time {clock(sum(self.seconds.values()))}: {', '.join(parts)}\n"
            f"estimated peak memory {bytes_text(self.memory)} of each process, checkpoints {bytes_text(self.disk)} on disk"
        )

    def beside(self, used: Used) -> str:
        """Lines that compare with what a run has used, part by part."""
        lines = [f"{'':12}{'estimated':>12}{'used':>12}"]
        for name in [*self.seconds, *(set(used.seconds) - set(self.seconds))]:
            cells = [clock(s[name]) if name in s else "" for s in (self.seconds, used.seconds)]
            lines.append(f"{name:12}{cells[0]:>12}{cells[1]:>12}")
        total = [clock(sum(s.values())) for s in (self.seconds, used.seconds)]
        lines.append(f"{'time':12}{total[0]:>12}{total[1]:>12}")
        lines.append(f"{'peak memory':12}{bytes_text(self.memory):>12}{bytes_text(used.memory):>12}")
        return "\n".join(lines)


class _Probe(Loop):
    """A loop that times a few steps of each phase and saves nothing."""

    estimate: Estimate

    def train(self, phase: Phase, resume: Checkpoint | None) -> None:
        total = phase.epochs * len(self.batches)
        if not total:
            return
        phase.model.train()
        seconds: list[float] = []
        gpu = self.accelerator.device.type == "cuda"
        warm_up = WARM_UP_STEPS + 2 if gpu else WARM_UP  # until a graph has been recorded and replayed
        while len(seconds) < warm_up + TIMED:
            begin = time.perf_counter()
            for images, labels in self.batches.epoch(0, 0):
                self.gradients(phase, images, labels, total - 1, 0.0)
                phase.optimizer.step()
                phase.optimizer.zero_grad()
                self.accelerator.wait_for_everyone()
                if gpu:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                if len(seconds) == warm_up + TIMED:
                    break
        self.estimate.steps[phase.name] = total
        # the mean: other work on the machine slows every step, so the fastest ones are hardly nearer to those of an idle machine
        step = statistics.fmean(seconds[warm_up:])
        self.estimate.seconds[phase.name] = step * total
        self.estimate.seconds["start"] -= step * len(seconds)  # what else the first steps took, e.g. a compiler, stays
        held = [phase.model, *phase.modules.values()]
        state = {id(t): t.nbytes for module in held for t in (*module.parameters(), *module.buffers())}
        state |= {id(t): t.nbytes for values in phase.optimizer.state.values() for t in _tensors(values.values())}
        self.estimate.disk = max(self.estimate.disk, sum(state.values()) * (KEPT_CHECKPOINTS + 1))


def estimate_run(settings: Settings, data: DataSplits, accelerator: Accelerator) -> Estimate:
    """Trains a few steps of each phase and measures one config on a few images.

    Args:
        settings: of the run.
        data: its images.
        accelerator: of this process; all processes call this.

    Raises:
        ValueError: settings that do not work.
    """
    estimate, quiet = Estimate(seconds={"start": 0.0}), Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), settings)
        tracker = Tracker(run.path, "none", settings.project, {})
        trainer = Trainer(run, accelerator, data, tracker, quiet, lambda model, step: {})
        trainer.loop = probe = _Probe(run, accelerator, data, tracker, quiet)
        probe.estimate = estimate
        begin = time.perf_counter()
        supernet = trainer.fit(None)
        estimate.seconds["start"] += time.perf_counter() - begin
        estimate.seconds["evaluation"] = _evaluation_seconds(supernet, data, settings, accelerator)
    estimate.memory = peak_memory(accelerator)
    return estimate


def _evaluation_seconds(supernet: Supernet, data: DataSplits, settings: Settings, accelerator: Accelerator) -> float:
    """Seconds of all evaluations of a run, from one batch of images."""
    whole = Evaluator.from_data(supernet, data, settings, accelerator.device)
    batch: tuple[Tensor, Tensor] = next(iter(whole.splits["validation"]))
    part = Evaluator(supernet, whole.bn_batches[:1], {"validation": [batch]}, settings.search.integer)
    part.measure(supernet.space.largest(), "validation")  # a warm-up
    begin = time.perf_counter()
    part.measure(supernet.space.largest(), "validation")
    per_image = (time.perf_counter() - begin) / (len(batch[1]) + len(whole.bn_batches[0]))
    bn, validation = sum(len(b) for b in whole.bn_batches), len(data.validation)
    if settings.search.max_validation_images is not None:
        validation = min(validation, settings.search.max_validation_images)
    t, configs = settings.train, 1 if settings.one_subnet else len(uniform_configs(supernet.space))
    within = 0 if not t.evaluate_epochs else max(t.epochs - 1, 0) // t.evaluate_epochs
    few = 1 if settings.one_subnet else len(t.evaluate_bits)
    images = configs * (bn + validation + len(data.test)) + within * few * (bn + validation)
    return float(per_image * images / accelerator.num_processes)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
