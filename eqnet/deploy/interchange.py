"""Plans of other tools: the formats of a subnet as AIMET encodings or as a ModelOpt recipe, and back.

| format | file | what it says of a quantizer |
|---|---|---|
| `aimet` | AIMET encodings 1.0.0: lists of entries by tensor name | bits, symmetry, step sizes, offsets, granularity |
| `aimet-0.6.1` | AIMET encodings 0.6.1 by module name, what `sim.load_encodings` of aimet_torch reads | the same, granularity by the number of step sizes |
| `modelopt` | a PTQ recipe of NVIDIA ModelOpt: an ordered `quant_cfg` of name patterns | bits, axis of the step sizes; symmetric formats only |

What a foreign format cannot say, and what it says that no config of a supernet can, is a `ValueError` that names the layer.
A plan that is read is a config of the given layers; whether the supernet has it is for `QuantSpace.check` to say.

An AIMET offset is the lowest code minus the zero point, `qmin - z`: a tensor is `(code + offset) * scale`, codes from 0.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from eqnet.checkpoint import atomic_write_text, read_json, write_json
from eqnet.documents import read_yaml
from eqnet.nn.layers import STANDARDIZED_TYPES, QuantizedLayer
from eqnet.space import LayerConfig, LayerInfo, QuantConfig, QuantFormat, QuantSpace
from eqnet.space.qconfig import MAX_BITS, MIN_BITS, Granularity

AIMET, AIMET_061, MODELOPT = "aimet", "aimet-0.6.1", "modelopt"
_VERSIONS = {AIMET: "1.0.0", AIMET_061: "0.6.1"}
_INPUT = ".input"  # of a layer's input in files of encodings 1.0.0, which name tensors, not modules
_CLASSES = {"conv": ("nn.Conv1d", "nn.Conv2d"), "linear": ("nn.Linear",), "conv_transpose": ("nn.ConvTranspose2d",)}


@dataclass(frozen=True)
class _Grid:
    """The codes of a tensor: `(code + offset) * scale` with codes 0 to 2^bits - 1.

    Attributes:
        fmt: its format.
        scale: step sizes, one per channel or one.
        offset: as many offsets.
        signed: whether codes below zero are used.
    """

    fmt: QuantFormat
    scale: list[float]
    offset: list[int]
    signed: bool


# -- files -------------------------------------------------------------------------------------------------------------


def write_plan(path: str | Path, document: Mapping[str, Any]) -> None:
    """Writes a plan, as YAML if the name ends with .yaml or .yml, else as JSON.

    Raises:
        ValueError: the file exists, or its folder does not.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} already exists; remove it or give another --output.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of the output {path} does not exist.")
    if path.suffix in (".yaml", ".yml"):
        atomic_write_text(path, yaml.safe_dump(dict(document), sort_keys=False))
    else:
        write_json(path, document)


def read_plan(path: str | Path, space: QuantSpace, plan_format: str, unnamed: QuantFormat | None = None) -> QuantConfig:
    """Reads a plan of another tool as a config of `space`.

    Args:
        path: the file; YAML if its name ends with .yaml or .yml, else JSON.
        space: of the supernet that the plan is for.
        plan_format: "aimet", "aimet-0.6.1" or "modelopt"; the version of encodings is found out.
        unnamed: the format of inputs that a file of encodings does not name; None leaves them in floating point.

    Raises:
        ValueError: the file cannot be read, or says what no config of the space can.
    """
    path = Path(path)
    try:
        document = read_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path)
        if plan_format == MODELOPT:
            config = config_from_modelopt(document, space.layers)
        else:
            config = config_from_aimet(document, space, unnamed)
        space.check(config)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return config


# -- AIMET -------------------------------------------------------------------------------------------------------------


