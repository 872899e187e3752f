"""Training-free proxies: statistics of the layers, gathered once, and a batch of configs -> scores, the higher the better.

A proxy gives a value to each cell (weight format, input format) of every layer and an aggregation over layers. The hand-made
ones are sums over layers, as in EMQ (arXiv 2307.10554, section 4.1); evolved ones (`emq`) need not be.

| proxy | adds for every layer | source |
|---|---|---|
| bit_sum | b | |
| bparams | parameters x b (weights); input values x b are not parameters | EMQ |
| bops | MACs x weight bits x input bits | |
| snip, grasp, channel_fisher, synflow | b x statistic | SNIP, GraSP, Fisher, Synflow |
| hawq, hawq_v2 | b x top eigenvalue, b x trace | HAWQ, HAWQ-V2, without quantization error, as EMQ codes them |
| ompq | b x exp(-orm) | OMPQ |
| qe | r x log of sigma(b), r larger for earlier stages | QE-Score |
| entropy | b x log_std | EMQ |
| squared_error ... eigenvalue | negative additive losses, quantization errors among them (HAWQ-V2 is `hessian`) | `scores` |

b stands for the bits of weights and of inputs; a statistic that has values for both weighs each. Statistics are those of
`layer_statistics`. Layers are joined by name. The official code joins layers and bits by position, and therefore:

- SNIP and Synflow pair the k-th of 20 convolutions of a ResNet-18 with the k-th of 18 entries, so that from the seventh on every
  layer has the bits of another, and the two largest layers are left out;
- HAWQ and HAWQ-V2 drop the first and last layer but keep three down-sampling convolutions, which shifts all;
- OMPQ cuts the list of features but not that of similarities;
- bit vectors are laid over lists that include down-sampling convolutions, and the largest block falls off the end;
- signs are lost where results are gathered with a pattern that knows no minus.

Departs from it further: networks keep their trained weights; BOPs count real input bits, not 5; the constants of QE are computed.

Shape legend: `N` configs, `G` genes, `L` layers, `F` formats of weights, `A` formats of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eqnet.scoring.layer_statistics import SLOTS, LayerStatistics
from eqnet.scoring.scores import SCORES
from eqnet.space import CostModel, Genomes, LayerInfo, QuantFormat, QuantSpace

Floats = NDArray[np.float64]
_LATE_STAGES = (1.0, 1.0, 6.0)  # weights of the last stages in QE-Score; earlier ones have none


class Proxy(Protocol):
    """What ranks configs.

    Attributes:
        name: of the proxy.
        additive: whether scores are sums over layers, which integer programming can maximise.
        needs: the additive scores that the statistics must include.
    """

    @property
    def name(self) -> str: ...

    @property
    def additive(self) -> bool: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def cells(self, statistics: LayerStatistics) -> Floats:
        """What a layer adds in each cell, [L, F, A]; raises ValueError unless `additive`."""

    def scores(self, statistics: LayerStatistics, genomes: Genomes) -> Floats:
        """Scores of configs of the statistics' space, higher is better, float64 [N]."""


@dataclass(frozen=True)
class LayerSum:
    """A hand-made proxy: a sum over layers.

    Attributes:
        name: of the proxy.
        formula: what each layer adds, for people.
        values: the same, [L, F, A] or broadcastable to it.
        needs: the additive scores that the statistics must include.
    """

    name: str
    formula: str
    values: Callable[[LayerStatistics], Floats]
    needs: tuple[str, ...] = ()
    additive: bool = True

    def cells(self, statistics: LayerStatistics) -> Floats:
        """See `Proxy`. Raises ValueError if the statistics lack a score."""
        check_needs(self.name, self.needs, statistics)
        shape = (len(statistics.names), *(statistics.bits(slot).shape[1] for slot in SLOTS))
        return np.broadcast_to(self.values(statistics), shape)

    def scores(self, statistics: LayerStatistics, genomes: Genomes) -> Floats:
        """See `Proxy`."""
        return additive_model(self.name, self.cells(statistics), statistics.space)(genomes)


def check_needs(name: str, needs: tuple[str, ...], statistics: LayerStatistics) -> None:
    """Raises ValueError if the statistics lack an additive score that a proxy needs."""
    missing = [score for score in needs if score not in statistics.losses]
    if missing:
        raise ValueError(f"the proxy {name!r} needs the scores {', '.join(missing)}, which were not gathered.")


def additive_model(name: str, cells: Floats, space: QuantSpace) -> CostModel:
    """The sum over layers of cells [L, F, A] as a `CostModel` of the space: 100,000 configs in a fraction of a second."""
    place = {layer.name: i for i, layer in enumerate(space.layers)}
    index = {
        (layer.name, slot): {fmt: i for i, fmt in enumerate(space.choices(layer.name, slot))}
        for layer in space.layers
        for slot in SLOTS
    }

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        a = 0 if act is None else index[layer.name, "act"][act]
        return float(cells[place[layer.name], index[layer.name, "weight"][weight], a])

    return CostModel(space, name, "score", measure)


