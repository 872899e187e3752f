"""Curvature of the loss for every quantized tensor: traces (HAWQ-V2, arXiv 1911.03852) and top eigenvalues (HAWQ).

A change of the weights or inputs of a layer is an additive probe, and the Hessian for the probes has one diagonal block per
quantizer. A Rademacher vector v over all probes gives every trace at once: E[v_l (Hv)_l] = trace(H_ll) (Hutchinson). The
Hessian is that of the mean loss of a batch, by double backward passes through one graph.

Departs from the sources: sampling stops when the *standard error* of every trace is small against the trace, not when the
running mean changes little, which stops too early; the standard errors are reported. Inputs are treated like weights, image
by image. curvlinops offers whole-network traces and products; blocks for inputs would need the same hooks, so products are
taken from torch directly.

Shape legend: `T` blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from eqnet.nn.supernet import Supernet
from eqnet.scoring.sensitivity import (
    Advance,
    Batch,
    Quantizer,
    Sensitivity,
    Sums,
    floating_point,
    gradients_of,
    perturbations,
    probed_loss,
    quantizers,
    reduced,
    share,
    table,
)
from eqnet.space import QuantSpace

Block = Sequence[Tensor]
TOLERANCE = 0.1  # of the standard error of a trace, as a part of it
MAX_SAMPLES = 32  # products for each batch
_LEAST = 4  # products before a standard error is trusted


def block_traces(
    loss: Tensor,
    blocks: Sequence[Block],
    generator: torch.Generator,
    tolerance: float = TOLERANCE,
    max_samples: int = MAX_SAMPLES,
) -> tuple[Tensor, Tensor, int]:
    """Traces of the diagonal blocks of the Hessian of `loss`.

    Args:
        loss: 0-d, twice differentiable by the tensors of `blocks`.
        blocks: the tensors of each block.
        generator: of the random signs, on the CPU.
        tolerance: sampling stops when every standard error is below this part of its trace.
        max_samples: it stops after this many products at the latest, 2 or more.

    Returns:
        Traces [T], their standard errors [T], both float64, and the number of products.

    Raises:
        ValueError: the loss has no gradient.
    """
    flat = [tensor for block in blocks for tensor in block]
    owner = torch.tensor([i for i, block in enumerate(blocks) for _ in block])
    gradients = gradients_of(loss, flat, create_graph=True)
    samples = []
    for count in range(1, max_samples + 1):
        signs = [_signs(tensor, generator) for tensor in flat]
        products = hessian_vector(gradients, flat, signs)
        dots = torch.stack([(s * p).sum().double().cpu() for s, p in zip(signs, products, strict=True)])
        samples.append(torch.zeros(len(blocks), dtype=torch.float64).index_add_(0, owner, dots))
        if count >= min(_LEAST, max_samples) and count > 1:
            every = torch.stack(samples)
            mean, error = every.mean(0), every.std(0) / math.sqrt(count)
            if (error <= tolerance * mean.abs()).all():
                break
    return mean, error, len(samples)


def top_eigenvalue(
    loss: Tensor, block: Block, generator: torch.Generator, iterations: int = 50, tolerance: float = 1e-3
) -> float:
    """The eigenvalue of largest magnitude, with its sign, of one diagonal block of the Hessian, by power iteration.

    Stops when its relative change is below `tolerance`.

    Raises:
        ValueError: the loss has no gradient.
    """
    gradients = gradients_of(loss, block, create_graph=True)
    vector = [torch.randn(t.shape, generator=generator).to(t) for t in block]
    value = 0.0
    for _ in range(iterations):
        norm = math.sqrt(sum(float(v.double().square().sum()) for v in vector))
        if norm == 0:
            return 0.0
        vector = [v / norm for v in vector]
        product = list(hessian_vector(gradients, block, vector))
        before, value = value, sum(float((v * p).sum()) for v, p in zip(vector, product, strict=True))
        if abs(value - before) <= tolerance * abs(value):
            break
        vector = product
    return value


def hessian_vector(
    gradients: Sequence[Tensor], tensors: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The Hessian times a vector; zero where the gradient does not depend on anything (a linear loss)."""
    pairs = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(t) for t in tensors)
    slopes, factors = zip(*pairs, strict=True)
    return torch.autograd.grad(
        slopes, list(tensors), factors, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1).to(tensor)


