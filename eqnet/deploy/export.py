"""A subnet as an ONNX file for a hardware target: integer codes and step sizes exactly as trained, between Q/DQ nodes.

`export_onnx` writes two files. `NAME.onnx` is the network; the node of a quantized layer has the layer's name (see
`graph.py`). `NAME.onnx.json` says what it is:

    {"schema": "eqnet export 1",
     "file": "NAME.onnx", "sha256": ..., "target": NAME, "opset": ..., "batch": null | int,
     "input": {"name": "images", "size": [C, H, W], "mean": [...] | null, "std": [...] | null}, "output": "logits",
     "config": {layer: {"weight": format, "act": format | null}},
     "layers": {layer: {
         "nodes": [names], "op": "Conv" | "ConvTranspose" | "Gemm" | "MatMul" | another, "kernel": "integer" | "float",
         "reason": null | why it is computed in floating point,
         "weight": {"bits", "container", "granularity": of the scale in the file, "zero_point": bool, "turned": [channels],
                    "shift": k},
         "act": null | {"bits", "scale", "zero_point", "low", "high", "container"},
         "bias": null | {"dtype", "error": largest absolute rounding, "reason": null | why not as the target's rule says},
         "batch_norm": null | "folded" | why not}},
     "quantizers": {node: {"scale", "zero_point", "low", "high", "container"}},   added, calibrated on images
     "kept_grids": {node: {...}},   added behind operations that only move values, which do not change
     "source": {"run", "subnet", "sha256"} | {}, "versions": {...}}

Low and high are codes; `value = (code - zero_point) * scale`. In a layer that turned channels, their codes (and so the sign
of BN's factor) are negated or complemented. Codes of weights are `2**shift` times the trained ones. The description is written
first: an ONNX file always has one, and a description alone is an export that was killed, to be done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eqnet.checkpoint import atomic_write_bytes, read_object, write_json
from eqnet.deploy.codes import first_problem
from eqnet.deploy.trace import (
    IMAGES,
    LOWEST_OPSET,
    OUTPUT,
    quantized_layers,
    require_packages,
    trace_graph,
    trace_program,
)
from eqnet.space import LayerInfo, QuantConfig
from eqnet.space.hardware import HardwareTarget

if TYPE_CHECKING:
    import onnx_ir as ir

    from eqnet.deploy.graph import Layer

SCHEMA = "eqnet export 1"
_CONTAINER_OPSETS = {"int8": LOWEST_OPSET, "uint8": LOWEST_OPSET, "int4": 21, "int2": 25}
_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def export_onnx(
    subnet: nn.Module,
    config: QuantConfig,
    layers: Sequence[LayerInfo],
    target: HardwareTarget,
    path: str | Path,
    *,
    input_size: Sequence[int],
    images: Iterable[Tensor] | None = None,
    batch: int | None = None,
    pixels: Mapping[str, Any] | None = None,
    source: Mapping[str, str] | None = None,
    traced: ir.Model | None = None,
) -> dict[str, Any]:
    """Writes a subnet for a target.

    Args:
        subnet: from `Supernet.extract(config)`; not changed.
        config: its formats.
        layers: facts about its layers, e.g. `space.layers`.
        target: what will execute it.
        path: the file to write, ending with ".onnx"; its description gets ".json" appended.
        input_size: `(C, H, W)` of one image.
        images: batches [N, C, H, W], normalised as in training, to calibrate the quantizers that the target needs besides
            those of the subnet; required only where it needs any.
        batch: images per call; None leaves the number open.
        pixels: "mean" and "std" of each channel: how pixels in [0, 1] became inputs, for the description.
        source: where the subnet comes from: "run", "subnet", "sha256".
        traced: what `trace_graph` made of another subnet of the same supernet and BN statistics, for the same input size,
            opset and batch; not changed. Tracing takes most of the time of an export.

    Returns:
        The description, as in the file.

    Raises:
        ValueError: a file exists; the target cannot run the config or executes other codes than the subnet has; the config
            is not the subnet's; an operation has no export; images are missing; a package is missing (named).
    """
    require_packages("onnx", "onnx_ir", "onnxscript")
    from eqnet.deploy import graph as passes
    from eqnet.deploy.calibrate import calibrated_grids
    from eqnet.deploy.outputs import keep_grids, places, write_outputs

    path = Path(path)
    check_output(path)
    first_problem(target.check(config, layers))
    _check_belongs(subnet, config)
    found = passes.integer_layers(subnet, config, layers, target)
    opset = max(
        LOWEST_OPSET, target.opset or 0, *(_CONTAINER_OPSETS[layer.weight.container] for layer in found.values())
    )
    model = trace_graph(subnet, input_size, opset, batch) if traced is None else traced.clone()
    graph = model.graph
    passes.find_nodes(graph, found)
    passes.fold_norms(graph, found, target)
    passes.write_inputs(graph, found)
    passes.pool_strides(graph, found)
    passes.round_biases(found)
    passes.write_weights(graph, found)
    passes.write_biases(graph, found)
    wanted, grids = places(graph, found, target), {}
    kept = {}
    if wanted:
        if images is None:
            raise ValueError(
                f"{target.name} needs {len(wanted)} more tensors quantized; give images to calibrate them."
            )
        grids = write_outputs(graph, wanted, calibrated_grids(model, wanted, images))
    if target.integer_add:
        kept = keep_grids(graph)
    data = _serialise(model)
    sidecar = {
        "schema": SCHEMA,
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "target": target.name,
        "opset": opset,
        "batch": batch,
        "input": {
            "name": IMAGES,
            "size": list(input_size),
            **{name: (pixels or {}).get(name) for name in ("mean", "std")},
        },
        "output": OUTPUT,
        "config": config.to_json(),
        "layers": {name: _describe(layer) for name, layer in found.items()},
        "quantizers": {name: grid.to_json() for name, grid in grids.items()},
        "kept_grids": {name: grid.to_json() for name, grid in kept.items()},
        "source": dict(source or {}),
        "versions": _versions(),
    }
    write_json(sidecar_path(path), sidecar)
    atomic_write_bytes(path, data)
    return sidecar


def export_torch(subnet: nn.Module, path: str | Path, *, input_size: Sequence[int], batch: int | None = None) -> None:
    """Writes a subnet as a `torch.export` program, whose outputs equal the subnet's bit for bit.

    Args:
        subnet: from `Supernet.extract`; not changed.
        path: the file to write, ending with ".pt2".
        input_size: `(C, H, W)` of one image.
        batch: images per call; None leaves the number open.

    Raises:
        ValueError: the file exists, or torch cannot export the model.
    """
    path = Path(path)
    check_output(path, ".pt2")
    program, file = trace_program(subnet, input_size, batch), io.BytesIO()
    torch.export.save(program, file)
    atomic_write_bytes(path, file.getvalue())


def sidecar_path(path: str | Path) -> Path:
    """The description beside an exported file."""
    return Path(f"{path}.json")


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """The description of an exported file.

    Raises:
        ValueError: there is none, it is damaged, or it describes another file.
    """
    content = read_object(sidecar_path(path))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{sidecar_path(path)} is not the description of an export ({SCHEMA}).")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    if hashlib.sha256(data).hexdigest() != content.get("sha256"):
        raise ValueError(f"{path} is not the file that {sidecar_path(path)} describes; export it again.")
    return content


def check_output(path: Path, suffix: str = ".onnx") -> None:
    """Raises ValueError if the file or its description exists, or the name or folder is wrong."""
    if path.suffix != suffix:
        raise ValueError(f"the output {path} must end with {suffix}.")
    for existing in (path, sidecar_path(path)):
        if existing.exists() and not (existing != path and _is_unfinished(path)):
            raise ValueError(f"{existing} already exists; remove it or give another --output.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of the output {path} does not exist.")


def _is_unfinished(path: Path) -> bool:
    """Whether there is a description of a file that an export was killed before writing."""
    if path.exists():
        return False
    with contextlib.suppress(ValueError):
        return bool(read_object(sidecar_path(path)).get("schema") == SCHEMA)
    return False


def _check_belongs(subnet: nn.Module, config: QuantConfig) -> None:
    """Raises ValueError if the formats of the config are not those of the subnet's codes."""
    modules = quantized_layers(subnet)
    wrong = sorted(set(modules) ^ set(config))
    if wrong:
        raise ValueError(f"the config does not belong to this subnet: {', '.join(wrong[:5])} on one side only.")
    for name, module in modules.items():
        weight, act = config[name].weight, config[name].act
        half = 2 ** (weight.bits - 1)
        problem = None
        if not -half <= int(module.weight_codes.min()) <= int(module.weight_codes.max()) < half:
            problem = f"its weight codes need more than {weight.bits} bits"
        elif weight.symmetric and bool(module.weight_zero_point.any()):
            problem = "its weight has a zero point"
        elif weight.granularity == "tensor" and bool((module.weight_scale != module.weight_scale.flatten()[0]).any()):
            problem = "its weight has a step size for each channel"
        elif act is None and module.act_scale is not None:
            problem = "its input is quantized"
        elif act is not None and module.act_scale is not None and module.act_qmax - module.act_qmin > 2**act.bits - 1:
            problem = f"its input needs more than {act.bits} bits"
        if problem:
            raise ValueError(f"the config does not belong to this subnet: layer {name!r}: {problem}.")


