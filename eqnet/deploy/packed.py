"""Packed weights: a subnet in one safetensors file, b-bit codes in b bits each.

The tensors of the file take exactly the bytes that `eqnet.space.model_size` counts, and nothing else is needed to run the
subnet but the architecture:

| tensor | dtype and shape | stored for |
|---|---|---|
| `<layer>.weight_codes` | uint8 [ceil(weights * bits / 8)] | every quantized layer |
| `<layer>.weight_scale` | float32 [1], or [C] per output channel | every quantized layer |
| `<layer>.weight_zero_point` | int8, as many | asymmetric weights |
| `<layer>.act_scale` | float32 [1] | quantized inputs |
| `<layer>.act_zero_point` | uint8, or int8 for signed inputs, [1] | asymmetric quantized inputs |
| any other name | float32 | biases, BN, embeddings; shared tensors once |

Codes are counted from the lowest one of their bit-width, so they are non-negative, and fill the bytes of their layer from the
lowest bit of the first byte on, in the order of the weight tensor (row-major). The header of the file holds the config, which
inputs are signed, and a checksum of names and tensors. BN counters are not stored: only training reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from eqnet.checkpoint import atomic_write_bytes, load_tensors
from eqnet.documents import parse_json
from eqnet.nn.functional import code_range
from eqnet.nn.layers import LAYER_TYPES, QuantizedLayer, become_quantized
from eqnet.space import LayerConfig, LayerInfo, QuantConfig, QuantFormat

SCHEMA = "eqnet packed weights 1"
COUNTERS = "num_batches_tracked"
BUFFERS = (
    *("weight_codes", "weight_scale", "weight_zero_point"),
    *("act_scale", "act_zero_point", "act_qmin", "act_qmax"),
)


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file.

    Attributes:
        tensors: data of the tensors; equals `model_size` of the config.
        header: names, shapes, config and checksum.
    """

    tensors: int
    header: int


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits without gaps.

    Args:
        codes: whole numbers from 0 to `2**bits - 1`, any shape.
        bits: 1 to 8.

    Returns:
        uint8 [ceil(codes * bits / 8)]; the first code in the lowest bits of the first byte.

    Examples:
        >>> pack_codes(torch.tensor([1, 2, 3]), 4)
        tensor([33,  3], dtype=torch.uint8)
    """
    planes = np.unpackbits(codes.to(torch.uint8).numpy().reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [count].

    Examples:
        >>> unpack_codes(torch.tensor([33, 3], dtype=torch.uint8), 4, 3)
        tensor([1, 2, 3], dtype=torch.uint8)
    """
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little").reshape(-1))


def save_packed(subnet: nn.Module, config: QuantConfig, layers: Sequence[LayerInfo], path: str | Path) -> PackedSize:
    """Writes a subnet, atomically.

    Args:
        subnet: of `Supernet.extract`.
        config: its config.
        layers: facts about its quantized layers, `space.layers`.
        path: a `.safetensors` file.

    Raises:
        ValueError: the subnet is not one of this config, or keeps values that the file has no place for (named).
    """
    modules = _modules(subnet, config, layers)
    tensors: dict[str, Tensor] = {}
    signed: dict[str, bool] = {}
    for info in layers:
        module: Any = modules[info.name]
        if not isinstance(module, QuantizedLayer):
            raise ValueError(f"layer {info.name!r} is not quantized; pack a subnet of Supernet.extract.")
        tensors |= {f"{info.name}.{k}": t for k, t in _packed_weight(module, info, config[info.name].weight).items()}
        act = config[info.name].act
        if (act is None) != (module.act_scale is None):
            raise ValueError(f"layer {info.name!r}: the config and the subnet differ in whether inputs are quantized.")
        if act is not None:
            signed[info.name] = float(module.act_qmin) < 0
            tensors |= {f"{info.name}.{k}": t for k, t in _packed_act(module, info, act, signed[info.name]).items()}
    tensors |= _floats(_state(subnet), {f"{layer.name}.{name}" for layer in layers for name in BUFFERS})
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {
        "schema": SCHEMA,
        "config": json.dumps(config.to_json()),
        "signed_inputs": json.dumps(signed),
        "sha256": _digest(tensors),
    }
    atomic_write_bytes(path, safetensors.torch.save(tensors, header))
    return packed_size(path)