def config_to_aimet(
    config: QuantConfig, layers: Iterable[LayerInfo], subnet: nn.Module, plan_format: str = AIMET
) -> dict[str, Any]:
    """The encodings of a subnet: formats, step sizes and offsets of every weight and every quantized input.

    Weights have the names of the parameters. Inputs are `<layer>.input` in version 1.0.0, and the input 0 of the module in
    version 0.6.1.

    Args:
        config: the formats.
        layers: facts about the layers.
        subnet: as `Supernet.extract` gives it for `config`.
        plan_format: "aimet" or "aimet-0.6.1".

    Raises:
        ValueError: a layer whose weights are quantized after standardization.
    """
    weights, inputs = {}, {}
    for info in layers:
        layer = subnet.get_submodule(info.name)
        assert isinstance(layer, QuantizedLayer)
        if isinstance(layer, STANDARDIZED_TYPES):
            raise ValueError(
                f"layer {info.name!r} quantizes its weights after standardization; AIMET encodings describe the parameter."
            )
        formats = config[info.name]
        weights[info.name] = _grid(
            formats.weight, layer.weight_scale, layer.weight_zero_point, -(2 ** (formats.weight.bits - 1))
        )
        if formats.act is not None:
            assert layer.act_scale is not None
            inputs[info.name] = _grid(formats.act, layer.act_scale, layer.act_zero_point, int(layer.act_qmin))
    header = {"producer": {"package": "eqnet"}, "version": _VERSIONS[plan_format]}
    if plan_format == AIMET:
        entries = {
            "activation_encodings": [{"name": name + _INPUT, **_entry(grid)} for name, grid in inputs.items()],
            "param_encodings": [{"name": f"{name}.weight", **_entry(grid)} for name, grid in weights.items()],
        }
        return {**header, **entries, "excluded_layers": []}
    return {
        **header,
        "activation_encodings": {name: {"input": {"0": _rows(grid)[0]}} for name, grid in inputs.items()},
        "param_encodings": {f"{name}.weight": _rows(grid) for name, grid in weights.items()},
        "excluded_layers": [],
    }


def _grid(fmt: QuantFormat, scale: Tensor, zero_point: Tensor, low: int) -> _Grid:
    count = (
        scale.numel() if fmt.granularity == "channel" else 1
    )  # a layer repeats the step size of a tensor per channel
    scales, zeros = (t.detach().expand_as(scale).flatten()[:count].tolist() for t in (scale, zero_point))
    return _Grid(fmt, scales, [low - int(zero) for zero in zeros], low < 0)


def _entry(grid: _Grid) -> dict[str, Any]:
    """An entry of version 1.0.0."""
    kind = "PER_CHANNEL" if grid.fmt.granularity == "channel" else "PER_TENSOR"
    codes = {"dtype": "INT", "enc_type": kind, "bw": grid.fmt.bits, "is_sym": grid.fmt.symmetric}
    return {**codes, "scale": grid.scale, "offset": grid.offset}


def _rows(grid: _Grid) -> list[dict[str, Any]]:
    """Entries of version 0.6.1, one per step size.

    aimet_torch reads "is_symmetric" as signed codes around zero; unsigned codes with zero point 0 are asymmetric there.
    """
    steps, symmetric = 2**grid.fmt.bits - 1, str(grid.fmt.symmetric and grid.signed)
    return [
        {
            "min": offset * scale, "max": (offset + steps) * scale, "scale": scale, "offset": offset,
            "bitwidth": grid.fmt.bits, "dtype": "int", "is_symmetric": symmetric,
        }
        for scale, offset in zip(grid.scale, grid.offset, strict=True)
    ]  # fmt: skip


