"""The phases of a run: float training, then the supernet (EQ-Net, arXiv 2308.07650).

With a budget for MetaMix (arXiv 2311.06798) the bits are selected in between, and the supernet is that of one config: its
activations are quantized first, then its weights too. Each phase is a model, an optimizer and a step; `loop.Loop` runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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

from eqnet.checkpoint import load_float_weights, read_json, save_tensors, write_json
from eqnet.data import DataSplits, calibration_batches
from eqnet.nn.integer_training import use_integers
from eqnet.nn.kernels import Kernels
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model, target_spaces, training_space
from eqnet.run_checkpoints import Checkpoint
from eqnet.settings import Settings
from eqnet.space import QuantConfig, SandwichSampler
from eqnet.tracking import Tracker
from eqnet.training.backend import as_cuda_graph, on_integers, training_kernels
from eqnet.training.cuda_graph import GraphedGradients
from eqnet.training.finetune import build_supernet
from eqnet.training.loop import Evaluate, Loop, Phase
from eqnet.training.metamix import (
    BitSelection,
    bind_budget,
    bit_meta_step,
    bit_search_step,
    branch_configs,
    describe_selection,
    logit_optimizer,
    weights_searched,
    within_budget,
)
from eqnet.training.optimizer import SupernetAdamW, parameter_groups
from eqnet.training.stability import Stability, measure_stability
from eqnet.training.step import Criterion, supernet_step

SubnetStep = Callable[[nn.Module, Tensor, Tensor, int], dict[str, Tensor]]


class Trainer:
    """Trains the float model and the supernet of one run.

    Args:
        run: the folder; its settings define everything.
        accelerator: from `make_accelerator`.
        data: the splits.
        tracker: receives figures.
        console: where progress is shown, on the main process.
        evaluate: called with (bare model, step) every `evaluate_epochs` of the supernet phase; returns figures to log.
        recover: as in `Loop`.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        data: DataSplits,
        tracker: Tracker,
        console: Console,
        evaluate: Evaluate,
        recover: bool = True,
    ) -> None:
        self.run, self.accelerator, self.data = run, accelerator, data
        self.console, self.evaluate = console, evaluate
        self.settings = run.settings
        self.loop = Loop(run, accelerator, data, tracker, console, recover)
        self._criterion, self._mix = _task_loss(self.settings, data.num_classes, accelerator.num_processes)

    @property
    def epochs(self) -> dict[str, int]:
        """Epochs of each phase of the run, in order."""
        s, m = self.settings, self.settings.metamix
        selection = {} if m.budget is None else {"select": m.select_epochs, "act": m.act_epochs}
        return {"pretrain": s.pretrain_epochs, **selection, "supernet": s.train.epochs}

    def fit(self, resume: Checkpoint | None) -> Supernet:
        """Runs what is left of all phases and returns the trained supernet (its EMA if one is kept).

        Raises:
            DivergedError: as in `Loop.train`.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written.
        """
        phase = None if resume is None else resume.phase
        with self.loop.catch_signals():
            model = self._float_phase(resume if phase == "pretrain" else None, done=phase not in (None, "pretrain"))
            teacher = None
            if self.settings.train.teacher == "float":
                teacher = copy.deepcopy(model).eval().requires_grad_(False)
            if self.settings.metamix.budget is None:
                supernet = self._supernet(model, calibrate=resume is None or phase == "pretrain")
            else:
                supernet = self._selected(model, teacher, resume)
            return self._supernet_phase(supernet, teacher, resume if phase == "supernet" else None)

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

            def compute(images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
                images, targets = self._mix(images, labels) if self._mix is not None else (images, labels)
                with self.accelerator.autocast():
                    logits = prepared(images)
                loss = self._criterion(logits.float(), targets)
                self.accelerator.backward(loss)
                return {"task": loss.detach()}

            groups = parameter_groups(model, [], lr=s.pretrain.lr, step_size_lr=0.0, weight_decay=s.train.weight_decay)
            prepared, optimizer = self.accelerator.prepare(model, SupernetAdamW(groups))
            phase = Phase("pretrain", prepared, optimizer, s.pretrain_epochs, compute, warmup_epochs=1.0)
            self.loop.train(phase, resume)
            model = self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
        if self.accelerator.is_main_process:
            save_tensors(stored, model.state_dict())
        self.accelerator.wait_for_everyone()
        return model.to(self.accelerator.device)

    def _supernet(self, model: nn.Module, calibrate: bool) -> Supernet:
        """The supernet of the run in its first state; what a checkpoint restores is left out unless `calibrate`."""
        s = self.settings
        supernet = build_supernet(self.run, model, self.data.input_size)
        if calibrate and s.supernet is not None:
            supernet.inherit(Run.open(s.supernet).load_supernet()[0])
        self._to_device(supernet)
        if supernet.uncovered and self.accelerator.is_main_process:
            self.console.print(f"left in floating point: {', '.join(supernet.uncovered)}", style="dim")
        if calibrate and s.supernet is None:
            supernet.calibrate(self._calibration_images())
        supernet.use_kernels(self._kernels(supernet))
        if on_integers(s.train, self.accelerator.device):
            use_integers(supernet)
        return supernet

    def _calibration_images(self) -> Tensor:
        count, device = self.settings.train.calibration_images, self.accelerator.device
        (images,) = calibration_batches(self.data, count, count, self.settings.seed, device, self.settings.data.workers)
        return images

    def _supernet_phase(self, supernet: Supernet, teacher: nn.Module | None, resume: Checkpoint | None) -> Supernet:
        s, t = self.settings, self.settings.train
        ema = None if t.ema_decay is None else ModelEmaV3(supernet, decay=t.ema_decay)
        parts = [] if s.one_subnet else target_spaces(supernet.space, s.space.targets)
        sampler = SandwichSampler(supernet.space, num_random=t.num_random, form_per=t.form_per, within=parts)

        def gradients(
            model: nn.Module, images: Tensor, targets: Tensor, configs: Sequence[QuantConfig | Tensor]
        ) -> dict[str, Tensor]:
            return supernet_step(
                self.accelerator, model, supernet, images, targets, configs, self._criterion, t, teacher=teacher
            )

        run = GraphedGradients(supernet, gradients) if as_cuda_graph(t, self.accelerator) else gradients

        def step(model: nn.Module, images: Tensor, targets: Tensor, step: int) -> dict[str, Tensor]:
            return run(model, images, targets, step_configs(sampler, s.seed, step))

        first = None if s.subnet is None else self.evaluate  # as it came
        self._train("supernet", supernet, step, resume, ema=ema, evaluate=self.evaluate, first=first)
        result = supernet if ema is None else ema.module
        assert isinstance(result, Supernet)
        return result.eval()

    def _train(
        self,
        name: str,
        supernet: Supernet,
        step: SubnetStep,
        resume: Checkpoint | None,
        extra: Sequence[Any] = (),
        ema: ModelEmaV3 | None = None,
        evaluate: Evaluate | None = None,
        first: Evaluate | None = None,
    ) -> None:
        """One phase of a supernet: puts optimizer, processes and precision around it, and takes them off again.

        Args:
            name: of the phase.
            supernet: what is trained.
            step: (prepared model, images, targets, step) -> loss parts.
            resume: a checkpoint of this phase.
            extra: modules and optimizers that belong to its checkpoints as well.
            ema: as in `Phase`, like the others.
            evaluate: likewise.
            first: likewise.
        """
        t = self.settings.train
        groups = parameter_groups(
            supernet,
            supernet.step_sizes(),
            lr=t.lr,
            step_size_lr=t.step_size_lr,
            weight_decay=t.weight_decay,
        )
        wrapped: nn.Module = supernet
        if t.sync_bn and self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(supernet)
        prepared, optimizer, *_ = self.accelerator.prepare(wrapped, SupernetAdamW(groups), *extra)
        # training alone is compiled as a whole; evaluation in between runs the same modules uncompiled
        trained: Any = torch.compile(prepared, dynamic=False) if t.compile == "network" else prepared

        def compute(images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor]:
            images, targets = self._mix(images, labels) if self._mix is not None else (images, labels)
            return step(trained, images, targets, number)

        before = list(self.epochs)[: list(self.epochs).index(name)]
        phase = Phase(
            name,
            prepared,
            optimizer,
            self.epochs[name],
            compute,
            offset=sum(self.epochs[p] for p in before) * len(self.loop.batches),
            warmup_epochs=t.warmup_epochs,
            supernet=supernet,
            ema=ema,
            evaluate=evaluate,
            first=first,
        )
        self.loop.train(phase, resume)
        # accelerate's autocast would stay in `forward`
        self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    # -- MetaMix ------------------------------------------------------------------------------------------------------

    def _selected(self, model: nn.Module, teacher: nn.Module | None, resume: Checkpoint | None) -> Supernet:
        """The supernet of the selected bits after its activation phase; selects them if that is not done yet."""
        phase = None if resume is None else resume.phase
        if phase in ("act", "supernet"):
            supernet = self._supernet(model, calibrate=False)
        else:
            source = self._select_phase(model, teacher, resume if phase == "select" else None)
            fresh = create_float_model(
                self.settings.model, self.data.num_classes, self.data.input_size[0], weights=False
            )
            load_float_weights(fresh, self.run.path / "float.safetensors")
            supernet = self._supernet(fresh, calibrate=False)
            supernet.inherit(source)
        if phase == "supernet":
            return supernet
        space = training_space(self.settings.space, supernet.space.layers, supernet.space.float_numel)
        if not weights_searched(space) and phase != "act":
            supernet.calibrate_weights()
        config, train = supernet.space.largest(), self.settings.train

        def step(model: nn.Module, images: Tensor, targets: Tensor, step: int) -> dict[str, Tensor]:
            with supernet.float_weights():
                return supernet_step(
                    self.accelerator, model, supernet, images, targets, [config], self._criterion, train, teacher
                )

        self._train("act", supernet, step, resume if phase == "act" else None, first=self.evaluate)
        if not weights_searched(space):
            supernet.calibrate_weights()
        return supernet

    def _select_phase(self, model: nn.Module, teacher: nn.Module | None, resume: Checkpoint | None) -> Supernet:
        """Bit-meta and bit-search; writes what was selected as `subnet.json`."""
        s, m, run = self.settings, self.settings.metamix, self.run
        accelerator, criterion = self.accelerator, self._criterion
        (run.path / "subnet.json").unlink(missing_ok=True)  # of a selection that was not saved
        supernet = self._supernet(model, calibrate=False)
        branches, bound = branch_configs(supernet.space), bind_budget(run, supernet.space)
        selection = BitSelection(supernet.space, bound, s.seed).to(self.accelerator.device)
        logits = logit_optimizer(selection, m.logit_lr)
        weights = nullcontext if weights_searched(supernet.space) else supernet.float_weights
        images = self._calibration_images()
        if resume is None:
            with weights():
                supernet.calibrate(images)
                self._note_stability("before", measure_stability(supernet, branches, images))
        warmup = m.warmup_epochs * len(self.loop.batches)

        def step(model: nn.Module, images: Tensor, targets: Tensor, step: int) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            with weights():
                if step >= warmup:
                    found = bit_search_step(
                        accelerator, supernet, selection, logits, images, targets, criterion, s.train, teacher
                    )
                meta = bit_meta_step(
                    accelerator, model, supernet, images, targets, branches, criterion, s.train, teacher
                )
            return {**meta, **found}

        self._train("select", supernet, step, resume, extra=(selection, logits))
        with weights():
            self._note_stability("after", measure_stability(supernet, branches, images))
        genome = within_budget(
            selection.probabilities.detach().cpu().numpy(), bound, np.random.default_rng((s.seed, 3))
        )
        if self.accelerator.is_main_process:
            write_json(run.path / "selection.json", describe_selection(selection, bound, genome, m.budget or ""))
            write_json(run.path / "subnet.json", {"layers": supernet.space.decode(genome).to_json()})
            costs = ", ".join(cost.format(float(cost(genome[None])[0])) for cost in bound.costs)
            self.console.print(f"selected bits within {m.budget}: {costs}")
        self.accelerator.wait_for_everyone()
        return supernet

    def _note_stability(self, when: str, found: Stability) -> None:
        """Adds to `stability.json`; "before" begins it anew."""
        path = self.run.path / "stability.json"
        if self.accelerator.is_main_process:
            write_json(path, {**({} if when == "before" else read_json(path)), when: found.to_json()})

    # -- what the phases share ----------------------------------------------------------------------------------------

    def _kernels(self, supernet: Supernet) -> Kernels:
        epochs = sum(count for name, count in self.epochs.items() if name != "pretrain")
        passes = epochs * len(self.loop.batches) * (2 + self.settings.train.num_random)
        images = self.settings.data.batch_size // self.accelerator.num_processes
        values = sum(layer.act_numel for layer in supernet.space.layers) * images
        return training_kernels(self.settings.train, self.accelerator.device, values * passes)

    def _to_device(self, model: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.settings.train.channels_last else torch.contiguous_format
        return model.to(self.accelerator.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _task_loss(settings: Settings, num_classes: int, processes: int) -> tuple[Criterion, Mixup | None]:
    """The task loss of the settings, and what mixes images before it.

    Raises:
        ValueError: batches that cannot be mixed.
    """
    t = settings.train
    if t.mixup or t.cutmix:
        if (settings.data.batch_size // processes) % 2:
            raise ValueError("train.mixup and train.cutmix need an even data.batch_size for each process.")
        mix = Mixup(t.mixup, t.cutmix, label_smoothing=t.label_smoothing, num_classes=num_classes)
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
