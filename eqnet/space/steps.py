"""Random walks by single steps of bit-widths, for many configs at once: down until limits hold, up until no step fits.

The working form of a config is the cell that each tied group of layers occupies in the cost tables (`cost.Cells`): what a
step changes in every cost is then one look-up. Every config visits its groups in an order of its own. On the way down
each group offers a step at once, so that costs are cumulative sums, and the shortest sufficient start of the order is
taken. On the way up the groups that have a step are visited in turn, again and again.

Shape legend: `N` configs, `n` some of them, `Q` tied groups, `P` groups of a config that have a step, `M` cells, `C` costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eqnet.space.cost import CostModel, Floats
from eqnet.space.space import Genomes, QuantSpace

Indices = NDArray[np.intp]
_VISITED = 32  # groups of a config in one order; most have fewer steps to take


class _Direction:
    """All steps one way; `s * M + cell` is the step of slot s (0 weight, 1 activation) from a cell.

    Attributes:
        target: the cell after the step, or the same cell if there is no step, [2 M].
        possible: whether there is a step, [2 M].
        changes: of the sum of table entries of each cost, C arrays [2 M].
    """

    def __init__(self, costs: Sequence[CostModel], steps: NDArray[np.int16]) -> None:
        """Tabulates `steps`, the next format of each gene and format or -1, [G, F]."""
        cells = costs[0].cells
        group, weight, act = cells.parts()
        here = np.arange(len(group))
        to_weight, to_act = steps[cells.weight_gene[group], weight], steps[cells.act_gene[group], act]
        by_weight = np.where(to_weight < 0, here, here + (to_weight - weight) * cells.widths[group])
        by_act = np.where((to_act < 0) | ~cells.has_act[group], here, here + to_act - act)
        self.target = np.concatenate([by_weight, by_act])
        self.possible = self.target != np.tile(here, 2)
        self.changes = [cost.table[self.target] - np.tile(cost.table, 2) for cost in costs]

    def lowering(self, c: int) -> tuple[Indices, Floats]:
        """For cost `c` the step of slot s from `s * M + cell` if it lowers the cost, else that of the other slot if it does.

        Returns:
            Target and change [2 M]; the same cell and 0 where neither step lowers the cost.
        """
        own, size = self.changes[c], len(self.target) // 2
        other = np.roll(own, size)
        target = np.where(own < 0, self.target, np.roll(self.target, size))
        here = np.tile(np.arange(size), 2)
        return np.where((own < 0) | (other < 0), target, here), np.minimum(np.where(own < 0, own, other), 0)


class Steps:
    """Walks within limits on costs. `lower`, `lift` and `fill` change cells [N, Q] in place."""

    def __init__(self, space: QuantSpace, costs: Sequence[CostModel], limits: Floats) -> None:
        """Tabulates the steps of `space` and what they change in `costs`, which should stay within `limits` [C]."""
        self._costs, self._cells = tuple(costs), costs[0].cells
        self._tables = np.stack([cost.table for cost in costs])  # [C, M]
        self._limits = np.array([_largest_sum(cost, limit) for cost, limit in zip(costs, limits, strict=True)])
        up, down = _Direction(costs, space.step_up), _Direction(costs, space.step_down)
        self._monotonic = all((change >= 0).all() for change in up.changes)
        self._up_target = up.target
        self._up_changes = np.where(up.possible, up.changes, math.inf)  # [C, 2 M]; no step never fits
        self._down = [down.lowering(c) for c in range(len(costs))]
        group, weight, act = self._cells.parts()
        self._size = np.intp(len(group))
        self._formats = np.concatenate([weight, act]).astype(np.int16)
        self._group = np.zeros(space.num_genes, np.intp)  # the group of each gene
        self._group[self._cells.act_gene] = self._group[self._cells.weight_gene] = np.arange(len(self._cells.counts))
        self._slot = np.where(space.is_weight, 0, self._size)

    def cells_of(self, genomes: Genomes) -> Indices:
        """Cells [N, Q] of genomes [N, G]."""
        return np.ascontiguousarray(self._cells.index(genomes).T)

    def genomes_of(self, cells: Indices) -> Genomes:
        """Genomes int16 [N, G] of cells [N, Q]."""
        index = cells.take(self._group, axis=1)
        index += self._slot
        return self._formats.take(index)

    def lower(self, cells: Indices, rng: np.random.Generator) -> Indices:
        """Takes random steps down that lower an exceeded cost, until all limits hold or no such step is left.

        Returns:
            The rows that still exceed a limit.
        """
        rows, stuck = np.arange(len(cells)), []
        while rows.size:
            exceeds, stepped = np.zeros((2, len(rows)), bool)
            for c, limit in enumerate(self._limits):
                over = (self._tables[c].take(cells[rows]).sum(1) > limit).nonzero()[0]
                if over.size:
                    exceeds[over] = True
                    stepped[over] |= self._round_down(cells, rows[over], c, rng)
            stuck.append(rows[exceeds & ~stepped])
            rows = rows[stepped]
        return np.concatenate(stuck) if stuck else rows

    def lift(self, cells: Indices, lowers: Floats, rng: np.random.Generator) -> None:
        """Takes random steps up that fit all limits, until each cost exceeds its lower [C] or no such step is left."""
        for c, cost in enumerate(self._costs):
            if lowers[c] > -math.inf:
                self._climb(cells, rng, (c, _largest_sum(cost, lowers[c])))

    def fill(self, cells: Indices, rng: np.random.Generator) -> None:
        """Takes random steps up until none fits the limits."""
        self._climb(cells, rng, None)

    def _round_down(self, cells: Indices, rows: Indices, c: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Steps that lower cost `c`, as many as its limit asks for; returns which rows had any, [n]."""
        part = cells[rows]
        target, change = self._down[c]
        random = rng.integers(2**32, size=part.shape, dtype=np.uint32)
        index = part + (random & 1) * self._size
        lowered = change.take(index)
        helps = np.less(lowered, 0)
        order = _ordered(random, helps)
        enough = self._tables[c].take(part).sum(1)[:, None] + lowered.take(order).cumsum(1) <= self._limits[c]
        enough[:, -1] = True
        taken = order[np.arange(order.shape[1]) <= enough.argmax(1)[:, None]]
        part.put(taken, target.take(index.take(taken)))
        cells[rows] = part
        moved: NDArray[np.bool_] = np.any(helps, axis=1)
        return moved

    def _climb(self, cells: Indices, rng: np.random.Generator, goal: tuple[int, float] | None) -> None:
        """Steps up in random order, each if it fits and, with a goal (a cost and what it should exceed), if it is needed."""
        rows = np.arange(len(cells))
        while rows.size:
            part = cells[rows]
            sums: Floats = self._tables.take(part, axis=1).sum(2)
            room = self._limits[:, None] - sums  # [C, n]
            missing = None if goal is None else (goal[0], goal[1] - sums[goal[0]])
            open_ = np.logical_or(*self._fits(part.T, room, missing)).T
            order = np.ascontiguousarray(_ordered(rng.integers(2**32, size=part.shape, dtype=np.uint32), open_).T)
            here = part.take(order)
            while self._pass(here, room, missing, rng):
                pass
            left_out = open_.sum(1) > len(order)
            if not self._monotonic:
                left_out |= (here != part.take(order)).any(0)  # a step may have made room for others
            part.put(order, here)
            cells[rows] = part
            rows = rows[left_out]

    def _fits(self, cells: Indices, room: Floats, missing: tuple[int, Floats] | None) -> NDArray[np.bool_]:
        """Whether a step up of the weight, and of the activation, fits alone and is needed, [2, P, n]."""
        changes = self._up_changes.take(np.stack([cells, cells + self._size]), axis=1)  # [C, 2, P, n]
        fits: NDArray[np.bool_] = np.all(changes <= room[:, None, None], axis=0)
        if missing is not None:
            np.logical_and(fits, (changes[missing[0]] > 0) & (missing[1] >= 0), out=fits)
        return fits

    def _pass(self, cells: Indices, room: Floats, missing: tuple[int, Floats] | None, rng: np.random.Generator) -> bool:
        """Goes through the cells once and takes every step that still fits.

        Args:
            cells: [P, n], changed in place.
            room: what is left below each limit, [C, n], changed in place.
            missing: a cost, and what it lacks [n], changed in place; no steps where it is exceeded.
            rng: chooses between the steps of a weight and its activation.

        Returns:
            Whether there was any step.
        """
        weight, act = self._fits(cells, room, missing)
        open_ = weight | act
        some = open_.any(1).nonzero()[0]
        act &= ~weight | rng.integers(2, size=act.shape, dtype=bool)
        index = cells + act * self._size
        changes = np.where(open_, self._up_changes.take(index, axis=1), math.inf)
        for p in some.tolist():
            change = changes[:, p]
            ok = np.logical_and.reduce(change <= room)
            if missing is not None:
                ok &= missing[1] >= 0
            open_[p] = ok
            change = np.where(ok, change, 0)
            room -= change
            if missing is not None:
                missing[1][:] -= change[missing[0]]
        np.copyto(cells, self._up_target.take(index), where=open_)
        return len(some) > 0


