"""One training step of the supernet: largest -> random -> smallest with progressive guidance, plus WDR.

EQ-Net (arXiv 2308.07650) section 3.3-3.4, eq. 4-8; sandwich rule of US-Nets. The gradients of all subnets and of the
regulariser are summed and applied in one optimizer step:

    L = L_largest + sum_i L_random_i + L_smallest + a * kurtosis + b * skewness

    L_largest = task,   L_next = lambda * T^2 * KL(next || previous) + (1 - lambda) * task    (or KL(next || largest))

Departs from the official code: the largest subnet keeps the first and last layer at their fixed bits; configs come from
`default_rng((seed, step))`, so all processes agree without communication; an optional float teacher guides the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from eqnet.nn.supernet import Supernet
from eqnet.settings import TrainSettings
from eqnet.space import QuantConfig
from eqnet.training.losses import guidance_loss, weight_distribution_loss

Criterion = Callable[[Tensor, Tensor], Tensor]


def subnet_roles(num_configs: int) -> list[str]:
    """Names of the subnets of a step in order.

    Examples:
        >>> subnet_roles(3)
        ['largest', 'random_1', 'smallest']
    """
    if num_configs == 1:
        return ["largest"]
    return ["largest", *(f"random_{i}" for i in range(1, num_configs - 1)), "smallest"]


def supernet_step(
    accelerator: Accelerator,
    model: nn.Module,
    supernet: Supernet,
    images: Tensor,
    targets: Tensor,
    configs: Sequence[QuantConfig | Tensor],
    criterion: Criterion,
    settings: TrainSettings,
    teacher: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Accumulates the gradients of one step; the caller clips them and runs the optimizer.

    Args:
        accelerator: scales losses in mixed precision and joins processes.
        model: what accelerate prepared around `supernet`; its forward is called.
        supernet: the bare supernet; its configs are switched.
        images: [N, C, H, W] of this process.
        targets: labels int64 [N], or soft targets [N, classes].
        configs: largest, random ..., smallest, in this order, or their rows as in `Supernet.set_rows`; one config trains
            statically.
        criterion: the task loss on (logits, targets), averaged over the batch.
        settings: weights of the parts.
        teacher: optional float model that guides the largest subnet.

    Returns:
        The loss parts as detached 0-d tensors, averaged over micro-batches: `task/<role>`, `guidance/<role>`,
        `kurtosis`, `skewness` (unweighted), and `total` (weighted as above).
    """
    parts: dict[str, Tensor] = {}
    if settings.kurtosis or settings.skewness:
        wdr = weight_distribution_loss(
            regularised_weights(supernet, settings), settings.kurtosis_target, supernet.kernels
        )
        weighted = settings.kurtosis * wdr["kurtosis"] + settings.skewness * wdr["skewness"]
        accelerator.backward(weighted)
        parts = {name: value.detach().float() for name, value in {**wdr, "total": weighted}.items()}
    roles = dict(zip(subnet_roles(len(configs)), configs, strict=True))
    subnets = accumulate_gradients(accelerator, model, supernet, images, targets, roles, criterion, settings, teacher)
    total = subnets["total"] if "total" not in parts else parts["total"] + subnets["total"]
    return {**parts, **subnets, "total": total}


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    supernet: Supernet,
    images: Tensor,
    targets: Tensor,
    configs: Mapping[str, QuantConfig | Tensor],
    criterion: Criterion,
    settings: TrainSettings,
    teacher: nn.Module | None = None,
    *,
    guided: bool = True,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Accumulates the gradients of the losses of some subnets, one after the other on each micro-batch.

    Args:
        configs: subnets by name, or their rows as above.
        guided: subnets are guided by larger ones as the settings say; otherwise the teacher, if any, guides all of them.
        scale: factor on the sum of the losses.

    The others, and what is returned, are as in `supernet_step`; `total` is scaled.
    """
    parts: dict[str, Tensor] = {}

    def note(name: str, value: Tensor, share: float) -> None:
        parts[name] = parts.get(name, value.new_zeros(())) + value.detach().float() * share

    chunks = min(settings.accumulation, len(images))
    pieces = zip(images.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    for i, (x, y) in enumerate(pieces):
        share = len(x) / len(images)
        guide = None
        if teacher is not None:
            with torch.no_grad(), accelerator.autocast():
                guide = teacher(x)
        for number, (name, config) in enumerate(configs.items(), 1):
            if isinstance(config, Tensor):
                supernet.set_rows(config)
            else:
                supernet.set_config(config)
            last = i == chunks - 1 and number == len(configs)
            with accelerator.no_sync(model) if not last else nullcontext():
                with accelerator.autocast():
                    logits = model(x)
                losses = subnet_loss(logits, y, guide, criterion, settings)
                loss = losses.pop("total")
                accelerator.backward(loss * (share * scale))
            if guided and (number == 1 or settings.guided_by == "previous"):
                guide = logits.detach()
            for part, value in losses.items():
                note(f"{part}/{name}", value, share)
            note("total", loss, share * scale)
    return parts


def subnet_loss(
    logits: Tensor, targets: Tensor, guide: Tensor | None, criterion: Criterion, settings: TrainSettings
) -> dict[str, Tensor]:
    """The loss of one subnet as named parts: "task", "guidance" if there is a guide [N, classes] (eq. 8), and their "total"."""
    logits = logits.float()
    task = criterion(logits, targets)
    if guide is None:
        return {"task": task, "total": task}
    return guidance_loss(logits, guide.float(), task, weight=settings.guidance, temperature=settings.temperature)


def regularised_weights(supernet: Supernet, settings: TrainSettings) -> dict[str, Tensor]:
    """Latent weights that WDR-Loss acts on: all layers, without the first unless `wdr_first_layer`."""
    weights: dict[str, Tensor] = dict(supernet.latent_weights())
    if not settings.wdr_first_layer and len(weights) > 1:
        weights.pop(next(iter(weights)))
    return weights
