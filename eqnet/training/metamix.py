"""MetaMix (arXiv 2311.06798): bit-widths selected while the network trains.

Changing bits changes the statistics of activations, which a search by gradients takes for the merit of a bit-width. Each
step of the selection therefore first makes the network fit for all of them, then looks for the best:

    bit-meta:    L(W, s, BN) = mean over b of the loss with every layer at b bits
    bit-search:  L(logits) = loss of the network that the logits select + w * (cost / limit - 1), everything else frozen

A bit-width is a row of a quantizer, so the network needs nothing new. Weights are quantized at the bits of the branch if
the space has several bit-widths for them, and stay in floating point otherwise (the paper).

Departs from the official code: every branch propagates (there only the last); the searched network is the selected one, not
a mixture of all bits; BN buffers do not move during the search; the cost is signed with a weight that integrates the
excess, so that it pushes to the budget from both sides, and what is selected is within it always; several limits, all costs.

Shape legend: `G` genes, `F` formats of the longest gene, `C` limited costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.nn.supernet import Supernet, frozen_batch_norm
from eqnet.run import Run
from eqnet.settings import Settings, TrainSettings
from eqnet.space import BoundBudget, Budget, Genomes, QuantConfig, QuantSpace
from eqnet.space.cost import Costs
from eqnet.space.hardware import load_target
from eqnet.space.latency import read_latency_table
from eqnet.space.target_cost import target_costs
from eqnet.training.step import Criterion, accumulate_gradients, subnet_loss

PENALTY = 4.0  # weight of the excess over the budget, the lambda of the official code
INTEGRAL = 5.0  # of the excess, added to the weight in the time that logits take to move by about one
BETAS = (0.5, 0.999)  # of Adam on the logits, official code


def weights_searched(space: QuantSpace) -> bool:
    """Whether some weights have several bit-widths; otherwise they stay in floating point during the selection."""
    return bool((space.num_formats[space.is_weight] > 1).any())


def branch_configs(space: QuantSpace) -> dict[int, QuantConfig]:
    """The branches of bit-meta: for each bit-width of a searched gene the config with all genes at it, or at the nearest.

    Raises:
        ValueError: some gene has formats that differ in more than bits, or no gene has several.
    """
    for gene in space.genes:
        if len({(fmt.symmetric, fmt.granularity) for fmt in gene.formats}) > 1:
            raise ValueError(
                f"MetaMix selects bits, and the {gene.slot} of layer {gene.layers[0]!r} has formats that differ in more; give "
                "space.symmetric and space.granularity one choice each."
            )
    searched = space.num_formats > 1
    if not searched.any():
        raise ValueError("MetaMix has nothing to select: give space.bits or space.act_bits several bit-widths.")
    levels = np.unique(space.bits[searched])
    valid = space.formats_in(None)
    distances = {int(b): np.where(valid, np.abs(space.bits - b), np.inf) for b in levels[levels > 0]}
    return {b: space.decode(distance.argmin(1)) for b, distance in distances.items()}


def budget_costs(settings: Settings) -> Costs:
    """What the names of `metamix.budget` mean: with one target in `space.targets`, costs of that target.

    Raises:
        ValueError: unknown target, unreadable table of latency.
    """
    names, path = settings.space.targets, settings.metamix.latency_table
    table = None if path is None else read_latency_table(path)
    return target_costs(load_target(names[0]) if len(names) == 1 else None, table)


def bind_budget(run: Run, space: QuantSpace) -> BoundBudget:
    """The budget `metamix.budget` on the space of a run.

    Raises:
        ValueError: not a budget, or the space cannot meet it; a limit on latency without a table; and as `budget_costs`.
    """
    s = run.settings
    assert s.metamix.budget is not None
    budget = Budget.parse(s.metamix.budget)
    if s.metamix.latency_table is None and any(name == "latency" for name, _ in budget.limits):
        raise ValueError(
            f"metamix.budget={budget}: latency depends on the device; give times of layers with metamix.latency_table=FILE "
            "(`eqnet benchmark latency` measures them)."
        )
    return budget.bind(space, costs=budget_costs(s))


def bit_meta_step(
    accelerator: Accelerator,
    model: nn.Module,
    supernet: Supernet,
    images: Tensor,
    targets: Tensor,
    branches: Mapping[int, QuantConfig],
    criterion: Criterion,
    settings: TrainSettings,
    teacher: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Accumulates the gradients of the mean loss of the branches; the caller clips them and runs the optimizer.

    Args:
        branches: configs by bit-width.

    The others are as in `supernet_step`; a teacher guides every branch.

    Returns:
        Loss parts as there: `task/<b>bit`, `guidance/<b>bit`, and their mean `total`.
    """
    configs = {f"{bits}bit": config for bits, config in branches.items()}
    return accumulate_gradients(
        accelerator,
        model,
        supernet,
        images,
        targets,
        configs,
        criterion,
        settings,
        teacher,
        guided=False,
        scale=1 / len(configs),
    )


