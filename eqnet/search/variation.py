"""New configs from old ones, within a budget: the first population, mutants and crossovers (EQ-Net section 3.5).

Works on whole arrays of genomes. Every config has one form, an index into `Variation.forms`. Only few genes of a mutant
change and most partners share their form, so what is rare is done on the few entries it concerns.

Shape legend: `N` configs, `G` genes, `F` formats of the longest gene, `K` forms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eqnet.space.budget import BoundBudget
from eqnet.space.cost import Floats
from eqnet.space.qconfig import Form
from eqnet.space.sampling import MeanBitsSampler
from eqnet.space.space import Genomes, QuantSpace

Forms = NDArray[np.intp]
_EXCHANGES = 1024  # pairs of steps that are looked at together
_START_BAND = 0.5  # the first population starts with mean bits at most this much below their limits, as in the paper


class Variation:
    """Makes configs within a budget: the first ones, mutants and crossovers. A form is an index into `forms`."""

    def __init__(
        self, space: QuantSpace, forms: Sequence[Form] | None, budget: BoundBudget | None, rng: np.random.Generator
    ) -> None:
        """Tabulates formats by form. Raises ValueError if no form can meet the budget."""
        if budget is not None and budget.space != space:
            raise ValueError("the budget is bound to another space than the one to search; bind it to this space.")
        if forms is not None and not forms:
            raise ValueError("no form to search; name at least one, or None for all forms of the space.")
        self.space, self.budget, self.rng = space, budget, rng
        # Where layers share no form there is nothing to keep, and all formats count as one form.
        candidates: Sequence[Form | None] = tuple(dict.fromkeys(space.forms if forms is None else forms)) or (None,)
        self.forms = [form for form in candidates if form is None or self._can_meet_budget(form)]
        if not self.forms:
            names = ", ".join(form.name for form in candidates if form is not None)
            raise ValueError(f"none of the forms {names} can meet the budget; raise it or allow more forms.")
        self.allowed = np.stack([space.formats_in(form) for form in self.forms])  # [K, G, F]
        self._counts = self.allowed.sum(2).ravel()  # flat tables: indexed by form * G + gene, then * F + format
        self._formats = np.argsort(~self.allowed, axis=2, kind="stable").astype(np.int16).ravel()  # allowed ones first
        bits = space.bits.astype(int)
        distance = np.abs(bits[:, :, None] - bits[:, None, :])
        diagonal = np.arange(bits.shape[1])
        distance[:, diagonal, diagonal] = -1  # a format that is allowed stays
        nearest = np.where(self.allowed[:, :, None, :], distance, 99).argmin(3)  # [K, G, F]
        self._nearest = nearest.astype(np.int16).ravel()
        here = np.arange(bits.shape[1], dtype=np.int16)
        steps = np.stack([space.step_down, space.step_up])  # [2, G, F]
        self._steps = np.where(steps < 0, here, steps).ravel()
        self._columns = np.arange(space.num_genes)

    def _can_meet_budget(self, form: Form) -> bool:
        """Whether the fewest bits of a form do; all costs grow with bits."""
        bits = np.where(self.space.formats_in(form), self.space.bits, 99)
        return self.budget is None or bool(self.budget.feasible(bits.argmin(1)[None].astype(np.int16))[0])

    def _uniform(self) -> tuple[Genomes, Forms]:
        """All genes as near as possible to 2, ..., 8 bits, in each form."""
        levels = np.unique(self.space.bits[self.space.bits > 0]).astype(int)
        distance = np.abs(self.space.bits - levels[:, None, None, None])  # [levels, 1, G, F]
        genomes = np.where(self.allowed, distance, 99).argmin(3).astype(np.int16)  # [levels, K, G]
        forms = np.broadcast_to(np.arange(len(self.forms)), genomes.shape[:2])
        return genomes.reshape(-1, self.space.num_genes), forms.ravel()

    def start(self, count: int, initial: Genomes | None) -> tuple[Genomes, Forms]:
        """`initial`, uniform bits and `count` configs around the limits on mean bits (elsewhere: all mean bits)."""
        parts = [self._uniform()]
        if initial is not None:
            parts.insert(0, (np.asarray(initial, np.int16), self._forms_of(initial)))
        sampler = MeanBitsSampler(self.space)
        drawn = self.rng.integers(len(self.forms), size=count)
        for k, form in enumerate(self.forms):
            forms = drawn[drawn == k]
            targets = {slot: self._targets(name, k, len(forms)) for slot, name in (("weight", "w"), ("act", "a"))}
            genomes = sampler.sample(
                self.rng, len(forms), targets["weight"], targets["act"], None if form is None else [form]
            )
            parts.append((genomes, forms))
        genomes = self._repaired(np.concatenate([genomes for genomes, _ in parts]))
        _, first = np.unique(genomes, axis=0, return_index=True)
        first.sort()
        return genomes[first], np.concatenate([forms for _, forms in parts])[first]

    def _targets(self, name: str, form: int, count: int) -> Floats | None:
        """Mean bits just below the limit called `name` and within reach of a form [count], None without a limit."""
        costs = {} if self.budget is None else {cost.name: i for i, cost in enumerate(self.budget.costs)}
        if self.budget is None or name not in costs:
            return None
        cost, limit = self.budget.costs[costs[name]], self.budget.limits[costs[name]]
        bits = self.space.bits
        smallest = np.where(self.allowed[form], bits, 99).argmin(1)
        largest = np.where(self.allowed[form], bits, -1).argmax(1)
        low, high = cost(np.stack([smallest, largest]).astype(np.int16))
        targets: Floats = np.clip(limit - _START_BAND * self.rng.random(count), low, high)
        return targets

    def _forms_of(self, genomes: Genomes) -> Forms:
        """The form of each genome [N]; ValueError if it has none of those searched."""
        if genomes.ndim != 2 or genomes.shape[1] != self.space.num_genes:
            raise ValueError(f"initial has shape {genomes.shape}; expected [N, {self.space.num_genes}].")
        if ((genomes < 0) | (genomes >= self.space.num_formats)).any():
            raise ValueError("initial has genes outside the space; encode its configs with this space.")
        fits = self.allowed[:, self._columns, genomes].all(2)  # [K, N]
        if not fits.any(0).all():
            raise ValueError(
                f"initial config {int(fits.any(0).argmin())} has none of the forms that are searched (one form for all layers)."
            )
        which: Forms = fits.argmax(0)
        return which

    def children(
        self, genomes: Genomes, forms: Forms, parents: Forms, partners: Forms, probability: float
    ) -> tuple[Genomes, Forms]:
        """One child of each parent, within the budget.

        The last parents cross with the partners, one with one; the parents before them have mutants.

        Args:
            genomes: configs to choose from, [N, G].
            forms: of `genomes`, [N].
            parents: rows of `genomes`.
            partners: rows of `genomes`, at most as many.
            probability: see `genetic_search`.

        Returns:
            Genomes and forms of the children.
        """
        mutants, crossed = np.split(parents, [len(parents) - len(partners)])
        mutated, mutated_forms = self._mutants(genomes[mutants], forms[mutants], probability)
        crossovers = self._crossovers(genomes[crossed], forms[crossed], genomes[partners], forms[partners])
        children = np.concatenate([mutated, crossovers])
        return self._repaired(children), np.concatenate([mutated_forms, forms[crossed]])

    def in_every_form(self, genome: Genomes) -> tuple[Genomes, Forms]:
        """A config [G] taken to the nearest bits of each form, within the budget: [K, G] and [K]."""
        forms = np.arange(len(self.forms))
        return self._repaired(self._in_form(np.repeat(genome[None], len(forms), axis=0), forms)), forms

    def exchanges(self, genome: Genomes) -> Genomes:
        """Configs within the budget [N, G] that take one step of bits up from `genome` [G], one down, or both.

        Of the pairs at most `_EXCHANGES`, drawn at random.
        """
        down, up = self._steps.reshape(2, self.space.num_genes, -1)[:, self._columns, genome]
        risen, fallen = (np.append(np.flatnonzero(to != genome), -1) for to in (up, down))  # -1: none
        first, second = (index.ravel() for index in np.meshgrid(risen, fallen))
        kept = np.flatnonzero(first != second)
        if len(kept) > _EXCHANGES:
            kept = self.rng.choice(kept, _EXCHANGES, replace=False)
        changed = np.repeat(genome[None], len(kept), axis=0)
        for index, to in ((first[kept], up), (second[kept], down)):
            row = np.flatnonzero(index >= 0)
            changed[row, index[row]] = to[index[row]]
        return changed if self.budget is None else changed[self.budget.feasible(changed)]

    def _mutants(self, genomes: Genomes, forms: Forms, probability: float) -> tuple[Genomes, Forms]:
        """Some rows take another form; then some genes change, in half of the rows to a random format, else by one step.

        Not yet within the budget.
        """
        n, genes = genomes.shape
        width = self.space.bits.shape[1]
        moved = np.flatnonzero(self.rng.random(n) < probability)
        forms, genomes = forms.copy(), genomes.copy()
        forms[moved] = self.rng.integers(len(self.forms), size=len(moved))
        genomes[moved] = self._in_form(genomes[moved], forms[moved])
        lowest = min(1 / genes, probability)
        rates = lowest * (probability / lowest) ** self.rng.random((n, 1))
        at = np.flatnonzero(self.rng.random((n, genes), dtype=np.float32) < rates)
        row, gene = np.divmod(at, genes)
        entry = forms[row] * genes + gene
        choice = (self.rng.random(len(at)) * self._counts.take(entry)).astype(np.intp)
        drawn = self._formats.take(entry * width + choice)
        direction = self.rng.integers(2, size=len(at))
        stepped = self._steps.take((direction * genes + gene) * width + genomes.take(at))
        anywhere: NDArray[np.bool_] = np.less(self.rng.random(n), 0.5)
        genomes.put(at, np.where(anywhere[row], drawn, stepped))
        return genomes, forms

    def _crossovers(self, genomes: Genomes, forms: Forms, others: Genomes, other_forms: Forms) -> Genomes:
        """Each gene from either parent, in the form of the first. Not yet within the budget."""
        differs = np.flatnonzero(forms != other_forms)
        if differs.size:
            others = others.copy()
            others[differs] = self._in_form(others[differs], forms[differs])
        return np.where(self.rng.integers(2, size=genomes.shape, dtype=bool), genomes, others)

    def _in_form(self, genomes: Genomes, forms: Forms) -> Genomes:
        """The allowed format of the nearest bits for every gene."""
        entry = forms[:, None] * len(self._columns) + self._columns
        near: Genomes = self._nearest.take(entry * self.space.bits.shape[1] + genomes)
        return near

    def _repaired(self, genomes: Genomes) -> Genomes:
        """Within the budget. Forms stay: each of `forms` reaches every limit, and repair keeps a form where it can."""
        return genomes if self.budget is None else self.budget.repair(genomes, self.rng)