def config_from_aimet(document: Any, space: QuantSpace, unnamed: QuantFormat | None = None) -> QuantConfig:
    """The formats of encodings, of version 1.0.0 or 0.6.1; step sizes and other tensors are not read.

    Where the file leaves a choice between two formats of the same grid, the first that `space` has is taken: per tensor or
    per channel for one step size and one channel, and, in version 0.6.1, symmetric or asymmetric for inputs without negative
    values at offset 0.

    Args:
        document: the content of a file.
        space: whose layers the tensors are those of.
        unnamed: the format of inputs that the file does not name; None leaves them in floating point.

    Raises:
        ValueError: other versions; a layer that the file does not name, or in a format that no quantizer has.
    """
    try:
        weights, inputs = _tensors(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"these are not AIMET encodings of version 1.0.0 or 0.6.1 (param_encodings, activation_encodings): {error}."
        ) from error
    layers = {}
    for info in space.layers:
        if f"{info.name}.weight" not in weights:
            raise ValueError(
                f"the encodings do not name {info.name + '.weight'!r}; eqnet quantizes the weights of every layer."
            )
        weight = _aimet_format(f"the weight of layer {info.name!r}", weights[f"{info.name}.weight"], info)
        act = None
        if info.name in inputs:
            act = _aimet_format(f"the input of layer {info.name!r}", inputs[info.name], None)
        elif unnamed is not None and space.choices(info.name, "act"):
            act = [unnamed]
        elif space.choices(info.name, "act"):
            raise ValueError(
                f"the encodings do not name the input of layer {info.name!r}; give the format of such inputs with "
                "--unnamed-inputs."
            )
        chosen = _first(weight, space.choices(info.name, "weight"))
        layers[info.name] = LayerConfig(chosen, None if act is None else _first(act, space.choices(info.name, "act")))
    return QuantConfig(layers)


def _first(formats: Sequence[QuantFormat], choices: Sequence[QuantFormat]) -> QuantFormat:
    return next((fmt for fmt in formats if fmt in choices), formats[0])


