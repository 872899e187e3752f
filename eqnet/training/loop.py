"""The training loop on accelerate: a float phase, then the supernet phase; one place for schedule, checkpoints, resume.

EQ-Net (arXiv 2308.07650) section 4.1: Adam, cosine schedule per iteration, gradients clipped by value. Learning rates and
configs are pure functions of (seed, step) and batches of (seed, epoch, batch), so a checkpoint holds only tensors, the
optimizer and generator states, and a resumed run equals an uninterrupted one bit for bit on CPU.

Departs from the official code: the schedule counts optimizer steps and so holds for any number of processes; resuming
restores everything; the loss of every subnet is logged, not only that of the smallest.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from eqnet.checkpoint import load_float_weights, save_tensors
from eqnet.command import Interrupted
from eqnet.data import Batches, DataSplits, calibration_batches
from eqnet.nn.kernels import SCALE_EPS, Kernels, choose_kernels, traced_kernels
from eqnet.nn.supernet import Supernet, kept_batch_norm
from eqnet.run import Checkpoint, Run, create_float_model, target_spaces
from eqnet.settings import Settings
from eqnet.space import QuantConfig, SandwichSampler
from eqnet.tracking import Tracker
from eqnet.training.finetune import build_supernet
from eqnet.training.optimizer import SupernetAdamW, cosine, parameter_groups
from eqnet.training.step import Criterion, supernet_step

ComputeStep = Callable[[Tensor, Tensor, int], dict[str, Tensor]]
Evaluate = Callable[[nn.Module, int], dict[str, float]]
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # in the words of accelerate
COMPILE_PAYS = 3e9  # quantized inputs of a whole run on CPU from which compiling, 10 to 20 s, saves more than it costs
STOP_CHECK_STEPS = 10  # processes agree on a received signal this often


class DivergedError(ValueError):
    """The loss is not finite."""


def make_accelerator(settings: Settings) -> Accelerator:
    """The accelerator of a run: precision from the settings, devices and processes from `accelerate launch`."""
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)  # active rows and BN statistics are per process
    accelerator = Accelerator(mixed_precision=PRECISIONS[settings.train.precision], kwargs_handlers=[ddp])
    set_seed(settings.seed, device_specific=True)
    return accelerator


class Trainer:
    """Trains the float model and the supernet of one run.

    Args:
        run: the folder; its settings define everything.
        accelerator: from `make_accelerator`.
        data: the splits.
        tracker: receives figures.
        console: where progress is shown, on the main process.
        evaluate: called with (bare model, step) every `evaluate_epochs` of the supernet phase; returns figures to log.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        data: DataSplits,
        tracker: Tracker,
        console: Console,
        evaluate: Evaluate,
    ) -> None:
        self.run, self.accelerator, self.data = run, accelerator, data
        self.tracker, self.console, self.evaluate = tracker, console, evaluate
        self.settings = run.settings
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.batches = Batches(
            data.train,
            self.settings.data.batch_size,
            seed=self.settings.seed,
            device=accelerator.device,
            train=True,
            augment=self.settings.data.augment,
            mean=data.mean,
            std=data.std,
            rank=self.rank,
            world_size=self.world,
            workers=self.settings.data.workers,
        )
        self._stop_signal = 0

    # -- the two phases -----------------------------------------------------------------------------------------------

    def fit(self, resume: Checkpoint | None) -> Supernet:
        """Runs what is left of both phases and returns the trained supernet (its EMA if one is kept).

        Raises:
            DivergedError: the loss is not finite; the last checkpoint is intact.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written.
        """
        with self._catch_signals():
            model = self._float_phase(
                resume if resume and resume.phase == "pretrain" else None,
                done=resume is not None and resume.phase == "supernet",
            )
            return self._supernet_phase(model, resume if resume and resume.phase == "supernet" else None)

    def _float_phase(self, resume: Checkpoint | None, done: bool) -> nn.Module:
        s = self.settings
        model = create_float_model(s.model, self.data.num_classes, self.data.input_size[0], weights=not done)
        stored = self.run.path / "float.safetensors"
        exists = stored.exists() and resume is None
        self.accelerator.wait_for_everyone()  # before the main process writes it
        if exists:
            load_float_weights(model, stored)
            return model.to(self.accelerator.device)
        if s.pretrain_epochs:
            model = self._to_device(model)
            criterion, mix = self._criterion()

            def compute(images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
                images, targets = mix(images, labels) if mix is not None else (images, labels)
                with self.accelerator.autocast():
                    logits = prepared(images)
                loss = criterion(logits.float(), targets)
                self.accelerator.backward(loss)
                return {"task": loss.detach()}

            groups = parameter_groups(
                model, [], [], lr=s.pretrain.lr, step_size_lr=0.0, weight_decay=s.train.weight_decay
            )
            prepared, optimizer = self.accelerator.prepare(model, SupernetAdamW(groups))
            self._phase("pretrain", prepared, optimizer, s.pretrain_epochs, compute, resume, warmup_epochs=1.0)
            model = self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
        if self.accelerator.is_main_process:
            save_tensors(stored, model.state_dict())
        self.accelerator.wait_for_everyone()
        return model.to(self.accelerator.device)

    def _supernet_phase(self, model: nn.Module, resume: Checkpoint | None) -> Supernet:
        s, t = self.settings, self.settings.train
        teacher = None
        if t.teacher == "float":
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
        supernet = build_supernet(self.run, model, self.data.input_size)
        if resume is None and s.supernet is not None:
            supernet.inherit(Run.open(s.supernet).load_supernet()[0])
        self._to_device(supernet)
        if supernet.uncovered and self.accelerator.is_main_process:
            self.console.print(f"left in floating point: {', '.join(supernet.uncovered)}", style="dim")
        if resume is None and s.supernet is None:
            count, device = t.calibration_images, self.accelerator.device
            (images,) = calibration_batches(self.data, count, count, s.seed, device, s.data.workers)
            supernet.calibrate(images)
        supernet.use_kernels(self._kernels(supernet))
        ema = None if t.ema_decay is None else ModelEmaV3(supernet, decay=t.ema_decay)
        groups = parameter_groups(
            supernet,
            supernet.step_sizes(),
            supernet.offsets(),
            lr=t.lr,
            step_size_lr=t.step_size_lr,
            weight_decay=t.weight_decay,
        )
        wrapped: nn.Module = supernet
        if t.sync_bn and self.world > 1 and self.accelerator.device.type == "cuda":
            wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(supernet)
        prepared, optimizer = self.accelerator.prepare(wrapped, SupernetAdamW(groups))
        if ema is not None:
            self.accelerator.register_for_checkpointing(ema)
        parts = [] if s.subnet is not None else target_spaces(supernet.space, s.space.targets)
        sampler = SandwichSampler(supernet.space, num_random=t.num_random, form_per=t.form_per, within=parts)
        criterion, mix = self._criterion()
        # training alone is compiled as a whole; evaluation in between runs the same modules uncompiled
        trained: Any = torch.compile(prepared) if t.compile == "network" else prepared

        def compute(images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
            images, targets = mix(images, labels) if mix is not None else (images, labels)
            configs = step_configs(sampler, s.seed, step)
            return supernet_step(
                self.accelerator, trained, supernet, images, targets, configs, criterion, t, teacher=teacher
            )

        self._phase("supernet", prepared, optimizer, t.epochs, compute, resume, t.warmup_epochs, ema, supernet)
        self.accelerator.unwrap_model(
            prepared, keep_fp32_wrapper=False
        )  # accelerate's autocast would stay in `forward`
        result = supernet if ema is None else ema.module
        assert isinstance(result, Supernet)
        return result.eval()

    def _kernels(self, supernet: Supernet) -> Kernels:
        mode, device = self.settings.train.compile, self.accelerator.device
        values = sum(layer.act_numel for layer in supernet.space.layers) * self.settings.data.batch_size // self.world
        steps = self.settings.train.epochs * len(self.batches) * (2 + self.settings.train.num_random)
        if mode == "auto" and device.type == "cpu" and values * steps < COMPILE_PAYS:
            mode = "off"
        if mode == "network":
            choose_kernels("on", device)  # says so at once if nothing can be compiled
            return traced_kernels()
        return choose_kernels(mode, device)

    def _to_device(self, model: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.settings.train.channels_last else torch.contiguous_format
        return model.to(self.accelerator.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def _criterion(self) -> tuple[Criterion, Mixup | None]:
        t = self.settings.train
        if t.mixup or t.cutmix:
            if (self.settings.data.batch_size // self.world) % 2:
                raise ValueError("train.mixup and train.cutmix need an even data.batch_size for each process.")
            mix = Mixup(t.mixup, t.cutmix, label_smoothing=t.label_smoothing, num_classes=self.data.num_classes)
            return SoftTargetCrossEntropy(), mix
        return LabelSmoothingCrossEntropy(t.label_smoothing) if t.label_smoothing else nn.CrossEntropyLoss(), None

    # -- what the phases share ----------------------------------------------------------------------------------------

    def _phase(
        self,
        name: str,
        model: nn.Module,
        optimizer: Any,
        epochs: int,
        compute: ComputeStep,
        resume: Checkpoint | None,
        warmup_epochs: float,
        ema: ModelEmaV3 | None = None,
        supernet: Supernet | None = None,
    ) -> None:
        t, per_epoch = self.settings.train, len(self.batches)
        total, warmup = epochs * per_epoch, round(warmup_epochs * per_epoch)
        step, offset = 0, 0 if name == "pretrain" else self._float_steps()
        if resume is not None:
            try:
                self.accelerator.load_state(str(resume.path))
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(
                    f"{resume.path} belongs to another model or space: {str(error).splitlines()[0]}"
                ) from error
            step = resume.step
        self.tracker.rewind(offset + step)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if supernet is not None and self.settings.subnet is not None and resume is None:
            self._evaluate(supernet, offset)  # the subnet as it came
            self.run.save_checkpoint(self.accelerator, name, 0)
        model.train()
        with self._bar(name, total, step) as advance:
            while step < total:
                epoch, first = divmod(step, per_epoch)
                for images, labels in self.batches.epoch(epoch, first):
                    factor = cosine(step, total, warmup)
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * factor
                    parts = compute(images, labels, step)
                    if t.clip_value is not None:
                        self.accelerator.clip_grad_value_(parameters, t.clip_value)
                    if t.clip_norm is not None:
                        self.accelerator.clip_grad_norm_(parameters, t.clip_norm)
                    check = (step + 1) % t.log_steps == 0 or (step + 1) % t.checkpoint_steps == 0 or step + 1 == total
                    if check:
                        self._check_finite(parts, name, step)
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                    if ema is not None:
                        ema.update(supernet)
                    if step % t.log_steps == 0 or step == total:
                        self._log(name, parts, optimizer, offset + step, supernet)
                    advance(parts)
                    # before the checkpoint, so that a resumed run neither misses nor repeats an evaluation
                    due = t.evaluate_epochs and step % (t.evaluate_epochs * per_epoch) == 0 and step < total
                    if supernet is not None and due:
                        self._evaluate(supernet if ema is None else ema.module, offset + step)
                        model.train()
                    if self._stopping(step):
                        self.run.save_checkpoint(self.accelerator, name, step)
                        raise Interrupted(
                            f"stopped after step {step} of the {name} phase, saved; continue with --resume"
                        )
                    if step % t.checkpoint_steps == 0 and step < total:
                        self.run.save_checkpoint(self.accelerator, name, step)
        self.run.save_checkpoint(self.accelerator, name, step)

    def _evaluate(self, supernet: nn.Module, step: int) -> None:
        """Logs the chosen few; leaves configs and BN statistics as they were."""
        with kept_batch_norm(supernet):
            self.tracker.log(self.evaluate(supernet, step), step)

    def _float_steps(self) -> int:
        """Optimizer steps of the float phase, so that steps in the log run on."""
        return self.settings.pretrain_epochs * len(self.batches)

    def _check_finite(self, parts: Mapping[str, Tensor], phase: str, step: int) -> None:
        for name, value in parts.items():
            if name != "total" and not bool(torch.isfinite(value)):
                raise DivergedError(
                    f"the loss part {name!r} is {float(value)} at step {step + 1} of the {phase} phase; training stopped and "
                    "the last checkpoint is kept: lower the learning rate (train.lr, pretrain.lr) or set train.clip_norm."
                )

    def _log(
        self, phase: str, parts: Mapping[str, Tensor], optimizer: Any, step: int, supernet: Supernet | None
    ) -> None:
        names = list(parts)
        values = self.accelerator.reduce(torch.stack([parts[n].float() for n in names]), reduction="mean").tolist()
        figures = {f"{phase}/{n}": v for n, v in zip(names, values, strict=True)}
        figures[f"{phase}/lr"] = optimizer.param_groups[0]["lr"]
        figures[f"{phase}/step_size_lr"] = optimizer.param_groups[-1]["lr"]
        self.tracker.log(figures, step)
        if (
            supernet is not None
            and step % (10 * self.settings.train.log_steps) == 0
            and self.accelerator.is_main_process
        ):
            scales = {
                f"step_size/{n}": q.scale.detach().clamp_min(SCALE_EPS).log2().float().cpu().numpy()
                for n, q in supernet.quantizers()
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
    def _catch_signals(self) -> Iterator[None]:
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
        if self.world == 1:
            return self._stop_signal != 0
        if step % STOP_CHECK_STEPS:
            return False
        flag = torch.tensor([float(self._stop_signal)], device=self.accelerator.device)
        self._stop_signal = int(self.accelerator.gather(flag).max())
        return self._stop_signal != 0


def step_configs(sampler: SandwichSampler, seed: int, step: int) -> list[QuantConfig]:
    """The configs of a step; the same on every process. A space without elastic bits needs one config only."""
    configs = sampler.sample(np.random.default_rng((seed, step)))
    bits = sampler.space.bits
    static = all(len(set(bits[g, :n].tolist())) == 1 for g, n in enumerate(sampler.space.num_formats))
    return configs[:1] if static else configs


def export_facts(data: DataSplits, path: Path) -> dict[str, Any]:
    """What a supernet file states about its inputs and outputs."""
    return {
        "run": path.name,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "input_size": list(data.input_size),
        "mean": [float(m) for m in data.mean],
        "std": [float(s) for s in data.std],
    }
