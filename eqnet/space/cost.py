"""What a config costs, and budgets on it (EQ-Net sections 3.4 and 4; accounting of its Table 2).

Every cost here is additive over tied groups of layers, so it is one table: a value for each (weight format, activation
format) of each group, plus a constant. Counts are whole numbers below 2^53, so float64 sums are exact and comparisons
with a limit are not a matter of rounding. Departs from the paper: besides mean bits, model size and BitOps can be
limited. Products of two activations (attention, squeeze-and-excite gates) stay in floating point and are not counted.

Shape legend: `N` configs, `G` genes, `L` layers, `Q` tied groups, `C` costs of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eqnet.space.qconfig import LayerInfo, QuantConfig, QuantFormat
from eqnet.space.space import Genomes, QuantSpace, Slot

Floats = NDArray[np.float64]
Costs = Mapping[str, "Callable[[QuantSpace], CostModel]"]  # what the names of limits mean
FLOAT_BITS = 32
_CHUNK = 1024  # rows per gather, so that the working set stays in the cache


class Cells:
    """Numbers the pairs of formats, the cells of a cost table, of all tied groups one after the other.

    Attributes:
        weight_gene: of each group, [Q].
        act_gene: of each group, [Q]; the weight gene where all inputs stay in floating point.
        has_act: whether there is an activation gene, [Q].
        counts: cells of each group, [Q].
        widths: cells from one weight format to the next, [Q].
        offsets: first cell of each group, [Q].
    """

    def __init__(self, space: QuantSpace) -> None:
        acts = [
            next((space.gene_of[n, "act"] for n in group if (n, "act") in space.gene_of), None)
            for group in space.groups
        ]
        self.weight_gene = np.array([space.gene_of[group[0], "weight"] for group in space.groups])
        self.has_act = np.array([a is not None for a in acts])
        self.act_gene = np.array([w if a is None else a for w, a in zip(self.weight_gene, acts, strict=True)])
        self.widths = np.where(self.has_act, space.num_formats[self.act_gene], 1)
        self.counts = space.num_formats[self.weight_gene] * self.widths
        self.offsets = np.cumsum(self.counts) - self.counts
        self._stride = (self.widths * self.has_act).astype(np.int16)  # 0 where both genes are the same

    def parts(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Group, weight format and activation format (0 if there is no gene for it) of every cell."""
        group = np.repeat(np.arange(len(self.counts)), self.counts)
        weight, act = np.divmod(np.arange(len(group)) - self.offsets[group], self.widths[group])
        return group, weight, act

    def index(self, genomes: Genomes) -> NDArray[np.intp]:
        """The cell that each group occupies, [Q, N]."""
        local = genomes.take(self.weight_gene, axis=1) * self._stride
        local += genomes.take(self.act_gene, axis=1)
        index: NDArray[np.intp] = np.add(local.T, self.offsets[:, None], dtype=np.intp, order="C")
        return index


class CostModel:
    """An additive cost of configs: `(sum of table entries + constant) / divisor`.

    Attributes:
        name: the key of this cost in a `Budget`.
        unit: "bits", "bytes" or "bitops".
        minimum: the smallest value any config of the space reaches.
    """

    def __init__(
        self,
        space: QuantSpace,
        name: str,
        unit: str,
        measure: Callable[[LayerInfo, QuantFormat, QuantFormat | None], float],
        constant: float = 0.0,
        divisor: float = 1.0,
    ) -> None:
        """Tabulates `measure(layer, weight format, activation format or None)` over the space."""
        self.space, self.name, self.unit = space, name, unit
        self.constant, self.divisor = constant, divisor
        self.cells = Cells(space)
        group_of = {name: q for q, group in enumerate(space.groups) for name in group}
        self.table = np.zeros(int(self.cells.counts.sum()))
        self._layer_tables: list[tuple[int, Floats]] = []  # of each layer: its group and its part of the group's cells
        for layer in space.layers:
            acts = space.choices(layer.name, "act") or (None,) * int(self.cells.widths[group_of[layer.name]])
            part = np.array([measure(layer, w, a) for w in space.choices(layer.name, "weight") for a in acts], float)
            group = group_of[layer.name]
            start = self.cells.offsets[group]
            self.table[start : start + len(part)] += part
            self._layer_tables.append((group, part))
        self.minimum = float((np.minimum.reduceat(self.table, self.cells.offsets).sum() + constant) / divisor)

    def __call__(self, genomes: Genomes) -> Floats:
        """Costs of genomes [N, G], float64 [N] in `unit`."""
        sums = np.empty(len(genomes))
        for i in range(0, len(genomes), _CHUNK):
            sums[i : i + _CHUNK] = self.table.take(self.cells.index(genomes[i : i + _CHUNK])).sum(0)
        return (sums + self.constant) / self.divisor

    def of(self, config: QuantConfig) -> float:
        """Cost of one config, in `unit`. Raises ValueError if the config is not in the space."""
        return float(self(self.space.encode(config)[None])[0])

    def per_layer(self, genomes: Genomes) -> Floats:
        """What each layer adds, float64 [N, L] in `unit`; a row sums to the cost less `constant / divisor`."""
        index = (self.cells.index(genomes) - self.cells.offsets[:, None]).T
        return np.stack([part[index[:, group]] for group, part in self._layer_tables], 1) / self.divisor

    def format(self, value: float) -> str:
        """E.g. '2.31 bits', '180.2 KiB', '350 MBitOps'."""
        if self.unit == "bitops":
            power = min(int(math.log10(max(value, 1)) / 3), 4)
            return f"{value / 1000**power:.3g} {('', 'K', 'M', 'G', 'T')[power]}BitOps"
        if self.unit == "bytes":
            power = min(int(math.log(max(value, 1), 1024)), 3)
            return f"{value / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
        return f"{value:.2f} {self.unit}"


