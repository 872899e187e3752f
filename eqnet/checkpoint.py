"""Files that survive a kill: atomic writes of text, JSON and tensors, and reading of float weights in their usual wrappings.

A write goes to a temporary file in the same directory, is flushed to disk and then renamed over the target, so whatever
happens the target holds either all of the old content or all of the new. Whatever is wrong with a file that is read is a
`ValueError` that names it. Nothing that is read can run code: tensors come from safetensors files or from PyTorch files
loaded with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from eqnet.documents import parse_json, read_text

_WRAPPERS = (
    "state_dict_ema",
    "state_dict",
    "model",
)  # in order of preference; averaged weights are the ones to evaluate
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_LISTED_KEYS = 5


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file so that it holds either its old content or all of `data`, at any moment.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full; the old file is intact.
    """
    path = Path(path)
    # Created by `open`, not by `tempfile`, so that the file gets the usual permissions.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """Like `atomic_write_bytes`, in UTF-8 and with line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON, indented and in the order given, atomically.

    Raises:
        ValueError: `data` holds NaN or infinity, which JSON lacks.
        TypeError: `data` holds something else that JSON lacks.
    """
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"cannot write '{path}': {error}; write null or text instead.") from error
    atomic_write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: the file is missing, unreadable, truncated, not JSON, or beyond the limits of `eqnet.documents`.
    """
    return parse_json(read_text(path), f"'{path}'")


def read_object(path: str | Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON file that holds an object with these keys.

    Raises:
        ValueError: as `read_json`; the file holds something else, or a key is missing.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"'{path}' must hold an object; got a {type(data).__name__}.")
    missing = [key for key in keys if key not in data]
    if missing:
        raise ValueError(f"'{path}' is incomplete: {', '.join(missing)} missing.")
    return data


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes named tensors to a safetensors file, atomically.

    Args:
        path: the file.
        tensors: any device and layout. Tensors that share memory, as tied weights do, are stored once for each name.
    """
    # A copy for each name, because safetensors refuses shared memory and gaps.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    atomic_write_bytes(path, safetensors.torch.save(copies))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file; tensors are on the CPU.

    Raises:
        ValueError: the file is missing, unreadable, truncated or not a safetensors file.
    """
    data = _read_bytes(path)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # a damaged header fails in many ways
        raise ValueError(f"'{path}' is truncated or not a safetensors file.") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a network from a file of this or another project.

    A dict wrapped around the weights ("state_dict_ema", else "state_dict", else "model") is taken off, and so are the
    prefixes "module." and "_orig_mod." where every key has them.

    Args:
        path: a `.safetensors` file, or of any other name (`.pth`, `.pt`, `.th`) a file that `torch.save` wrote.

    Returns:
        Tensors on the CPU by name, without gradient.

    Raises:
        ValueError: the file is missing, unreadable, truncated, or holds anything but named tensors.
    """
    if Path(path).suffix == ".safetensors":
        content: Any = load_tensors(path)
    else:
        _check_is_file(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged zip archive or pickle fails in many ways
            raise ValueError(
                f"cannot read weights from '{path}': it is truncated, not a PyTorch file, or holds objects other than "
                "tensors and plain values."
            ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"cannot read weights from '{path}': it holds no dict of tensors.")
    odd = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"cannot read weights from '{path}': entries that are not named tensors: {_listed(odd)}.")
    return _without_prefixes({key: value.detach() for key, value in content.items()})


def load_float_weights(model: nn.Module, path: str | Path) -> None:
    """Loads the weights of a float network; all or nothing.

    Args:
        model: changed in place, unless this raises. Its own names must be those in the file, except that the counters
            `num_batches_tracked` of batch normalisation may be missing there.
        path: as for `read_weights`.

    Raises:
        ValueError: the file cannot be read, or keys are missing, unexpected or of another shape; the message lists them.
    """
    weights = read_weights(path)
    own = model.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    mismatched = [
        f"{key} ({list(weights[key].shape)} in the file, {list(own[key].shape)} in the model)"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    problems = [f"{what}: {_listed(keys)}" for what, keys in found.items() if keys]
    if problems:
        raise ValueError(f"weights in '{path}' do not fit {type(model).__name__}; keys {'; keys '.join(problems)}.")
    model.load_state_dict(weights, strict=False)


def _check_is_file(path: str | Path) -> None:
    """Raises ValueError if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"cannot read '{path}': there is no such file.")


def _read_bytes(path: str | Path) -> bytes:
    """All of a file; ValueError if it is missing or unreadable."""
    _check_is_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}.") from error


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes off prefixes that every key has, in whichever order and number wrappers have put them on."""
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _listed(keys: Iterable[str]) -> str:
    """The first few keys, and how many more there are."""
    keys = list(keys)
    text = ", ".join(keys[:_LISTED_KEYS])
    return f"{text} and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else text