def occupied(cells: Floats, space: QuantSpace, genomes: Genomes) -> Floats:
    """The values of the cells that each layer of each config occupies, [N, L], of cells [L, F, A] (1 where constant)."""
    weight = [space.gene_of[layer.name, "weight"] for layer in space.layers]
    act = [space.gene_of.get((layer.name, "act"), -1) for layer in space.layers]
    w = genomes[:, weight] if cells.shape[1] > 1 else 0
    a = np.where(np.array(act) >= 0, genomes[:, act], 0) if cells.shape[2] > 1 else 0
    found: Floats = np.broadcast_to(cells[np.arange(len(weight)), w, a], (len(genomes), len(weight)))
    return found


# -- hand-made proxies ------------------------------------------------------------------------------------------------


def _bits(statistics: LayerStatistics) -> tuple[Floats, Floats]:
    """Bits of weights [L, F, 1] and of inputs [L, 1, A]."""
    return statistics.bits("weight")[:, :, None], statistics.bits("act")[:, None, :]


def _column(statistics: LayerStatistics, name: str) -> Floats:
    """One number of each layer, [L, 1, 1]. Raises ValueError if it was not gathered."""
    if name not in statistics.numbers:
        raise ValueError(f"the statistic {name!r} of the layers is needed, which was not gathered.")
    return statistics.numbers[name][:, None, None]


def _both(name: str) -> Callable[[LayerStatistics], Floats]:
    """Bits of each slot x its own number."""

    def values(statistics: LayerStatistics) -> Floats:
        w, a = _bits(statistics)
        return w * _column(statistics, f"{name}_weight") + a * _column(statistics, f"{name}_act")

    return values


def _shared(number: Callable[[LayerStatistics], Floats]) -> Callable[[LayerStatistics], Floats]:
    """All bits of the layer x one number."""

    def values(statistics: LayerStatistics) -> Floats:
        w, a = _bits(statistics)
        return (w + a) * number(statistics)

    return values


def _bops(statistics: LayerStatistics) -> Floats:
    w, a = _bits(statistics)
    return _column(statistics, "macs") * w * np.where(a > 0, a, 32)


def _qe(statistics: LayerStatistics) -> Floats:
    """QE-Score: stages weighted by how many of the weighted stages include the layer; log of sigma(weights) sigma(inputs)."""
    stage = _column(statistics, "stage").ravel().astype(int)
    weights = np.zeros(int(stage.max()) + 1)
    late = _LATE_STAGES[-len(weights) :]
    weights[-len(late) :] = late
    including = weights[::-1].cumsum()[::-1]
    w, a = (
        np.vectorize(lambda b: math.log(rounded_deviation(int(b))) if b else 0.0)(bits) for bits in _bits(statistics)
    )
    out: Floats = including[stage][:, None, None] * (w + a)
    return out


def rounded_deviation(bits: int) -> float:
    """Standard deviation of a standard normal variable rounded to whole numbers and clamped to +-2^(bits - 1).

    Examples:
        >>> round(rounded_deviation(2), 4), round(rounded_deviation(8) ** 2, 4)
        (1.0089, 1.0833)
    """
    top = 2 ** (bits - 1)

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    inner = sum(2 * k * k * (below(k + 0.5) - below(k - 0.5)) for k in range(1, top))
    return math.sqrt(inner + 2 * top * top * (1 - below(top - 0.5)))


def _negative_loss(name: str) -> Callable[[LayerStatistics], Floats]:
    def values(statistics: LayerStatistics) -> Floats:
        weight, act = statistics.losses[name]
        return -(weight[:, :, None] + act[:, None, :])

    return values


def _hand_made() -> Mapping[str, LayerSum]:
    found = [
        LayerSum("bit_sum", "b", _shared(lambda s: np.ones((len(s.names), 1, 1)))),
        LayerSum("bparams", "parameters * b_w", lambda s: _bits(s)[0] * _column(s, "parameters")),
        LayerSum("bops", "MACs * b_w * b_a", _bops),
        *(LayerSum(name, f"b * {name}", _both(name)) for name in ("snip", "grasp")),
        LayerSum("channel_fisher", "b * channel_fisher", _shared(lambda s: _column(s, "channel_fisher"))),
        LayerSum("synflow", "b * synflow", _shared(lambda s: _column(s, "synflow"))),
        LayerSum("hawq", "b * top eigenvalue", _both("eigenvalue"), ("eigenvalue",)),
        LayerSum("hawq_v2", "b * trace", _both("trace"), ("hessian",)),
        LayerSum("ompq", "b * exp(-orm)", _shared(lambda s: np.exp(-_column(s, "orm")))),
        LayerSum("qe", "stage weight * log(sigma(b_w) sigma(b_a))", _qe),
        LayerSum("entropy", "b * log_std", _shared(lambda s: _column(s, "log_std"))),
        *(LayerSum(name, f"-{name}", _negative_loss(name), (name,)) for name in SCORES),
    ]
    return {proxy.name: proxy for proxy in found}


PROXIES: Mapping[str, LayerSum] = _hand_made()
