"""Fine-tuning: quantization-aware training of one subnet, guided by the float model.

HAWQ-V3 (arXiv 2011.10680) and LCPAQ (arXiv 2402.17706) end with it, after their integer program; EQ-Net (arXiv 2308.07650)
deploys subnets as the supernet has them. A subnet is a space with one format per quantizer, so the step, the loop and the
files are those of a supernet. Weights and step sizes come from a trained supernet (`Supernet.inherit`), or the weights from a
float model and the step sizes from calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from eqnet.checkpoint import read_json, write_json
from eqnet.nn.supernet import Supernet, count_float_numel, trace_layers
from eqnet.run import Run, training_space
from eqnet.settings import FINE_TUNE, METAMIX, Settings, load_settings
from eqnet.space import LayerInfo, QuantConfig, QuantFormat, QuantSpace, Slot
from eqnet.subnet import read_subnet

INHERITED = ("model", "space")  # sections that belong to the supernet's run
# of the data, what may differ from the supernet's run: where images lie and how they are fed, not which they are
FREE_DATA = {"root", "download", "batch_size", "evaluation_batch_size", "workers", "augment", "transform"}


def static_space(space: QuantSpace, config: QuantConfig) -> QuantSpace:
    """The subspace that holds `config` alone; fixed layers, ties and hence mean bits are those of `space`.

    Raises:
        ValueError: the config is not a point of the space.
    """
    space.check(config)

    def allow(layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> bool:
        return fmt == (config[layer.name].weight if slot == "weight" else config[layer.name].act)

    return space.restrict(allow)


def build_supernet(run: Run, model: nn.Module, input_size: Sequence[int]) -> Supernet:
    """`model`, converted in place to the formats of the run: its subnet alone, once it has one, or the space of its settings.

    Raises:
        ValueError: the space does not fit the model, or the subnet does not fit the space.
    """
    layers = trace_layers(model, input_size)
    space = training_space(run.settings.space, layers, count_float_numel(model, layers))
    stored = run.path / "subnet.json"
    if stored.exists():
        space = static_space(space, read_subnet(stored, space))
    elif run.settings.subnet is not None:
        space = static_space(space, read_subnet(run.settings.subnet, space))
    return Supernet(model, space)


def store_subnet(run: Run, accelerator: Accelerator) -> None:
    """Copies the layers of `settings.subnet` into the run's folder, once, so that the run does not depend on that file."""
    if run.settings.subnet is not None and accelerator.is_main_process and not (run.path / "subnet.json").exists():
        write_json(run.path / "subnet.json", {"layers": read_json(run.settings.subnet)["layers"]})
    accelerator.wait_for_everyone()


def note_first_accuracy(run: Run, validation: float) -> None:
    """Keeps the first validation accuracy [%] of a run's subnet, that before training, in its `subnet.json`."""
    document = read_json(run.path / "subnet.json")
    if "accuracy" not in document:
        write_json(run.path / "subnet.json", {**document, "accuracy": {"validation_before": validation}})


def complete_settings(arguments: Sequence[str]) -> Settings:
    """Settings of a new run; those of one with `subnet` start from `FINE_TUNE` and from the run of its supernet.

    That run is `supernet`, or the one whose folder holds the file, unless float weights are given. Settings of a run with
    `metamix.budget` start from `METAMIX`.

    Args:
        arguments: as for `load_settings`.

    Raises:
        ValueError: wrong settings; a subnet and a budget; no epoch that selects; `supernet` without `subnet`; a model, space
            or images other than the supernet's.
    """
    asked = load_settings(arguments)
    metamix = asked.metamix
    if metamix.budget is not None and asked.subnet is not None:
        raise ValueError("subnet= gives the bits and metamix.budget= selects them; give one of the two.")
    if metamix.budget is not None and metamix.warmup_epochs >= metamix.select_epochs:
        raise ValueError("metamix.warmup_epochs must be fewer than metamix.select_epochs, or nothing is selected.")
    if asked.subnet is None:
        if asked.supernet is not None:
            raise ValueError("supernet= is the run that a subnet comes from; give subnet=path/subnet.json as well.")
        return asked if metamix.budget is None else load_settings(arguments, METAMIX)
    folder = asked.supernet
    if folder is None and asked.model.weights is None and not asked.model.pretrained:
        held_by = [p for p in Path(asked.subnet).resolve().parents if (p / "supernet.json").is_file()]
        folder = str(held_by[0]) if held_by else None
    if folder is None:
        return load_settings(arguments, FINE_TUNE)
    source = Run.open(folder).settings
    kept = source.model_dump(include={"seed", "tracking", "project", "model", "data", "space", "search"})
    kept["model"] |= {"weights": folder, "pretrained": False}  # the float model of that run
    base: dict[str, Any] = {**FINE_TUNE, **kept, "supernet": folder}
    settings, original = load_settings(arguments, base), load_settings([], base)
    changed = [name for name in INHERITED if getattr(settings, name) != getattr(original, name)]
    if settings.data.model_dump(exclude=FREE_DATA) != original.data.model_dump(exclude=FREE_DATA):
        changed.append("data")
    if changed:
        raise ValueError(
            f"{changed[0]} belongs to the run {folder} that the subnet comes from and cannot change; set train.*, or give "
            "model.weights=... and no supernet= to start from a float model."
        )
    return settings
