"""What the supernet is trained on besides the task: shape of the weight distributions, guidance of small subnets by larger.

EQ-Net (arXiv 2308.07650), eq. 4-6: weight distribution regularisation (WDR), and eq. 7-8: group progressive guidance (GPG).
Pure functions that return named parts; the training step weights the WDR parts (in the official code 0.015 for kurtosis and
1.0 for skewness) and chooses the layers (there: all but the first).

Departs from the official code: moments divide by the standard deviation of the population, which is what the equations say,
where that code has the unbiased one; for a layer of n weights its kurtosis is smaller by the factor ((n - 1) / n)^2.

Shape legend: `N` batch, `K` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eqnet.nn.kernels import EAGER, Kernels, Moments, from_rows, to_rows

UNIFORM_KURTOSIS = 1.8  # of a continuous uniform distribution: the one that loses least to uniform steps of any width


class _Moments(torch.autograd.Function):
    """Skewness and kurtosis of a tensor with their closed-form gradient: one pass over the weights instead of a dozen."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))
        found = kernels.moments(to_rows(wide, None).data)
        ctx.save_for_backward(w, *found)
        ctx.kernels = kernels
        return found.skewness, found.kurtosis

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        w, *found = ctx.saved_tensors
        wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))
        rows = ctx.kernels.moments_gradient(to_rows(wide, None).data, Moments(*found), *grads)
        return from_rows(rows, w, None).to(w.dtype), None


def skewness(w: Tensor) -> Tensor:
    """Skewness of all elements together, `E[((w - mean) / std)^3]` (EQ-Net eq. 4).

    Examples:
        >>> skewness(torch.tensor([0.0, 0.0, 0.0, 4.0]))
        tensor(1.1547)

    Args:
        w: any shape, at least one element, floating point.

    Returns:
        0-d, float32 (float64 for float64). 0 if all elements are equal.
    """
    return _Moments.apply(w, EAGER)[0]  # type: ignore[no-any-return]


def kurtosis(w: Tensor) -> Tensor:
    """Kurtosis of all elements together, `E[((w - mean) / std)^4]` (EQ-Net eq. 5); 1.8 uniform, 3 Gaussian, 6 Laplace.

    Examples:
        >>> kurtosis(torch.tensor([-1.0, 1.0]))
        tensor(1.)

    Args:
        w: any shape, at least one element, floating point.

    Returns:
        0-d, float32 (float64 for float64), at least 1. 0 if all elements are equal, where it is undefined.
    """
    return _Moments.apply(w, EAGER)[1]  # type: ignore[no-any-return]


def weight_distribution_loss(
    weights: Mapping[str, Tensor], kurtosis_target: float = UNIFORM_KURTOSIS, kernels: Kernels = EAGER
) -> dict[str, Tensor]:
    """WDR loss (EQ-Net eq. 6): how far the weights of each layer are from evenly spread, in two parts to be weighted.

    A symmetric distribution (skewness 0) is quantized alike by symmetric and asymmetric formats, a uniform one (kurtosis
    1.8) by many bit-widths. Moments are taken over the whole latent float tensor of a layer, never per channel. A layer
    whose weights are all equal has no distribution to move: it adds a constant without gradient.

    Args:
        weights: latent weight of each layer to regularise.
        kurtosis_target: kurtosis that costs nothing.
        kernels: eager or compiled.

    Returns:
        0-d tensors "kurtosis", the mean over layers of `(kurtosis - kurtosis_target)^2`, and "skewness", the mean of
        `skewness^2`. Zeros on the CPU if `weights` is empty.
    """
    if not weights:
        return {"kurtosis": torch.zeros(()), "skewness": torch.zeros(())}
    skewnesses, kurtoses = zip(*(_Moments.apply(w, kernels) for w in weights.values()), strict=True)
    return {
        "kurtosis": (torch.stack(kurtoses) - kurtosis_target).square().mean(),
        "skewness": torch.stack(skewnesses).square().mean(),
    }


def guidance_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    task_loss: Tensor,
    *,
    weight: float = 0.5,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """GPG loss of one subnet (EQ-Net eq. 7-8): it learns from the next larger subnet as well as from the labels.

    The gradient of the divergence falls as 1 / temperature^2, which the factor temperature^2 in the total undoes.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> guidance_loss(logits, logits, torch.tensor(3.0))["total"]
        tensor(1.5000)

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]` of the larger subnet on the same images; no gradient flows into them.
        task_loss: 0-d loss of the student against the labels.
        weight: lambda of the paper, the share of the guidance, in [0, 1].
        temperature: divides both logits, positive.

    Returns:
        0-d tensors "guidance" = KL(teacher || student) per image, "task" = `task_loss` and
        "total" = `weight * temperature^2 * guidance + (1 - weight) * task`.

    Raises:
        ValueError: shapes differ or are not `[N, K]`; `weight` or `temperature` is out of range.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            "student and teacher logits of guidance_loss must have the same shape [N, K]; got "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}."
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight of guidance_loss must be in [0, 1]; got {weight}.")
    if not temperature > 0:
        raise ValueError(f"temperature of guidance_loss must be positive; got {temperature}.")
    # Half-precision logits are widened first: a divergence of near-equal distributions is lost in their rounding.
    student, teacher = (
        F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
        for logits in (student_logits, teacher_logits.detach())
    )
    guidance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    total = weight * temperature**2 * guidance + (1 - weight) * task_loss
    return {"guidance": guidance, "task": task_loss, "total": total}