class BitSelection(nn.Module):
    """Logits over the formats of every gene, and the weight of the budget.

    Attributes:
        logits: [G, F]; entries of formats that a gene lacks play no part.
        multiplier: float64 0-d, the integral part of the weight.
    """

    multiplier: Tensor
    valid: Tensor  # bool [G, F]
    _tables: Tensor  # [C, M cells], relative to the limits
    _constants: Tensor  # [C]
    _weight: Tensor  # gene and format of the weights of each cell, [2, M]
    _act: Tensor  # of its activations, [2, M]
    _has_act: Tensor  # bool [M]

    def __init__(self, space: QuantSpace, bound: BoundBudget, seed: int) -> None:
        super().__init__()
        self.space = space
        start = np.random.default_rng((seed, 2)).normal(scale=1e-3, size=space.bits.shape)
        self.logits = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        cells = bound.costs[0].cells
        group, weight, act = cells.parts()
        tables = np.stack(
            [cost.table / (cost.divisor * limit) for cost, limit in zip(bound.costs, bound.limits, strict=True)]
        )
        constants = [
            cost.constant / (cost.divisor * limit) for cost, limit in zip(bound.costs, bound.limits, strict=True)
        ]
        for name, values in {
            "valid": space.formats_in(None),
            "_tables": tables,
            "_constants": np.array(constants),
            "_weight": np.stack([cells.weight_gene[group], weight]),
            "_act": np.stack([cells.act_gene[group], act]),
            "_has_act": cells.has_act[group],
        }.items():
            self.register_buffer(name, torch.as_tensor(values), persistent=False)

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, [G, F]; 0 for formats that a gene lacks."""
        return self.logits.masked_fill(~self.valid, -torch.inf).softmax(1)

    def forward(self) -> Tensor:
        """The selected formats, exactly one-hot [G, F], with the gradient of the probabilities."""
        soft = self.probabilities
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    @property
    def genome(self) -> Genomes:
        """The selected formats, int16 [G]."""
        chosen: Genomes = self.probabilities.detach().argmax(1).cpu().numpy().astype(np.int16)
        return chosen

    def costs(self, choice: Tensor) -> Tensor:
        """Costs relative to their limits, float64 [C], of the expected config if genes are drawn from `choice` [G, F].

        Those of a one-hot choice are those of its config.
        """
        wide = choice.double()
        acts = torch.where(self._has_act, wide[self._act[0], self._act[1]], 1.0)
        return self._tables @ (wide[self._weight[0], self._weight[1]] * acts) + self._constants

    def excess(self, choice: Tensor) -> Tensor:
        """How far the tightest limit is exceeded, as a part of it; negative where all limits leave room. 0-d."""
        return self.costs(choice).amax() - 1


class _Selected(torch.autograd.Function):
    """A quantizer's output, as a function of the choice between its formats: sum over b of h_b Q_b(x) at a one-hot h."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, choice: Tensor, quantizer: ElasticQuantizer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.quantizer, ctx.choice = quantizer, choice.detach()
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (u,) = ctx.saved_tensors, grads
        slopes = torch.zeros_like(ctx.choice)
        for row in range(len(ctx.quantizer.formats)):  # computed again: nothing is kept for formats that do not run
            slopes[row] = (u * ctx.quantizer.quantized(x, row)).sum(dtype=torch.float32)
        return u, None, slopes, None


