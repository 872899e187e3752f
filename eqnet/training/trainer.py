"""The phases of a run: float training, then the supernet.

EQ-Net (arXiv 2308.07650). Each phase is a model, an optimizer and a step; `loop.Loop` runs it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from eqnet.checkpoint import load_float_weights, save_tensors
from eqnet.data import DataSplits, calibration_batches
from eqnet.nn.kernels import Kernels, choose_kernels, traced_kernels
from eqnet.nn.supernet import Supernet
from eqnet.run import Checkpoint, Run, create_float_model, target_spaces
from eqnet.space import QuantConfig, SandwichSampler
from eqnet.tracking import Tracker
from eqnet.training.finetune import build_supernet
from eqnet.training.loop import Evaluate, Loop, Phase
from eqnet.training.optimizer import SupernetAdamW, parameter_groups
from eqnet.training.step import Criterion, supernet_step

COMPILE_PAYS = 3e9  # quantized inputs of a whole run on CPU from which compiling, 10 to 20 s, saves more than it costs


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
        self.console, self.evaluate = console, evaluate
        self.settings = run.settings
        self.loop = Loop(run, accelerator, data, tracker, console)

    def fit(self, resume: Checkpoint | None) -> Supernet:
        """Runs what is left of both phases and returns the trained supernet (its EMA if one is kept).

        Raises:
            DivergedError: the loss is not finite; the last checkpoint is intact.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written.
        """
        with self.loop.catch_signals():
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
            phase = Phase("pretrain", prepared, optimizer, s.pretrain_epochs, compute, warmup_epochs=1.0)
            self.loop.train(phase, resume)
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
        if t.sync_bn and self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
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

        phase = Phase(
            "supernet",
            prepared,
            optimizer,
            t.epochs,
            compute,
            offset=s.pretrain_epochs * len(self.loop.batches),
            warmup_epochs=t.warmup_epochs,
            supernet=supernet,
            ema=ema,
            evaluate=self.evaluate,
            evaluate_first=s.subnet is not None,  # as it came
        )
        self.loop.train(phase, resume)
        self.accelerator.unwrap_model(
            prepared, keep_fp32_wrapper=False
        )  # accelerate's autocast would stay in `forward`
        result = supernet if ema is None else ema.module
        assert isinstance(result, Supernet)
        return result.eval()

    def _kernels(self, supernet: Supernet) -> Kernels:
        mode, device = self.settings.train.compile, self.accelerator.device
        values = (
            sum(layer.act_numel for layer in supernet.space.layers)
            * self.settings.data.batch_size
            // self.accelerator.num_processes
        )
        steps = self.settings.train.epochs * len(self.loop.batches) * (2 + self.settings.train.num_random)
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
            if (self.settings.data.batch_size // self.accelerator.num_processes) % 2:
                raise ValueError("train.mixup and train.cutmix need an even data.batch_size for each process.")
            mix = Mixup(t.mixup, t.cutmix, label_smoothing=t.label_smoothing, num_classes=self.data.num_classes)
            return SoftTargetCrossEntropy(), mix
        return LabelSmoothingCrossEntropy(t.label_smoothing) if t.label_smoothing else nn.CrossEntropyLoss(), None


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
