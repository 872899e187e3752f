"""The elastic quantization space: which formats every quantizer may take (EQ-Net section 3.1, Table 1).

A space is data. Every tied group of layers has one weight gene and (if its inputs are quantized) one activation gene; a
gene is an index into the formats allowed there. Largest, smallest, uniform, random, neighbours and "first and last layer
at 8 bit" all fall out of that one table. Populations are int16 arrays, so everything is vectorised.

Shape legend: `N` configs, `G` genes, `F` formats of the longest gene, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eqnet.space.qconfig import (
    ALL_FORMS,
    MAX_BITS,
    Form,
    Granularity,
    LayerConfig,
    LayerInfo,
    QuantConfig,
    QuantFormat,
)

Genomes = NDArray[np.int16]
Slot = Literal["weight", "act"]
Fixed = Literal["first_last_8bit", "none"] | Mapping[str, LayerConfig]


@dataclass(frozen=True, slots=True)
class Gene:
    """One decision: the format of one slot of a tied group of layers."""

    slot: Slot
    layers: tuple[str, ...]
    formats: tuple[QuantFormat, ...]


class QuantSpace:
    """All configs a network can take.

    Attributes:
        layers: facts about each layer, in execution order.
        genes: the decisions, weight gene before activation gene of each group.
        fixed: names of the layers whose bit-widths are pinned; excluded from mean bits and from features.
        float_numel: parameters and statistics outside quantized weights (biases, BN, embeddings), stored in float32.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        weight_choices: Mapping[str, Sequence[QuantFormat]],
        act_choices: Mapping[str, Sequence[QuantFormat]],
        *,
        fixed: Iterable[str] = (),
        ties: Sequence[Sequence[str]] = (),
        float_numel: int = 0,
    ) -> None:
        self.layers = tuple(layers)
        self.fixed = frozenset(fixed)
        self.ties = tuple(tuple(t) for t in ties)
        self.float_numel = int(float_numel)
        self._info = {layer.name: layer for layer in self.layers}
        if len(self._info) != len(self.layers):
            raise ValueError("two layers share one name.")
        self.groups = self._tied_groups()
        genes: list[Gene] = []
        self.gene_of: dict[tuple[str, Slot], int] = {}
        for group in self.groups:
            slots: tuple[tuple[Slot, Mapping[str, Sequence[QuantFormat]]], ...] = (
                ("weight", weight_choices),
                ("act", act_choices),
            )
            for slot, choices in slots:
                members = [name for name in group if slot == "weight" or self._info[name].calls > 0]
                if not members:
                    continue
                formats = tuple(f for f in choices[members[0]] if all(f in choices[m] for m in members))
                if not formats:
                    names = ", ".join(members)
                    raise ValueError(f"layer {names!r} has no {slot} format left; allow at least one.")
                for name in members:
                    self.gene_of[name, slot] = len(genes)
                genes.append(Gene(slot, tuple(members), formats))
        self.genes = tuple(genes)
        self._tabulate()

    @staticmethod
    def from_layers(
        layers: Sequence[LayerInfo],
        bits: Iterable[int] = range(2, 9),
        act_bits: Iterable[int] | None = None,
        symmetric: Iterable[bool] = (True, False),
        granularity: Iterable[Granularity] = ("tensor", "channel"),
        fixed: Fixed = "first_last_8bit",
        ties: Sequence[Sequence[str]] = (),
        float_numel: int = 0,
    ) -> QuantSpace:
        """Builds the product space.

        Args:
            layers: from `eqnet.nn.trace_layers`.
            bits: weight bit-widths of the elastic layers.
            act_bits: activation bit-widths; None means the same as `bits`.
            symmetric: symmetries, for weights and activations.
            granularity: weight granularities (activations are always per tensor).
            fixed: "first_last_8bit" pins the bits of the first and last layer to 8 (their form stays elastic, as in the
                paper); a mapping pins layers to one exact `LayerConfig`; "none" pins nothing.
            ties: groups of layer names that share their formats.
            float_numel: see the class.

        Raises:
            ValueError: empty choices, bits outside 2-8, unknown layer names.
        """
        weight_bits = sorted(set(bits))
        input_bits = weight_bits if act_bits is None else sorted(set(act_bits))
        symmetric, granularity = list(dict.fromkeys(symmetric)), list(dict.fromkeys(granularity))
        for name, value in {
            "bits": weight_bits,
            "act_bits": input_bits,
            "symmetric": symmetric,
            "granularity": granularity,
        }.items():
            if not value:
                raise ValueError(f"space.{name} is empty; give at least one choice.")
        if not layers:
            raise ValueError("the model has no quantizable layer (Conv1d, Conv2d, ConvTranspose2d, Linear).")

        def weight_formats(bit_list: Sequence[int]) -> list[QuantFormat]:
            return [QuantFormat(b, s, g) for g in granularity for s in symmetric for b in bit_list]

        def act_formats(bit_list: Sequence[int]) -> list[QuantFormat]:
            return [QuantFormat(b, s, "tensor") for s in symmetric for b in bit_list]

        weights = {layer.name: weight_formats(weight_bits) for layer in layers}
        acts = {layer.name: act_formats(input_bits) for layer in layers}
        pinned: set[str] = set()
        if isinstance(fixed, Mapping):
            for name, config in fixed.items():
                if name not in weights:
                    raise ValueError(f"space.fixed names {name!r}, which is not a layer of the model.")
                weights[name] = [config.weight]
                acts[name] = [] if config.act is None else [config.act]
                pinned.add(name)
        elif fixed == "first_last_8bit":
            called = [layer.name for layer in layers if layer.calls > 0] or [layer.name for layer in layers]
            for name in {called[0], called[-1]}:
                weights[name], acts[name] = weight_formats([8]), act_formats([8])
                pinned.add(name)
        elif fixed != "none":
            raise ValueError(f"space.fixed must be 'first_last_8bit', 'none' or a mapping; got {fixed!r}.")
        return QuantSpace(layers, weights, acts, fixed=pinned, ties=ties, float_numel=float_numel)

    def _tied_groups(self) -> tuple[tuple[str, ...], ...]:
        group_of: dict[str, tuple[str, ...]] = {name: (name,) for name in self._info}
        for tie in self.ties:
            for name in tie:
                if name not in self._info:
                    raise ValueError(f"space.ties names {name!r}, which is not a layer of the model.")
            merged = tuple(n for n in self._info if any(n in group_of[t] for t in tie))
            for name in merged:
                group_of[name] = merged
        return tuple(dict.fromkeys(group_of[name] for name in self._info))

    def _tabulate(self) -> None:
        """Padded [G, F] tables behind every vectorised operation."""
        width = max(len(gene.formats) for gene in self.genes)
        shape = (len(self.genes), width)
        self.num_formats = np.array([len(gene.formats) for gene in self.genes])
        self.is_weight = np.array([gene.slot == "weight" for gene in self.genes])
        self.elastic = np.array([not set(gene.layers) <= self.fixed for gene in self.genes])
        self.bits = np.zeros(shape, np.int16)  # bits of each format, 0 where padded
        self.symmetric = np.zeros(shape, bool)
        self.per_channel = np.zeros(shape, bool)
        self.step_down = np.full(shape, -1, np.int16)  # index of the same form at the next lower bits, -1 if none
        self.step_up = np.full(shape, -1, np.int16)
        self.in_form = np.full((len(ALL_FORMS), *shape), -1, np.int16)  # same bits in another form, -1 if absent
        for g, gene in enumerate(self.genes):
            index = {f: i for i, f in enumerate(gene.formats)}
            for i, fmt in enumerate(gene.formats):
                self.bits[g, i], self.symmetric[g, i] = fmt.bits, fmt.symmetric
                self.per_channel[g, i] = fmt.granularity == "channel"
                same_form = [
                    f for f in gene.formats if (f.symmetric, f.granularity) == (fmt.symmetric, fmt.granularity)
                ]
                lower = [f for f in same_form if f.bits < fmt.bits]
                upper = [f for f in same_form if f.bits > fmt.bits]
                if lower:
                    self.step_down[g, i] = index[max(lower, key=lambda f: f.bits)]
                if upper:
                    self.step_up[g, i] = index[min(upper, key=lambda f: f.bits)]
                for k, form in enumerate(ALL_FORMS):
                    wanted = form.weight_format(fmt.bits) if gene.slot == "weight" else form.act_format(fmt.bits)
                    self.in_form[k, g, i] = index.get(wanted, -1)
        has_form = [
            all((self.in_form[k, g, : len(gene.formats)] >= 0).any() for g, gene in enumerate(self.genes))
            for k in range(len(ALL_FORMS))
        ]
        self.forms: tuple[Form, ...] = tuple(form for form, ok in zip(ALL_FORMS, has_form, strict=True) if ok)

    # -- configs and genomes ------------------------------------------------------------------------------------------

    @property
    def num_genes(self) -> int:
        """G."""
        return len(self.genes)

    def info(self, name: str) -> LayerInfo:
        """Facts about a layer by name."""
        return self._info[name]

    def choices(self, name: str, slot: Slot) -> tuple[QuantFormat, ...]:
        """Formats a quantizer may take; empty for inputs that stay in floating point."""
        gene = self.gene_of.get((name, slot))
        return () if gene is None else self.genes[gene].formats

    def check(self, config: QuantConfig) -> None:
        """Raises ValueError unless `config` is a point of this space; the message names the layer and the choices."""
        missing, foreign = sorted(set(self._info) - set(config)), sorted(set(config) - set(self._info))
        if missing or foreign:
            parts = [f"misses {', '.join(missing)}"] * bool(missing) + [f"has foreign {', '.join(foreign)}"] * bool(
                foreign
            )
            raise ValueError(f"the config does not fit the model: it {' and '.join(parts)}.")
        for name, layer in config.items():
            for slot, fmt in (("weight", layer.weight), ("act", layer.act)):
                allowed = self.choices(name, slot)  # type: ignore[arg-type]
                if (fmt is None and allowed) or (fmt is not None and fmt not in allowed):
                    got = (
                        "floating point"
                        if fmt is None
                        else f"{fmt.bits} bits, symmetric={fmt.symmetric}, {fmt.granularity}"
                    )
                    bits = sorted({f.bits for f in allowed})
                    raise ValueError(f"layer {name!r}: {slot} format ({got}) is not in the space (bits {bits}).")
        for gene in self.genes:
            if len({(c.weight if gene.slot == "weight" else c.act) for c in map(config.__getitem__, gene.layers)}) > 1:
                raise ValueError(f"layers {', '.join(gene.layers)} are tied but have different {gene.slot} formats.")

    def encode(self, config: QuantConfig) -> Genomes:
        """Config -> genome int16 [G]. Raises ValueError if the config is not in the space."""
        self.check(config)
        return np.array([gene.formats.index(self._slot(config, gene)) for gene in self.genes], np.int16)

    def encode_all(self, configs: Iterable[QuantConfig]) -> Genomes:
        """Configs -> genomes int16 [N, G]."""
        rows = [self.encode(c) for c in configs]
        return np.stack(rows) if rows else np.zeros((0, self.num_genes), np.int16)

    @staticmethod
    def _slot(config: QuantConfig, gene: Gene) -> QuantFormat:
        layer = config[gene.layers[0]]
        fmt = layer.weight if gene.slot == "weight" else layer.act
        assert fmt is not None
        return fmt

    def decode(self, genome: NDArray[Any]) -> QuantConfig:
        """Genome [G] -> config."""
        layers = {}
        for name in self._info:
            w, a = self.gene_of[name, "weight"], self.gene_of.get((name, "act"))
            act = None if a is None else self.genes[a].formats[int(genome[a])]
            layers[name] = LayerConfig(self.genes[w].formats[int(genome[w])], act)
        return QuantConfig(layers)

    def translation(self, source: QuantSpace) -> NDArray[np.int16]:
        """Index here of each format of each gene of `source` (a restriction of this space), [G, F of source]; -1 padded."""
        assert [g.layers for g in source.genes] == [g.layers for g in self.genes], "spaces of different models"
        table = np.full(source.bits.shape, -1, np.int16)
        for row, theirs, ours in zip(table, source.genes, self.genes, strict=True):
            row[: len(theirs.formats)] = [ours.formats.index(fmt) for fmt in theirs.formats]
        return table

    def translate(self, genomes: Genomes, source: QuantSpace) -> Genomes:
        """Genomes of `source` (a restriction of this space) -> genomes of this space, [N, G]."""
        out: Genomes = self.translation(source)[np.arange(self.num_genes), genomes]
        return out

    def restrict(self, allow: Callable[[LayerInfo, Slot, QuantFormat], bool]) -> QuantSpace:
        """The subspace of formats for which `allow(layer, slot, format)` holds. Raises ValueError naming an emptied layer."""

        def keep(slot: Slot) -> dict[str, list[QuantFormat]]:
            return {n: [f for f in self.choices(n, slot) if allow(self._info[n], slot, f)] for n in self._info}

        return QuantSpace(
            self.layers, keep("weight"), keep("act"), fixed=self.fixed, ties=self.ties, float_numel=self.float_numel
        )

    def restrict_form(self, form: Form) -> QuantSpace:
        """The subspace in which every layer has `form`. Raises ValueError if some layer cannot."""

        def allow(layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> bool:
            return fmt == (form.weight_format(fmt.bits) if slot == "weight" else form.act_format(fmt.bits))

        return self.restrict(allow)

    # -- points of the space ------------------------------------------------------------------------------------------

    def random_genomes(self, rng: np.random.Generator, n: int) -> Genomes:
        """Every gene uniform over its formats (forms per layer), int16 [n, G]."""
        genomes: Genomes = (rng.random((n, self.num_genes)) * self.num_formats).astype(np.int16)
        return genomes

    def sample(self, rng: np.random.Generator) -> QuantConfig:
        """One config, every quantizer drawn uniformly and independently."""
        return self.decode(self.random_genomes(rng, 1)[0])

    def extreme_genomes(self, rng: np.random.Generator, n: int, which: Literal["largest", "smallest"]) -> Genomes:
        """Every gene at its highest or lowest bit-width, with a random form per gene, int16 [n, G]."""
        valid = np.arange(self.bits.shape[1]) < self.num_formats[:, None]
        bits = np.where(valid, self.bits, 0 if which == "largest" else 99)
        best = bits.max(1) if which == "largest" else bits.min(1)
        candidates = valid & (self.bits == best[:, None])  # [G, F]
        keys = np.where(candidates, rng.random((n, *candidates.shape)), -1.0)
        genomes: Genomes = keys.argmax(-1).astype(np.int16)
        return genomes

    def impose_form(self, genomes: Genomes, forms: NDArray[Any]) -> Genomes:
        """Same bits, another form: row i takes `ALL_FORMS[forms[i]]`. Raises ValueError where a gene lacks it."""
        out: Genomes = self.in_form[np.asarray(forms)[:, None], np.arange(self.num_genes), genomes]
        if (out < 0).any():
            row, gene = np.argwhere(out < 0)[0]
            raise ValueError(
                f"layer {self.genes[gene].layers[0]!r} cannot take the form {ALL_FORMS[int(forms[row])].name}."
            )
        return out

    def formats_in(self, form: Form | None) -> NDArray[np.bool_]:
        """Which formats of each gene belong to `form` (None: to any form), bool [G, F]; padding is False.

        Raises:
            ValueError: naming the layer that has no format of that form.
        """
        index = np.arange(self.bits.shape[1])
        if form is None:
            return index < self.num_formats[:, None]
        allowed: NDArray[np.bool_] = self.in_form[ALL_FORMS.index(form)] == index
        if not allowed.any(1).all():
            gene = self.genes[int(allowed.any(1).argmin())]
            raise ValueError(f"layer {gene.layers[0]!r} has no {gene.slot} format of the form {form.name}.")
        return allowed

    def form_name(self, config: QuantConfig) -> str:
        """Name of the form all layers of a config share, "mixed" if they differ."""
        index = int(self.form_of(self.encode_all([config]))[0])
        return "mixed" if index < 0 else ALL_FORMS[index].name

    def form_of(self, genomes: Genomes) -> NDArray[np.int64]:
        """Index into `ALL_FORMS` of the form each whole genome has, -1 if its layers differ, [N]."""
        columns = np.arange(self.num_genes)
        match = np.stack([(self.in_form[k, columns, genomes] == genomes).all(1) for k in range(len(ALL_FORMS))], 1)
        return np.where(match.any(1), match.argmax(1), -1)

    def _extreme(self, which: Literal["largest", "smallest"], form: Form | None) -> QuantConfig:
        if form is None:
            form = self.forms[0] if self.forms else None  # no common form: every gene keeps one of its own
        allowed = self.formats_in(form)
        bits = np.where(allowed, self.bits, -1 if which == "largest" else MAX_BITS + 1)
        return self.decode(bits.argmax(1) if which == "largest" else bits.argmin(1))

    def largest(self, form: Form | None = None) -> QuantConfig:
        """All quantizers at their highest bit-width in one form (default: the first form of the space)."""
        return self._extreme("largest", form)

    def smallest(self, form: Form | None = None) -> QuantConfig:
        """All quantizers at their lowest bit-width in one form (default: the first form of the space)."""
        return self._extreme("smallest", form)

    def uniform(self, bits: int, form: Form, act_bits: int | None = None) -> QuantConfig:
        """All elastic layers at `bits` (inputs at `act_bits` or `bits`) in one form; fixed layers keep their own bits.

        Raises:
            ValueError: naming the layer that cannot take it.
        """
        index = np.arange(self.bits.shape[1])
        wanted = np.where(self.is_weight, bits, bits if act_bits is None else act_bits)
        fits = (self.in_form[ALL_FORMS.index(form)] == index) & (
            (self.bits == wanted[:, None]) | ~self.elastic[:, None]
        )
        if not fits.any(1).all():
            g = int(fits.any(1).argmin())
            gene = self.genes[g]
            raise ValueError(
                f"layer {gene.layers[0]!r} cannot take {wanted[g]}-bit {gene.slot}s in the form {form.name}."
            )
        return self.decode(np.where(fits, index, -1).max(1))

    @property
    def uniform_bits(self) -> list[int]:
        """Bit-widths that every elastic weight and activation gene allows."""
        sets = [set(self.bits[g, : self.num_formats[g]].tolist()) for g in range(self.num_genes) if self.elastic[g]]
        sets = sets or [set(self.bits[g, : self.num_formats[g]].tolist()) for g in range(self.num_genes)]
        return sorted(set.intersection(*sets))

    def uniform_pairs(self, form: Form) -> list[tuple[int, int]]:
        """(weight bits, activation bits) of the uniform configs in a form, one for each width that all layers allow.

        Equal bits where the space has them. Otherwise, as where activations have 8 bits only, a width is paired with the
        next higher one of the other slot, or with its highest. Empty if some slot has no common width.
        """
        allowed, common = self.formats_in(form), []
        for weights in (True, False):
            genes = np.flatnonzero(self.is_weight == weights)
            elastic = genes[self.elastic[genes]] if self.elastic[genes].any() else genes
            sets = [set(self.bits[g][allowed[g]].tolist()) for g in elastic]
            common.append(sorted(set.intersection(*sets)) if sets else None)
        weight, act = common[0] or [], common[0] or [] if common[1] is None else common[1]
        if not weight or not act:
            return []

        def nearest(options: list[int], bits: int) -> int:
            return next((o for o in options if o >= bits), options[-1])

        return sorted({(w, nearest(act, w)) for w in weight} | {(nearest(weight, a), a) for a in act})

    # -- features of the predictor ------------------------------------------------------------------------------------

    def features(self, genomes: Genomes) -> NDArray[np.float32]:
        """Encoding of CQAP (EQ-Net section 3.4): float32 [N, 6 + 2 * B * L], B bit-widths, L layers; ends are all-zero.

        Columns: share of layers with (tensor, channel) granularity, (sym, asym) weights, (sym, asym) activations, which is
        one-hot for a config with one form; then a one-hot of the weight bits of each layer, then of its activation bits.
        Departs from the official code: its asymmetric conditions were never set.
        """
        levels = self.bit_levels
        columns = np.arange(self.num_genes)
        n, count = len(genomes), len(self.layers)
        bits, sym, channel = (t[columns, genomes] for t in (self.bits, self.symmetric, self.per_channel))
        out = np.zeros((n, 6 + 2 * len(levels) * count), np.float32)
        weight = np.array([self.gene_of[layer.name, "weight"] for layer in self.layers])
        acts = [
            (i, self.gene_of[layer.name, "act"])
            for i, layer in enumerate(self.layers)
            if (layer.name, "act") in self.gene_of
        ]
        out[:, 1], out[:, 3] = channel[:, weight].mean(1), 1 - sym[:, weight].mean(1)
        out[:, 0], out[:, 2] = 1 - out[:, 1], 1 - out[:, 3]
        if acts:
            out[:, 5] = 1 - sym[:, [g for _, g in acts]].mean(1)
            out[:, 4] = 1 - out[:, 5]
        offset = {"weight": 6, "act": 6 + len(levels) * count}
        for slot, pairs in (("weight", list(enumerate(weight))), ("act", acts)):
            for i, g in pairs:
                if self.layers[i].name in self.fixed:
                    continue
                start = offset[slot] + i * len(levels)
                out[:, start : start + len(levels)] = bits[:, g, None] == levels
        return out

    @property
    def bit_levels(self) -> NDArray[np.int16]:
        """Sorted bit-widths of the elastic layers, the one-hot levels of `features`."""
        rows = self.elastic if self.elastic.any() else np.ones_like(self.elastic)
        return np.unique(self.bits[rows][self.bits[rows] > 0])

    # -- JSON ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict from which `from_json` rebuilds the space without the model."""
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "weight": {n: [f.to_json() for f in self.choices(n, "weight")] for n in self._info},
            "act": {n: [f.to_json() for f in self.choices(n, "act")] for n in self._info},
            "fixed": sorted(self.fixed),
            "ties": [list(t) for t in self.ties],
            "float_numel": self.float_numel,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> QuantSpace:
        """Inverse of `to_json`. Raises ValueError for anything else."""
        try:
            return QuantSpace(
                [LayerInfo.from_json(d) for d in data["layers"]],
                {n: [QuantFormat.from_json(f) for f in fs] for n, fs in data["weight"].items()},
                {n: [QuantFormat.from_json(f) for f in fs] for n, fs in data["act"].items()},
                fixed=data["fixed"],
                ties=data["ties"],
                float_numel=data["float_numel"],
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not the description of a quantization space: {error}") from error

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, QuantSpace) and self.to_json() == other.to_json())

    __hash__ = None  # type: ignore[assignment]