def _serialise(model: ir.Model) -> bytes:
    """The file: unused constants removed, the sources of nodes (paths of this machine) left out."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    output = model.graph.outputs[0]
    if output.name != OUTPUT and output.producer() is not None:  # a quantizer was put behind it
        for value in [value for node in model.graph for value in node.outputs if value.name == OUTPUT]:
            value.name = f"{OUTPUT}/float"
        output.name = OUTPUT
    model = RemoveUnusedNodesPass()(model).model
    model.graph.sort()
    for node in model.graph:
        node.metadata_props.clear()
    for value in [*model.graph.initializers.values(), *(out for node in model.graph for out in node.outputs)]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "eqnet", None, None
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def _describe(layer: Layer) -> dict[str, Any]:
    weight, act = layer.weight, layer.chosen.act
    reason = None
    if layer.grid is None:
        reason = "its weight is read directly" if layer.info.calls == 0 else "its input stays in floating point"
    elif layer.rules.kernel == "float":
        reason = "the target has no integer kernel for this operation"
    elif not layer.integer:
        reason = f"its weight is read by {layer.nodes[0].op_type}"
    rounded = layer.rounded
    bias = {
        "dtype": "float32" if rounded is None else rounded.codes.dtype.name,
        "error": 0.0 if rounded is None else rounded.error,
        "reason": layer.bias_reason,
    }
    return {
        "nodes": [node.name for node in layer.nodes],
        "op": layer.nodes[0].op_type,
        "kernel": "integer" if layer.integer else "float",
        "reason": reason,
        "weight": {
            "bits": layer.chosen.weight.bits,
            "container": weight.container,
            "granularity": "tensor" if weight.scale.size == 1 else "channel",
            "zero_point": bool(weight.zero_point.any()),
            "turned": list(weight.turned),
            "shift": weight.shift,
        },
        "act": None if layer.grid is None or act is None else {"bits": act.bits, **layer.grid.to_json()},
        "bias": None if layer.bias is None else bias,
        "batch_norm": layer.batch_norm,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("eqnet", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
