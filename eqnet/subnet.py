"""The files of one subnet: `subnet.json` (formats of each layer, costs, accuracies), `subnet.safetensors` (integer weights).

Whatever found or trained a config writes the same files, so each command reads the subnets of every other one. Only `layers`
of a `subnet.json` is needed to read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from eqnet.checkpoint import read_json, save_tensors, write_json
from eqnet.nn.supernet import Supernet
from eqnet.space import COSTS, QuantConfig, QuantSpace
from eqnet.space.cost import Costs


def read_subnet(path: str | Path, space: QuantSpace) -> QuantConfig:
    """The config of a `subnet.json`.

    Raises:
        ValueError: the file is missing, damaged, or its layers and formats are not those of the space.
    """
    document = read_json(path)
    try:
        config = QuantConfig.from_json(document["layers"])
        space.check(config)
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a subnet: it has no layers.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def describe_subnet(
    config: QuantConfig, space: QuantSpace, accuracy: Mapping[str, float], costs: Costs = COSTS
) -> dict[str, Any]:
    """What a `subnet.json` says about a config: form, every cost, the given accuracies in percent, and layers."""
    genomes = space.encode_all([config])
    return {
        "form": space.form_name(config),
        "cost": {name: float(build(space)(genomes)[0]) for name, build in costs.items()},
        "accuracy": dict(accuracy),
        "layers": config.to_json(),
    }


def save_subnet(
    folder: Path, supernet: Supernet, config: QuantConfig, bn_batches: Iterable[Tensor], document: Mapping[str, Any]
) -> None:
    """Writes both files: the config extracted with BN statistics recalibrated for it, and `document` as `subnet.json`.

    Args:
        folder: where to; the JSON file is written last.
        supernet: its config and BN statistics change.
        config: the subnet.
        bn_batches: training images [N, C, H, W] that recalibrate BN.
        document: `describe_subnet` and whatever else is known.
    """
    supernet.set_config(config)
    supernet.recalibrate_bn(bn_batches)
    save_tensors(folder / "subnet.safetensors", supernet.extract().state_dict())
    write_json(folder / "subnet.json", document)