def _ordered(random: NDArray[np.uint32], first: NDArray[np.bool_]) -> Indices:
    """The groups of each row in random order, those of `first` [n, Q] first: flat indices [n, P], P <= _VISITED."""
    groups = random.shape[1]
    columns = np.uint32(2 ** groups.bit_length() - 1)  # the lowest bits of a key name its column
    keys = (random >> np.uint32(1)) & ~columns
    keys |= np.arange(groups, dtype=np.uint32)
    keys |= (~first).astype(np.uint32) << np.uint32(31)
    keys.sort(1)
    longest = min(max(int(first.sum(1).max()), 1), _VISITED)
    order: Indices = (keys[:, :longest] & columns).astype(np.intp)
    order += np.arange(len(order))[:, None] * groups
    return order


def _largest_sum(cost: CostModel, limit: float) -> float:
    """The largest sum of table entries whose cost is within `limit`; exact where all entries are whole numbers."""
    total = float(limit) * cost.divisor - cost.constant
    if not math.isfinite(total):
        return total
    if not (float(cost.constant).is_integer() and (cost.table % 1 == 0).all()):
        return total - 1e-12 * abs(total)  # sums round differently in another order
    total = math.floor(total) + 1.0
    while (total + cost.constant) / cost.divisor > limit:
        total -= 1
    return total
