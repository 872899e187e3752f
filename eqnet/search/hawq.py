"""Published instances of HAWQ-V3's integer program (arXiv 2011.10680): per-layer sensitivities, costs and ties in a JSON file.

One bit-width per layer serves weights and inputs, so an instance is a space without activation genes. The loss of a layer at
b bits is `trace per parameter * squared error at b bits`; its costs are `parameters * b / 8` bytes, `MACs * b * b` bit
operations and a measured time. The limit for a share t lies between the cheapest and the most expensive uniform config:
`cost(lowest) + t * (cost(highest) - cost(lowest))`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eqnet.checkpoint import read_json
from eqnet.search.ilp import ExactResult, exact_search
from eqnet.space.cost import CostModel
from eqnet.space.qconfig import LayerInfo, QuantFormat
from eqnet.space.space import QuantSpace


@dataclass(frozen=True)
class HawqInstance:
    """One instance.

    Attributes:
        space: layers "0", "1", ... in the order of the file, weight formats of the bit-widths given there.
        loss: sum of trace times squared error.
        costs: by name: "size" (bytes), "bops" (bit operations), "latency" (ms, if the file has times).
        optima: as stored in the file: the constraint, t, and what should come out.
    """

    space: QuantSpace
    loss: CostModel
    costs: dict[str, CostModel]
    optima: list[dict[str, Any]]

    def limit(self, name: str, t: float) -> float:
        """The limit on a cost for a share `t` in [0, 1], in the unit of the cost. Raises ValueError for an unknown name."""
        if name not in self.costs:
            raise ValueError(f"the instance has no cost {name!r}; it has {', '.join(self.costs)}.")
        low, high = (self.costs[name].of(config) for config in (self.space.smallest(), self.space.largest()))
        return low + t * (high - low)

    def solve(self, shares: dict[str, float]) -> ExactResult:
        """The optimum with the limits of the given shares, e.g. `{"size": 0.25}`."""
        limits = [self.limit(name, t) for name, t in shares.items()]
        return exact_search(self.loss, [self.costs[name] for name in shares], limits)

    def objective(self, result: ExactResult) -> float:
        """The loss relative to the lowest bit-width everywhere, as HAWQ reports it."""
        return result.loss - self.loss.of(self.space.smallest())

    def bits(self, result: ExactResult) -> str:
        """One digit per layer."""
        config = self.space.decode(result.genome)
        return "".join(str(config[layer.name].weight.bits) for layer in self.space.layers)


def read_instance(path: str | Path) -> HawqInstance:
    """Reads an instance.

    The file has lists of one number per layer: `trace_per_parameter`, `parameters`, `macs`, `squared_error_<b>bit` for each
    bit-width, and, for all of them or none, `latency_ms_<b>bit`; `ties`, groups of layer numbers; optionally `optima`.

    Raises:
        ValueError: the file cannot be read, lacks a list, or a list is not finite or of another length.
    """
    data = read_json(path)
    try:
        bits = sorted(int(match[1]) for key in data if (match := re.fullmatch(r"squared_error_(\d)bit", key)))
        names = ["trace_per_parameter", "parameters", "macs", *(f"squared_error_{b}bit" for b in bits)]
        timed = any(key.startswith("latency_ms_") for key in data)
        names += [f"latency_ms_{b}bit" for b in bits] if timed else []
        lists = {name: np.asarray(data[name], float) for name in names}
        ties = [tuple(str(int(i)) for i in tie) for tie in data.get("ties", [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not an instance of HAWQ's integer program: {error!r}.") from error
    count = len(lists["parameters"])
    for name, values in lists.items():
        if values.shape != (count,) or not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} must hold {count} finite numbers, one for each layer.")
    if not bits:
        raise ValueError(f"{path} has no squared_error_<b>bit.")
    layers = [
        LayerInfo(str(i), "conv", (1, int(size)), int(macs), act_numel=0, calls=0)
        for i, (size, macs) in enumerate(zip(lists["parameters"], lists["macs"], strict=True))
    ]
    formats = {layer.name: [QuantFormat(b) for b in bits] for layer in layers}
    space = QuantSpace(layers, formats, {layer.name: [] for layer in layers}, ties=ties)

    def loss(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        i = int(layer.name)
        return float(lists["trace_per_parameter"][i] * lists[f"squared_error_{weight.bits}bit"][i])

    def size(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        return layer.weight_numel * weight.bits / 8

    def bops(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        return layer.macs * weight.bits**2

    def latency(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        return float(lists[f"latency_ms_{weight.bits}bit"][int(layer.name)])

    costs = {"size": CostModel(space, "size", "bytes", size), "bops": CostModel(space, "bops", "bitops", bops)}
    if timed:
        costs["latency"] = CostModel(space, "latency", "ms", latency)
    return HawqInstance(space, CostModel(space, "loss", "loss", loss), costs, list(data.get("optima", [])))