def load_packed(path: str | Path, model: nn.Module) -> nn.Module:
    """Reads a subnet; its outputs are those of the one that was saved, bit for bit.

    Args:
        path: a file of `save_packed`.
        model: the float network that the supernet was built from, with any weights; changed in place.

    Returns:
        `model`, in eval mode.

    Raises:
        ValueError: the file is damaged or no packed file, or belongs to another model (what does not fit). `model` is left
            as it was.
    """
    header, tensors = _read(path)
    config, signed = _contents(path, header)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, LAYER_TYPES)}
    weights = {name: m._parameters["weight"] for name, m in modules.items()}
    if set(modules) != set(config):
        wrong = sorted(set(modules) ^ set(config))
        raise ValueError(f"{path} belongs to another model: layers {', '.join(wrong[:5])} are on one side only.")
    floats = _floats(_state(model), {f"{name}.{part}" for name in modules for part in ("weight", "gain")})
    expected = {name: (tuple(t.shape), torch.float32) for name, t in floats.items()}
    for name, module in modules.items():
        expected |= {
            f"{name}.{part}": kind
            for part, kind in _layout(module, weights[name], config[name], signed.get(name)).items()
        }
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    wrong = sorted({name for name, _ in expected.items() ^ found.items()})
    if wrong:
        raise ValueError(f"{path} belongs to another model; these tensors do not fit: {', '.join(wrong[:5])}.")
    for name, module in modules.items():
        become_quantized(module, _buffers(name, weights[name], module, config, signed, tensors))
    with torch.no_grad():
        for name, tensor in floats.items():
            tensor.copy_(tensors[name])
    return model.eval()


def packed_size(path: str | Path) -> PackedSize:
    """Bytes of the tensors and of the header of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    tensors = sum(t.numel() * t.element_size() for t in load_tensors(path).values())
    return PackedSize(tensors, Path(path).stat().st_size - tensors)


# -- saving -----------------------------------------------------------------------------------------------------------


def _modules(subnet: nn.Module, config: QuantConfig, layers: Sequence[LayerInfo]) -> dict[str, nn.Module]:
    modules = dict(subnet.named_modules())
    wrong = sorted({layer.name for layer in layers} ^ set(config))
    wrong += [layer.name for layer in layers if layer.name not in modules]
    if wrong:
        raise ValueError(
            f"subnet, config and layers do not belong together: {', '.join(wrong[:5])} missing in one of them."
        )
    return modules


def _packed_weight(module: Any, info: LayerInfo, fmt: QuantFormat) -> dict[str, Tensor]:
    low, high = code_range(fmt.bits, True)
    codes = module.weight_codes.cpu().to(torch.int16)
    if int(codes.min()) < low or int(codes.max()) > high:
        raise ValueError(f"layer {info.name!r}: the subnet has weight codes of more than {fmt.bits} bits.")
    scale, zero_point = module.weight_scale.reshape(-1), module.weight_zero_point.reshape(-1)
    if fmt.granularity == "tensor":
        scale, zero_point = _single(scale, info), _single(zero_point, info)
    packed = {"weight_codes": pack_codes(codes - low, fmt.bits), "weight_scale": scale}
    if fmt.symmetric and bool(zero_point.any()):
        raise ValueError(f"layer {info.name!r}: the subnet has weight zero points, its format is symmetric.")
    return packed if fmt.symmetric else packed | {"weight_zero_point": zero_point.to(torch.int8)}


def _single(values: Tensor, info: LayerInfo) -> Tensor:
    """The one value of a format per tensor, which is repeated for every channel."""
    if bool((values != values[0]).any()):
        raise ValueError(f"layer {info.name!r}: the subnet has a step size per channel, its format is per tensor.")
    return values[:1]


def _packed_act(module: Any, info: LayerInfo, fmt: QuantFormat, signed: bool) -> dict[str, Tensor]:
    if (float(module.act_qmin), float(module.act_qmax)) != code_range(fmt.bits, signed):
        raise ValueError(f"layer {info.name!r}: the subnet does not have {fmt.bits}-bit inputs.")
    packed = {"act_scale": module.act_scale.reshape(1)}
    zero_point = module.act_zero_point.reshape(1)
    if fmt.symmetric and bool(zero_point):
        raise ValueError(f"layer {info.name!r}: the subnet has an activation zero point, its format is symmetric.")
    return (
        packed if fmt.symmetric else packed | {"act_zero_point": zero_point.to(torch.int8 if signed else torch.uint8)}
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """State of a model, tensors that are shared still shared."""
    return model.state_dict(keep_vars=True)


def _floats(state: Mapping[str, Tensor], quantized: Collection[str]) -> dict[str, Tensor]:
    """What stays in float32, shared tensors under their first name only."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        if name in quantized or name.endswith(COUNTERS):
            continue
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}; a packed file keeps what is not quantized in float32.")
        tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


