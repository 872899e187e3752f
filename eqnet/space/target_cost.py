"""What a config costs on a target: containers instead of codes.

`size` and `bitops` of `eqnet.space.cost` count the bits of codes. A device that runs 3-bit codes on its int8 kernel takes
the time and, unless the file is packed, the memory of 8 bits. The cost models here ask the target.
"""

from __future__ import annotations

from collections.abc import Callable

from eqnet.space.cost import COSTS, FLOAT_BITS, CostModel
from eqnet.space.hardware import HardwareTarget
from eqnet.space.latency import LatencyTable, latency_cost
from eqnet.space.qconfig import LayerInfo, QuantFormat
from eqnet.space.space import QuantSpace

Measure = Callable[[LayerInfo, QuantFormat, QuantFormat | None], float]


def container_size(space: QuantSpace, target: HardwareTarget) -> CostModel:
    """Bytes of a model whose weights are stored in the containers of the target.

    As `model_size`, with `ceil(weights * container bits / 8)` bytes of codes per layer. Padding to the width of a device's
    memory is not counted.

    Raises:
        ValueError: the space has formats that the target does not run.
    """

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        steps = layer.channels if weight.granularity == "channel" else 1
        codes = -(-layer.weight_numel * target.container_bits(layer, "weight", weight) // 8)
        return codes + steps * (4 if weight.symmetric else 5) + (0 if act is None else 4 if act.symmetric else 5)

    return _cost(space, target, "size", "bytes", measure, constant=4.0 * space.float_numel)


def container_bitops(space: QuantSpace, target: HardwareTarget) -> CostModel:
    """Bit operations per image: sum over layers of MACs x bits of the weights x bits of the inputs, as executed.

    Those are the bits of containers, or of codes on a target whose time follows the codes (`HardwareTarget.executed`). What
    the target computes in floating point counts 32 x 32 bits, inputs in floating point count 32.

    Raises:
        ValueError: the space has formats that the target does not run.
    """

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        weight_bits = target.executed(layer, "weight", weight).bits
        act_bits = FLOAT_BITS if act is None else target.executed(layer, "act", act).bits
        rules = target.rules(layer)
        if rules is not None and rules.kernel == "float":
            weight_bits = act_bits = FLOAT_BITS
        return layer.macs * weight_bits * act_bits

    return _cost(space, target, "bitops", "bitops", measure)


def act_memory(space: QuantSpace, target: HardwareTarget) -> CostModel:
    """Bytes of all layer inputs of one image in the containers of the target.

    The sum over layers, each input counted once per call: what is written and read if nothing stays in a cache. It is no
    peak: which tensors live at the same time depends on the schedule of the runtime.

    Raises:
        ValueError: the space has formats that the target does not run.
    """

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        bits = FLOAT_BITS if act is None else target.container_bits(layer, "act", act)
        return -(-layer.act_numel * bits // 8)

    return _cost(space, target, "act_memory", "bytes", measure)


def target_costs(
    target: HardwareTarget | None, table: LatencyTable | None = None
) -> dict[str, Callable[[QuantSpace], CostModel]]:
    """What the names of a budget mean on a target, in the form of `eqnet.space.cost.COSTS`; without one, those.

    "w" and "a" are mean bits of codes; "size" is that of the deployed file (packed codes or containers); "bitops" counts
    bits as executed; "latency" (milliseconds) is there if a table is given.
    """
    costs = dict(COSTS)
    if target is not None:
        if target.storage_bits == "container":
            costs["size"] = lambda space: container_size(space, target)
        costs["bitops"] = lambda space: container_bitops(space, target)
    if table is not None:
        costs["latency"] = lambda space: latency_cost(space, table, target)
    return costs


def _cost(
    space: QuantSpace, target: HardwareTarget, name: str, unit: str, measure: Measure, constant: float = 0.0
) -> CostModel:
    try:
        return CostModel(space, name, unit, measure, constant)
    except ValueError as error:
        raise ValueError(f"{error} Restrict the space to {target.name} first.") from error