class CostTable:
    """Several costs of one space, looked up together: little more work than one of them.

    Attributes:
        costs: the costs, the columns of what a call returns.
    """

    def __init__(self, costs: Sequence[CostModel]) -> None:
        """Joins the tables of `costs`, at least one, all of one space."""
        self.costs = tuple(costs)
        self._rows = np.stack(
            [cost.table for cost in costs] + [costs[0].table] * (len(costs) == 3), 1
        )  # 2^n are fastest

    def __call__(self, genomes: Genomes) -> Floats:
        """Costs of genomes [N, G], float64 [N, C], each in its own unit."""
        values = np.empty((len(self.costs), len(genomes)))
        for i in range(0, len(genomes), _CHUNK):
            index = self.costs[0].cells.index(genomes[i : i + _CHUNK])
            values[:, i : i + _CHUNK] = self._rows.take(index, axis=0).sum(0).T[: len(self.costs)]
        for value, cost in zip(values, self.costs, strict=True):
            value += cost.constant
            value /= cost.divisor
        return values.T


def slot_sizes(space: QuantSpace, slot: Slot, ends: bool = False) -> Floats:
    """The weighting of mean bits: weights or input elements of each layer, float64 [L].

    Zero for fixed layers, unless `ends` is true or nothing else has a size, and for inputs in floating point.
    """
    sizes = np.array(
        [
            (layer.weight_numel if slot == "weight" else layer.act_numel) * ((layer.name, slot) in space.gene_of)
            for layer in space.layers
        ],
        float,
    )
    inner = sizes * [layer.name not in space.fixed for layer in space.layers]
    return sizes if ends or not inner.any() else inner


def _mean_bits(space: QuantSpace, slot: Slot, ends: bool = False) -> CostModel:
    sizes = slot_sizes(space, slot, ends)
    size_of = {layer.name: size for layer, size in zip(space.layers, sizes, strict=True)}
    if not sizes.any():
        raise ValueError(f"mean {slot} bits are undefined: no layer of this space has a quantized {slot}.")

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        fmt = weight if slot == "weight" else act
        return 0.0 if fmt is None else size_of[layer.name] * fmt.bits

    return CostModel(space, "w" if slot == "weight" else "a", "bits", measure, divisor=float(sizes.sum()))


def weight_bits(space: QuantSpace) -> CostModel:
    """Mean weight bit-width, weighted by the number of weights.

    Fixed layers are left out (if all are fixed, all count), so a config of `b` bits everywhere else costs exactly `b`.
    """
    return _mean_bits(space, "weight")


def act_bits(space: QuantSpace) -> CostModel:
    """Mean activation bit-width, weighted by input elements per image; fixed layers as in `weight_bits`.

    Raises:
        ValueError: no layer has quantized inputs.
    """
    return _mean_bits(space, "act")


def model_size(space: QuantSpace) -> CostModel:
    """Bytes needed to store a config.

    Per layer: `ceil(weights * bits / 8)` of packed codes; 4 bytes per weight step size (one, or one per output channel)
    and, if asymmetric, 1 byte per weight zero point; for quantized inputs a 4-byte step size and, if asymmetric, a
    1-byte zero point. Per network: 4 bytes for each of `space.float_numel` values that stay in float32 (biases, BN).
    """

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        steps = layer.channels if weight.granularity == "channel" else 1
        codes = -(-layer.weight_numel * weight.bits // 8)
        return codes + steps * (4 if weight.symmetric else 5) + (0 if act is None else 4 if act.symmetric else 5)

    return CostModel(space, "size", "bytes", measure, constant=4.0 * space.float_numel)


def bitops(space: QuantSpace) -> CostModel:
    """Bit operations per image: sum over layers of MACs x weight bits x activation bits.

    Every layer counts at its own bits, the fixed ones too; inputs in floating point count as 32 bits.
    """

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        return layer.macs * weight.bits * (FLOAT_BITS if act is None else act.bits)

    return CostModel(space, "bitops", "bitops", measure)


def weight_compression(space: QuantSpace, genomes: Genomes) -> Floats:
    """32 / mean weight bits over all layers, the fixed ones included (EQ-Net Table 2), float64 [N]."""
    return FLOAT_BITS / _mean_bits(space, "weight", ends=True)(genomes)


def act_compression(space: QuantSpace, genomes: Genomes) -> Floats:
    """32 / mean activation bits over all quantized inputs, the fixed ones included (EQ-Net Table 2), float64 [N]."""
    return FLOAT_BITS / _mean_bits(space, "act", ends=True)(genomes)


COSTS: dict[str, Callable[[QuantSpace], CostModel]] = {
    "w": weight_bits,
    "a": act_bits,
    "size": model_size,
    "bitops": bitops,
}
