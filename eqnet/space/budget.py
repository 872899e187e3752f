"""Budgets: hard upper limits on costs, and the repair that every searched config goes through.

EQ-Net section 3.5 searches by rejection, which need not end; here a genome over budget steps down until it fits.

Shape legend: `N` configs, `G` genes, `C` costs of a budget.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from eqnet.space.cost import COSTS, CostModel, Costs, CostTable, Floats
from eqnet.space.qconfig import MAX_BITS, Form, LayerInfo, QuantFormat
from eqnet.space.space import Genomes, QuantSpace
from eqnet.space.steps import Steps

MAX_TEXT = 200  # characters of a budget
MAX_ACT = "max_act"  # no sum over layers, but a limit on each: `Budget.restrict`
_UNITS: dict[str, dict[str, float]] = {  # in the unit of the cost; the empty suffix is a plain number
    "w": {"": 1},
    "a": {"": 1},
    "size": {"B": 1, "KB": 1e3, "KiB": 2**10, "MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": 2**30},
    "bitops": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"us": 1e-3, "ms": 1, "s": 1e3},
}
_UNITS[MAX_ACT] = _UNITS["size"]
_PLAIN: dict[str, float] = {"": 1}  # the units of other costs
_QUANTITY = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")
_EXAMPLE = "write for example '4', 'w=3,a=4', 'size=180KiB' or 'bitops=1.2G'"


def limit_text(name: str, value: float) -> str:
    """The shortest text of a limit that parses back to exactly `value`, e.g. 'size=180KiB'."""
    texts = []
    for suffix, factor in _UNITS.get(name, _PLAIN).items():
        number = f"{value / factor:.12g}"
        if float(number) * factor == value:
            texts.append(number + suffix)
        elif factor == 1:
            texts.append(repr(float(value)) + suffix)
    return f"{name}={min(texts, key=len)}"


def reachable_text(name: str, value: float) -> str:
    """`value` rounded up to three decimals of a fitting unit, so that copied into a budget it can be met."""
    units = _UNITS.get(name, _PLAIN)
    suffix, factor = next(((s, f) for s, f in reversed(units.items()) if f <= value), next(iter(units.items())))
    number = f"{math.ceil(value / factor * 1000) / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{name}={number}{suffix}"


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits on costs, without a space yet.

    Examples:
        >>> str(Budget.parse("4, size = 184320 B"))
        'w=4,a=4,size=180KiB'

    Attributes:
        limits: (name, value) pairs ordered as w, a (bits), size (bytes), bitops, latency (ms), max_act (bytes).
    """

    limits: tuple[tuple[str, float], ...]

    @staticmethod
    def parse(text: str) -> Budget:
        """Reads "4" (short for "w=4,a=4"), "w=3", "size=180KiB", "bitops=1.2G", or "latency=2.5ms", comma-joined.

        Units: size B, KB, MB, GB (powers of 1000), KiB, MiB, GiB (of 1024); bitops K, M, G, T or a plain number;
        latency us, ms, s; max_act as size.

        Raises:
            ValueError: anything else, a name given twice, or a limit that is not a positive finite number.
        """
        limits: dict[str, float] = {}

        def fail(problem: str) -> NoReturn:
            raise ValueError(f"budget {text!r}: {problem}; {_EXAMPLE}.")

        if len(text) > MAX_TEXT:
            raise ValueError(f"a budget has at most {MAX_TEXT} characters; got {len(text)}.")
        for part in text.split(","):
            name, equals, quantity = (s.strip() for s in part.partition("="))
            if not equals:
                name, quantity = "", name
            elif name not in _UNITS:
                close = difflib.get_close_matches(name.lower(), _UNITS, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}" if close else f"the limits are {', '.join(_UNITS)}"
                fail(f"unknown limit {name!r}, {hint}")
            units = _UNITS[name or "w"]
            match = _QUANTITY.fullmatch(quantity)
            if match is None:
                fail(f"{quantity!r} is not a number with a unit")
            factor = {s.lower(): f for s, f in units.items()}.get(match[2].lower())
            if factor is None:
                listed = ", ".join(s or "none" for s in units)
                fail(
                    f"{quantity!r} has {'the' if match[2] else 'no'} unit {match[2]}".rstrip()
                    + f" (possible: {listed})"
                )
            value = float(match[1]) * factor
            if not 0 < value < math.inf:
                fail(f"{quantity!r} is not a positive finite number")
            for key in (name,) if name else ("w", "a"):
                if key in limits:
                    fail(f"{key!r} is given twice")
                limits[key] = value
        return Budget(tuple((name, limits[name]) for name in _UNITS if name in limits))

    def __str__(self) -> str:
        return ",".join(limit_text(name, value) for name, value in self.limits)

    def restrict(
        self, space: QuantSpace, act_bits: Callable[[LayerInfo, QuantFormat], int] | None = None
    ) -> QuantSpace:
        """The subspace in which no quantized input of a layer exceeds the limit `max_act`; `space` itself without one.

        The largest input is no sum over layers, but a limit on it is one on every layer by itself: a restriction is exact. It is
        part of the peak of a runtime, whose schedule says what else lives at that time. Inputs in floating point are not counted.

        Args:
            space: the space to search.
            act_bits: bits that a format takes in memory, those of its container on a device; None means those of its codes.

        Raises:
            ValueError: naming the layer and the smallest limit that can be met.
        """
        limit = dict(self.limits).get(MAX_ACT)
        if limit is None:
            return space

        def size(layer: LayerInfo, fmt: QuantFormat) -> int:
            return -(-layer.act_numel * (fmt.bits if act_bits is None else act_bits(layer, fmt)) // (8 * layer.calls))

        called = [layer for layer in space.layers if space.choices(layer.name, "act")]
        least = {layer.name: min(size(layer, f) for f in space.choices(layer.name, "act")) for layer in called}
        worst = max(least, key=lambda name: least[name], default=None)
        if worst is not None and least[worst] > limit:
            raise ValueError(
                f"budget {limit_text(MAX_ACT, limit)} cannot be met: the smallest reachable is "
                f"{reachable_text(MAX_ACT, least[worst])}, the input of layer {worst!r}."
            )
        return space.restrict(lambda layer, slot, fmt: slot == "weight" or size(layer, fmt) <= limit)

    def bind(
        self,
        space: QuantSpace,
        band: float | None = None,
        costs: Costs = COSTS,
    ) -> BoundBudget:
        """The budget on one space.

        Args:
            space: the space to search.
            band: width of the half-open interval below a limit `c` on mean bits that repaired genomes should reach,
                `c - band < cost <= c` (0.5 in the paper); None asks for no lower bound. Other costs never have one.
            costs: what the names of limits mean; those of a hardware target come from `eqnet.space.target_cost`.

        Raises:
            ValueError: a limit that the space cannot reach (naming the smallest reachable value), no latency table, or a space
                with inputs above `max_act`.
        """
        if band is not None and not 0 < band < math.inf:
            raise ValueError(f"the band of a budget must be a positive number of bits; got {band}.")
        if self.restrict(space) != space:
            raise ValueError(
                f"budget {self}: the space has inputs above {MAX_ACT}; restrict it with Budget.restrict first."
            )
        models = []
        additive = [(name, limit) for name, limit in self.limits if name != MAX_ACT]
        additive = additive or [("w", float(MAX_BITS))]  # what every config keeps
        for name, limit in additive:
            if name not in costs:
                raise ValueError(f"budget {limit_text(name, limit)}: no {name} table is available for this space.")
            models.append(costs[name](space))
            if models[-1].minimum > limit:
                smallest = reachable_text(name, models[-1].minimum)
                raise ValueError(
                    f"budget {limit_text(name, limit)} cannot be met: the smallest reachable is {smallest}."
                )
        limits = np.array([limit for _, limit in additive])
        banded = np.array([band is not None and cost.unit == "bits" for cost in models])
        return BoundBudget(space, models, limits, np.where(banded, limits - (band or 0.0), -np.inf))


class BoundBudget:
    """Hard upper limits on the genomes of one space, with repair.

    Attributes:
        space: the space.
        costs: the limited costs.
        limits: upper limits, float64 [C].
        lowers: what costs should exceed, float64 [C]; -inf where there is no band. A wish, not part of `feasible`: it
            cannot be met above the largest config, or between two steps of one dominating layer.
    """

    def __init__(self, space: QuantSpace, costs: list[CostModel], limits: Floats, lowers: Floats) -> None:
        """Raises ValueError if no config was found within all limits together."""
        self.space, self.costs, self.limits, self.lowers = space, costs, limits, lowers
        self._table = CostTable(costs)
        self._steps = Steps(space, costs, limits)
        self._anchor = self._find_anchor()

    def values(self, genomes: Genomes) -> Floats:
        """All limited costs, float64 [N, C]."""
        return self._table(genomes)

    def feasible(self, genomes: Genomes) -> NDArray[np.bool_]:
        """Whether every cost is within its limit, bool [N]."""
        within: NDArray[np.bool_] = np.all(self.values(genomes) <= self.limits, axis=1)
        return within

    def violation(self, genomes: Genomes) -> Floats:
        """Sum over limits of the excess relative to the limit, float64 [N]; 0 exactly where feasible."""
        excess: Floats = np.sum(np.maximum(self.values(genomes) - self.limits, 0) / self.limits, axis=1)
        return excess

    def repair(self, genomes: Genomes, rng: np.random.Generator) -> Genomes:
        """Nearby genomes within all limits and, where possible, above `lowers`; int16 [N, G].

        Random genes of violating rows go down, then random genes of rows below a lower go up where all limits still
        hold, one bit-width at a time and in the form of the gene. Rows that need neither are returned as they are. Only
        a row that its form keeps out of the limits even at the fewest bits moves to the cheapest form.
        """
        cells = self._steps.cells_of(genomes)
        stuck = self._steps.lower(cells, rng)
        out = self._steps.genomes_of(cells)
        if stuck.size:
            moved = self._steps.cells_of(self._in_cheapest_form(genomes[stuck]))
            hopeless = stuck[self._steps.lower(moved, rng)]
            out[stuck] = self._steps.genomes_of(moved)
            out[hopeless] = self._anchor
        if (self.lowers == -np.inf).all():
            return out
        cells = self._steps.cells_of(out)
        self._steps.lift(cells, self.lowers, rng)
        return self._steps.genomes_of(cells)

    def fill(self, genomes: Genomes, rng: np.random.Generator) -> Genomes:
        """Spends what is left: random genes of feasible rows go up until no step fits the limits; int16 [N, G]."""
        cells = self._steps.cells_of(genomes)
        self._steps.fill(cells, rng)
        return self._steps.genomes_of(cells)

    def _in_cheapest_form(self, genomes: Genomes) -> Genomes:
        """Same bits in the form of the anchor where it has them, otherwise the formats of the anchor."""
        form = self.space.form_of(self._anchor[None])[0]
        moved: Genomes = self.space.in_form[form, np.arange(self.space.num_genes), genomes]
        return np.where((moved < 0) | (form < 0), self._anchor, moved)

    def _find_anchor(self) -> Genomes:
        """A genome [G] within all limits, in the form of the space that leaves most room (any mix if it has none).

        Every limit prices its cost, and for given prices the cheapest genome is exact: one limit needs one round.
        Limits that want different formats (4 bits only per channel, but no room for step sizes) raise the price of what
        is exceeded.
        """
        forms: tuple[Form | None, ...] = self.space.forms or (None,)
        allowed = [self.space.formats_in(form) for form in forms]
        prices = np.repeat(1 / self.limits[None], len(forms), 0)
        for exponent in 1 / np.sqrt(np.arange(1, 101)):
            genomes = np.stack([self._cheapest(p, mask) for p, mask in zip(prices, allowed, strict=True)])
            load = self.values(genomes) / self.limits
            order = np.argsort(load.max(1), kind="stable")
            within = order[self.feasible(genomes[order])]
            if within.size:
                anchor: Genomes = genomes[within[0]]
                return anchor
            prices *= load**exponent
        names = ",".join(limit_text(c.name, limit) for c, limit in zip(self.costs, self.limits, strict=True))
        close = ",".join(reachable_text(c.name, c(genomes[order[:1]])[0]) for c in self.costs)
        raise ValueError(
            f"budget {names} cannot be met: no config of one form keeps all limits together; closest is {close}."
        )

    def _cheapest(self, prices: Floats, allowed: NDArray[Any]) -> Genomes:
        """The genome [G] of the smallest sum of `prices * costs` among `allowed` formats [G, F]."""
        cells = self.costs[0].cells
        total = sum(price / cost.divisor * cost.table for price, cost in zip(prices, self.costs, strict=True))
        genome = np.zeros(self.space.num_genes, np.int16)
        for q, (start, count, width) in enumerate(zip(cells.offsets, cells.counts, cells.widths, strict=True)):
            w, a = cells.weight_gene[q], cells.act_gene[q]
            open_acts = allowed[a, :width] if cells.has_act[q] else np.ones(1, bool)
            open_cells = (allowed[w, : count // width, None] & open_acts).ravel()
            best = int(np.where(open_cells, total[start : start + count], np.inf).argmin())
            genome[w] = best // width
            if cells.has_act[q]:
                genome[a] = best % width
        return genome
