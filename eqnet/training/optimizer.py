"""The optimizer of a supernet: AdamW for weights, and Adam in its own time for each entry of the step-size tables.

A step trains only the rows of the selected formats. Plain Adam would let every other row drift on old momentum and decay
its moments; interior bit-widths are selected rarely, so that matters (the official code has this drift). Here an entry
whose gradient is exactly zero is left alone together with its moments, and bias correction counts the entry's own updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MAX_RELATIVE_CHANGE = 0.1  # of a step size in one update


class SupernetAdamW(torch.optim.AdamW):
    """AdamW whose groups with `per_entry=True` update only entries with a non-zero gradient, without weight decay.

    Args:
        params: parameter groups; `per_entry` marks groups of step-size tables, whose entries are positive and stay so: an
            update changes them by a tenth at most.
        lr: learning rate of groups that do not set their own.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("per_entry", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Gradients must be dense."""
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g["per_entry"]]
        try:
            loss: float | None = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["per_entry"]:
                self._update_tables(group)
        return loss

    def _update_tables(self, group: dict[str, Any]) -> None:
        tables = [p for p in group["params"] if p.grad is not None]
        if not tables:
            return
        beta1, beta2 = group["betas"]
        for p in tables:
            if not self.state[p]:
                self.state[p] = {name: torch.zeros_like(p) for name in ("step", "exp_avg", "exp_avg_sq")}
        grads: list[Tensor] = [p.grad for p in tables if p.grad is not None]
        first, second, count = ([self.state[p][k] for p in tables] for k in ("exp_avg", "exp_avg_sq", "step"))
        touched = [(g != 0).to(g.dtype) for g in grads]
        torch._foreach_add_(count, touched)
        # lerp with a per-entry weight of 0 or 1 - beta leaves untouched moments bit-identical
        torch._foreach_lerp_(first, grads, torch._foreach_mul(touched, 1 - beta1))
        torch._foreach_lerp_(second, torch._foreach_mul(grads, grads), torch._foreach_mul(touched, 1 - beta2))
        seen = torch._foreach_clamp_min(count, 1.0)
        correction1 = torch._foreach_neg(torch._foreach_expm1(torch._foreach_mul(seen, math.log(beta1))))
        correction2 = torch._foreach_neg(torch._foreach_expm1(torch._foreach_mul(seen, math.log(beta2))))
        denominator = torch._foreach_sqrt(torch._foreach_div(second, correction2))
        torch._foreach_add_(denominator, group["eps"])
        update = torch._foreach_div(torch._foreach_div(first, correction1), denominator)
        torch._foreach_mul_(update, touched)
        torch._foreach_mul_(update, -group["lr"])
        # an update of Adam is about a learning rate long, which may be more than a whole 8-bit step size
        limits = torch._foreach_mul(tables, MAX_RELATIVE_CHANGE)
        update = torch._foreach_maximum(torch._foreach_minimum(update, limits), torch._foreach_neg(limits))
        torch._foreach_add_(tables, update)


def parameter_groups(
    model: nn.Module,
    step_sizes: list[nn.Parameter],
    *,
    lr: float,
    step_size_lr: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for `SupernetAdamW`: weights, then biases and norms without decay, then step-size tables.

    Args:
        model: the network; parameters with one dimension get no weight decay.
        step_sizes: tables with `step_size_lr`, no decay, updated per entry; empty in float training.
    """
    tables = {id(p) for p in step_sizes}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for p in step_sizes if p.requires_grad],
            "lr": step_size_lr,
            "weight_decay": 0.0,
            "per_entry": True,
        },
    ]
    for group in groups:
        group["peak_lr"] = group["lr"]
    return [g for g in groups if g["params"]]


def cosine(step: int, total: int, warmup: int = 0) -> float:
    """Factor on the peak learning rate before optimizer step `step` of `total`: linear warm-up, then cosine to ~0.

    Examples:
        >>> [round(cosine(s, 4), 3) for s in (0, 2, 4)]
        [1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