# -- loading ----------------------------------------------------------------------------------------------------------


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    tensors = load_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata() or {}
    if header.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a file of packed weights; its header must say {SCHEMA!r}.")
    if header.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors do not have the checksum in its header.")
    return header, tensors


def _contents(path: str | Path, header: Mapping[str, str]) -> tuple[QuantConfig, dict[str, bool]]:
    try:
        config, signed = QuantConfig.from_json(header["config"]), parse_json(header["signed_inputs"], "signed_inputs")
        if set(signed) != {name for name, chosen in config.items() if chosen.act is not None}:
            raise ValueError("signed_inputs must name the layers with quantized inputs")
        return config, signed
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its header has no valid config ({str(error).rstrip('.')}).") from error


def _layout(
    module: nn.Module, weight: Any, chosen: LayerConfig, signed: bool | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors of one layer."""
    channels = weight.shape[1 if isinstance(module, nn.ConvTranspose2d) else 0]
    steps = channels if chosen.weight.granularity == "channel" else 1
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_codes": ((-(-weight.numel() * chosen.weight.bits // 8),), torch.uint8),
        "weight_scale": ((steps,), torch.float32),
    }
    if not chosen.weight.symmetric:
        layout["weight_zero_point"] = ((steps,), torch.int8)
    if chosen.act is not None:
        layout["act_scale"] = ((1,), torch.float32)
        if not chosen.act.symmetric:
            layout["act_zero_point"] = ((1,), torch.int8 if signed else torch.uint8)
    return layout


def _buffers(
    name: str,
    weight: Any,
    module: nn.Module,
    config: QuantConfig,
    signed: Mapping[str, bool],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor | None]:
    """The buffers of a `QuantizedLayer`."""
    fmt, act = config[name].weight, config[name].act
    axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    broadcast = [size if d == axis else 1 for d, size in enumerate(weight.shape)]
    codes = unpack_codes(tensors[f"{name}.weight_codes"], fmt.bits, weight.numel()).to(torch.int16)
    scale = tensors[f"{name}.weight_scale"]
    zero_point = tensors.get(f"{name}.weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
    buffers: dict[str, Tensor | None] = {
        "weight_codes": (codes + code_range(fmt.bits, True)[0]).to(torch.int8).view(weight.shape),
        "weight_scale": scale.expand(weight.shape[axis]).reshape(broadcast).clone(),
        "weight_zero_point": zero_point.expand(weight.shape[axis]).reshape(broadcast).clone(),
        "act_scale": None,
    }
    if act is not None:
        qmin, qmax = code_range(act.bits, signed[name])
        zero = tensors.get(f"{name}.act_zero_point", torch.zeros(1, dtype=torch.int8))
        buffers["act_scale"] = tensors[f"{name}.act_scale"]
        buffers["act_zero_point"] = zero.to(torch.float32)
        buffers["act_qmin"], buffers["act_qmax"] = torch.tensor(float(qmin)), torch.tensor(float(qmax))
    return {key: None if t is None else t.to(weight.device) for key, t in buffers.items()}