def hessian(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sensitivity:
    """HAWQ-V2: trace of the Hessian per element, times the squared error of the format.

    A trace below its standard error, negative ones among them, counts as that error: too few samples must not make a format
    look free. The facts hold the traces per element as estimated, their standard errors, and the number of products.
    """
    count = len(batches)
    traces: Sums = {key: torch.zeros(2, dtype=torch.float64) for key in quantizers(supernet)}
    products = 0
    for index, (images, labels) in zip(_numbers(batches, accelerator), share(batches, accelerator), strict=True):
        with floating_point(supernet):
            _, probes, loss = probed_loss(supernet, images, labels, reduction="mean")
            generator = torch.Generator().manual_seed(index)
            # standard errors of the batches average out, so each may be larger than that of the mean
            mean, error, used = block_traces(loss, list(probes.values()), generator, TOLERANCE * math.sqrt(count))
            products += used
        for key, m, e in zip(probes, mean, error, strict=True):
            traces[key] += torch.stack([m, e.square()])
        for _ in supernet.layers:
            advance()
    sums = reduced(traces, accelerator)
    size = _sizes(supernet)
    per_element = {key: float(s[0]) / count / size[key] for key, s in sums.items()}
    errors = {key: math.sqrt(float(s[1])) / count / size[key] for key, s in sums.items()}
    facts = {
        "trace_per_element": {f"{layer}.{slot}": value for (layer, slot), value in per_element.items()},
        "standard_error": {f"{layer}.{slot}": value for (layer, slot), value in errors.items()},
        "products": int(accelerator.reduce(torch.tensor(products, device=accelerator.device), reduction="sum")),
    }
    factors = {key: max(value, errors[key]) for key, value in per_element.items()}
    return _times_perturbation("hessian", factors, facts, supernet, space, batches, accelerator)


def eigenvalue(
    supernet: Supernet, space: QuantSpace, batches: Sequence[Batch], accelerator: Accelerator, advance: Advance
) -> Sensitivity:
    """HAWQ: top eigenvalue of the Hessian (mean over the batches), times the squared error of the format.

    That of the inputs is the largest over the images of a batch. Negative ones count by their magnitude.
    """
    values: Sums = {key: torch.zeros(1, dtype=torch.float64) for key in quantizers(supernet)}
    for index, (images, labels) in zip(_numbers(batches, accelerator), share(batches, accelerator), strict=True):
        generator = torch.Generator().manual_seed(index)
        with floating_point(supernet):
            _, probes, loss = probed_loss(supernet, images, labels, reduction="mean")
            for key, block in probes.items():
                factor = len(labels) if key[1] == "act" else 1  # the mean loss divides the block of an image
                values[key] += factor * top_eigenvalue(loss, block, generator)
                if key[1] == "weight":
                    advance()
    tops = {key: float(v[0]) / len(batches) for key, v in reduced(values, accelerator).items()}
    facts = {"eigenvalue": {f"{layer}.{slot}": value for (layer, slot), value in tops.items()}}
    return _times_perturbation(
        "eigenvalue", {key: abs(v) for key, v in tops.items()}, facts, supernet, space, batches, accelerator
    )


def _numbers(batches: Sequence[Batch], accelerator: Accelerator) -> range:
    """The numbers of the batches of this process: seeds that do not depend on the number of processes."""
    return range(accelerator.process_index, len(batches), accelerator.num_processes)


def _sizes(supernet: Supernet) -> dict[Quantizer, int]:
    """Elements of every quantized tensor: weights, inputs of an image."""
    sizes: dict[Quantizer, int] = {}
    for layer in supernet.space.layers:
        sizes[layer.name, "weight"], sizes[layer.name, "act"] = layer.weight_numel, layer.act_numel
    return sizes


def _times_perturbation(
    score: str,
    factors: dict[Quantizer, float],
    facts: Mapping[str, object],
    supernet: Supernet,
    space: QuantSpace,
    batches: Sequence[Batch],
    accelerator: Accelerator,
) -> Sensitivity:
    errors = perturbations(supernet, space, batches, accelerator, lambda: None)
    return Sensitivity(score, table(space, {key: factors[key] * errors[key] for key in errors}), facts)