def _tensors(document: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """Rows of version 0.6.1 by name of the parameter, and by layer for inputs. The structure decides, not the version.

    aimet_torch writes files of the structure 0.6.1 that call themselves 1.0.0.
    """
    params, acts = document["param_encodings"], document["activation_encodings"]
    if isinstance(params, list):
        named = {entry["name"]: _as_rows(entry) for entry in [*params, *acts]}
        inputs = {name.removesuffix(_INPUT): rows for name, rows in named.items() if name.endswith(_INPUT)}
        return named, inputs
    inputs = {}
    for module, slots in acts.items():
        row = slots.get("input", {}).get("0") if isinstance(slots, Mapping) else None
        if row is not None:
            inputs[module] = row if isinstance(row, list) else [row]
    return {name: list(rows) for name, rows in params.items()}, inputs


def _as_rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    kind, offsets = entry["enc_type"], entry.get("offset", [0])
    facts = {"bitwidth": entry["bw"], "dtype": entry["dtype"].lower(), "is_symmetric": str(entry.get("is_sym", True))}
    return [{**facts, "offset": offset, "enc_type": kind} for offset in offsets]


def _aimet_format(what: str, rows: Sequence[Mapping[str, Any]], info: LayerInfo | None) -> list[QuantFormat]:
    """The formats that have the grid of some rows. `info` is the layer of a weight, None for an input."""
    if not rows or any(row.get("dtype") != "int" for row in rows):
        raise ValueError(f"{what} is in floating point in the encodings; eqnet quantizes to integers.")
    first = rows[0]
    bits, symmetric, kind = first.get("bitwidth"), str(first.get("is_symmetric")) == "True", first.get("enc_type")
    if kind not in (None, "PER_TENSOR", "PER_CHANNEL"):
        raise ValueError(f"{what} has the encoding {kind}; a config has step sizes per tensor or per channel.")
    channels = 1 if info is None else info.channels
    if len(rows) not in (1, channels):
        raise ValueError(
            f"{what} has {len(rows)} step sizes for {channels} channels; a config has 1 or one per channel."
        )
    granularities: list[Granularity] = ["channel"] if kind == "PER_CHANNEL" or len(rows) > 1 else ["tensor"]
    if info is not None and channels == 1 and kind is None:
        granularities = ["tensor", "channel"]
    unsigned = kind is None and info is None and not symmetric and first.get("offset") == 0
    symmetries = [True, False] if unsigned else [symmetric]
    return [_format(what, bits, s, g) for g in granularities for s in symmetries]


def _format(what: str, bits: Any, symmetric: bool, granularity: Granularity) -> QuantFormat:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{what} has {bits!r} bits in the file; a config has {MIN_BITS} to {MAX_BITS}.")
    return QuantFormat(bits, symmetric, granularity)


# -- ModelOpt ----------------------------------------------------------------------------------------------------------


def config_to_modelopt(config: QuantConfig, layers: Iterable[LayerInfo]) -> dict[str, Any]:
    """A PTQ recipe with one entry for each quantizer, after one that turns all others off.

    ModelOpt calibrates step sizes of its own. Its `quantize` section is what `mtq.quantize` takes.

    Raises:
        ValueError: an asymmetric format, which ModelOpt's integer quantizers lack.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for info in layers:
        formats = config[info.name]
        for slot, fmt in (("weight", formats.weight), ("input", formats.act)):
            if fmt is None:
                continue
            if not fmt.symmetric:
                raise ValueError(
                    f"the {slot} of layer {info.name!r} is asymmetric, which ModelOpt's integer quantizers are not; search a "
                    "subnet of a form such as channel-sym-sym (--form)."
                )
            axis = info.channel_axis if fmt.granularity == "channel" else None
            unsigned = {"unsigned": True} if slot == "input" and not info.signed_input else {}
            cfg = {"num_bits": fmt.bits, "axis": axis, **unsigned}
            entries.append({"quantizer_name": f"{info.name}.{slot}_quantizer", "cfg": cfg})
    return {
        "metadata": {"recipe_type": "ptq", "description": "A subnet of an eqnet supernet."},
        "quantize": {"quant_cfg": entries, "algorithm": "max"},
    }


def config_from_modelopt(document: Any, layers: Iterable[LayerInfo]) -> QuantConfig:
    """The formats of a PTQ recipe, or of a config of `mtq.quantize` with its list of entries.

    Entries apply in order to the quantizers whose name their pattern matches, as in ModelOpt; the last one wins. Inputs that
    end up disabled are in floating point. Whether codes are unsigned is for the calibration of the supernet to say.

    Raises:
        ValueError: no list of entries; a weight left in floating point; floating-point, block-wise, dynamic or affine formats.
    """
    document = document.get("quantize", document) if isinstance(document, Mapping) else document
    entries = document.get("quant_cfg") if isinstance(document, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) and "quantizer_name" in e for e in entries):
        raise ValueError(
            "this is not a recipe of ModelOpt: it needs a list `quant_cfg` whose entries have a quantizer_name (resolve "
            "`$import` first, with load_recipe of ModelOpt)."
        )
    found = {}
    for info in layers:
        weight = _modelopt_format(f"the weight of layer {info.name!r}", "weight_quantizer", info, entries)
        if weight is None:
            raise ValueError(f"layer {info.name!r} has no weight quantizer in the recipe; eqnet quantizes every layer.")
        act = None
        if info.calls > 0:
            act = _modelopt_format(f"the input of layer {info.name!r}", "input_quantizer", info, entries)
        found[info.name] = LayerConfig(weight, act)
    return QuantConfig(found)


def _modelopt_format(
    what: str, quantizer: str, info: LayerInfo, entries: Sequence[Mapping[str, Any]]
) -> QuantFormat | None:
    """What the entries leave of one quantizer; None if it is disabled."""
    cfg: Any = {}
    enabled = True
    for entry in entries:
        parent = entry.get("parent_class")
        if parent is not None and parent not in _CLASSES[info.kind]:
            continue
        if fnmatch.fnmatch(f"{info.name}.{quantizer}", entry["quantizer_name"]):
            enabled = entry.get("enable", True)
            cfg = cfg if entry.get("cfg") is None else entry["cfg"]
    if not enabled:
        return None
    foreign = [key for key in ("block_sizes", "bias", "rotate") if isinstance(cfg, Mapping) and cfg.get(key)]
    if not isinstance(cfg, Mapping) or foreign or cfg.get("type", "static") != "static":
        reason = f"has {foreign[0]}" if foreign else "is quantized in a sequence, or dynamically"
        raise ValueError(f"{what} {reason} in the recipe; a config has static formats per tensor or per channel.")
    axis, dims = cfg.get("axis"), len(info.weight_shape)
    own = (info.channel_axis, info.channel_axis - dims) if quantizer == "weight_quantizer" else ()
    if axis is not None and axis not in own:
        raise ValueError(
            f"{what} has step sizes along the axis {axis}; a config has them per tensor or output channel."
        )
    return _format(what, cfg.get("num_bits", MAX_BITS), True, "tensor" if axis is None else "channel")