@contextmanager
def selected_by(supernet: Supernet, choice: Tensor) -> Iterator[None]:
    """Inside, outputs depend on the choice [G, F] of the active config: its gradient is `<u, Q_b(x)>` for every format b."""

    def hook(row: Tensor) -> Any:
        def select(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            assert isinstance(module, ElasticQuantizer)
            return _Selected.apply(out, args[0].detach(), row, module) if module.enabled else out

        return select

    handles = []
    for name, quantizer in supernet.quantizers():
        layer, _, slot = name.rpartition(".")
        gene = supernet.space.gene_of[layer, slot]  # type: ignore[index]
        if len(quantizer.formats) > 1:
            handles.append(quantizer.register_forward_hook(hook(choice[gene])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bit_search_step(
    accelerator: Accelerator,
    supernet: Supernet,
    selection: BitSelection,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    criterion: Criterion,
    settings: TrainSettings,
    teacher: nn.Module | None = None,
) -> dict[str, Tensor]:
    """One update of the logits; nothing else changes but the active config.

    BN normalises with the statistics of the batch, as if recalibrated for the selected config; the running ones are an
    average over all branches and fit none of them.

    Args:
        accelerator: joins processes.
        supernet: the bare supernet, in train mode.
        selection: its logits and multiplier change.
        optimizer: of the logits.
        images: [N, C, H, W] of this process.
        targets: labels int64 [N], or soft targets [N, classes].
        criterion: the task loss.
        settings: of the guidance.
        teacher: optional float model that guides.

    Returns:
        `search/task`, `search/excess` (of the budget, as a part of it) and `search/multiplier`, detached and 0-d.
    """
    choice = selection()
    supernet.set_config(supernet.space.decode(selection.genome))
    guide = None
    with accelerator.autocast():
        if teacher is not None:
            with torch.no_grad():
                guide = teacher(images)
        with selected_by(supernet, choice), frozen_batch_norm(supernet):
            logits = supernet(images)
    parts = subnet_loss(logits, targets, guide, criterion, settings)
    excess = selection.excess(choice)
    weight = selection.multiplier + PENALTY * excess.detach()
    scaler = accelerator.scaler  # of fp16, whose small gradients would vanish
    factor = 1.0 if scaler is None else scaler.get_scale()
    (gradient,) = torch.autograd.grad((parts["total"] + weight * excess) * factor, [selection.logits])
    selection.logits.grad = accelerator.reduce(gradient / factor, reduction="mean")
    if bool(torch.isfinite(selection.logits.grad).all()):  # fp16 may overflow now and then
        optimizer.step()
    optimizer.zero_grad()
    selection.multiplier += INTEGRAL * optimizer.param_groups[0]["lr"] * excess.detach()
    return {
        "search/task": parts["task"].detach(),
        "search/excess": excess.detach(),
        "search/multiplier": selection.multiplier.clone(),
    }


def within_budget(probabilities: NDArray[Any], bound: BoundBudget, rng: np.random.Generator) -> Genomes:
    """The most probable genome [G], moved within the budget and then close to it.

    Greedy: while a limit is exceeded, the change of one gene that loses least log-probability per excess removed; then, while
    one fits, the change to more bits that loses least per cost added.

    Args:
        probabilities: [G, F], 0 for formats that a gene lacks.
        bound: the budget.
        rng: for limits that no single change can meet (`BoundBudget.repair`).
    """
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities)
    space = bound.space
    valid, genes = space.formats_in(None), np.arange(space.num_genes)
    genome: Genomes = np.where(valid, probabilities, -1.0).argmax(1).astype(np.int16)

    def changed(allowed: NDArray[np.bool_]) -> tuple[Genomes, NDArray[np.float64]]:
        """Genomes that differ in one allowed format, and the log-probabilities that they lose."""
        where, formats = np.nonzero(allowed)
        moved = np.repeat(genome[None], len(where), 0)
        moved[np.arange(len(where)), where] = formats
        return moved, np.maximum(scores[where, genome[where]] - scores[where, formats], 0)

    while not bound.feasible(genome[None])[0]:
        moved, loss = changed(valid & (np.arange(valid.shape[1]) != genome[:, None]))
        removed = bound.violation(genome[None])[0] - bound.violation(moved)
        if not (removed > 0).any():
            repaired: Genomes = bound.repair(genome[None], rng)[0]
            return repaired
        ratio = np.where(removed > 0, (loss + 1e-12) / np.where(removed > 0, removed, 1), np.inf)
        genome = moved[ratio.argmin()]
    while True:
        moved, loss = changed(valid & (space.bits > space.bits[genes, genome][:, None]))
        added = np.sum((bound.values(moved) - bound.values(genome[None])) / bound.limits, axis=1)
        fits = bound.feasible(moved) & (added > 0)
        if not fits.any():
            return genome
        genome = moved[np.where(fits, (loss + 1e-12) / np.where(fits, added, 1), np.inf).argmin()]


def describe_selection(selection: BitSelection, bound: BoundBudget, genome: Genomes, budget: str) -> dict[str, Any]:
    """What `selection.json` says: the budget, costs of the most probable and of the final genome, probabilities by gene."""
    values = bound.values(np.stack([selection.genome, genome]))
    probabilities = selection.probabilities.detach().cpu().tolist()
    return {
        "budget": budget,
        "cost": {
            cost.name: {"limit": float(limit), "most_probable": float(first), "selected": float(second)}
            for cost, limit, first, second in zip(bound.costs, bound.limits, *values, strict=True)
        },
        "genes": [
            {
                "slot": gene.slot,
                "layers": list(gene.layers),
                "selected": gene.formats[int(chosen)].bits,
                "probability": {fmt.bits: p for fmt, p in zip(gene.formats, row, strict=False)},
            }
            for gene, chosen, row in zip(bound.space.genes, genome, probabilities, strict=True)
            if len(gene.formats) > 1
        ],
    }


def logit_optimizer(selection: BitSelection, lr: float) -> torch.optim.Adam:
    """Adam on the logits."""
    return torch.optim.Adam(selection.parameters(), lr=lr, betas=BETAS)
