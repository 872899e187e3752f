"""Reading of JSON and YAML that somebody else may have written: bounded in size and depth, plain values only.

Whatever is wrong is a `ValueError` that names the file or text. YAML is read by the safe loader, so neither format can build
objects or run code. Needs no torch.
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_JSON_BYTES = 256 * 2**20  # the split of ImageNet takes 20 MB
MAX_YAML_BYTES = 2**20  # settings and targets take a few kB, and YAML is parsed slowly
MAX_YAML_NODES = 200_000  # after aliases are followed
MAX_DEPTH = 64
MAX_DIGITS = 300  # of an integer; a float has no more
_PLAIN = (str, int, float, bool, type(None))


def read_text(path: str | Path, limit: int = MAX_JSON_BYTES, kind: str = "") -> str:
    """All of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        limit: bytes it may have.
        kind: what a message calls it, e.g. "settings file".

    Raises:
        ValueError: the file is missing, unreadable, too large, not regular or not UTF-8.
    """
    source = f"the {kind} {path}" if kind else f"'{path}'"
    try:
        facts = Path(path).stat()
        if not stat.S_ISREG(facts.st_mode):  # a device or a pipe may have no end
            raise ValueError(f"cannot read {source}: it is not a file.")
        if facts.st_size > limit:
            raise ValueError(f"cannot read {source}: it has {facts.st_size} bytes, more than {limit}.")
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}.") from error
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}.") from error


def parse_json(text: str, source: str) -> Any:
    """JSON text as plain values.

    Args:
        text: the text.
        source: what a message calls it, e.g. the path of its file.

    Raises:
        ValueError: the text is truncated, not JSON, holds NaN or infinity, or is nested deeper than `MAX_DEPTH`.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        data = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not a JSON file, or truncated: {error}.") from error
    _check_plain(data, source)
    return data


def parse_yaml(text: str, source: str) -> Any:
    """YAML text as plain values; dates and the like are refused.

    Args:
        text: the text.
        source: what a message calls it.

    Raises:
        ValueError: the text is not YAML, is too large or too deep, or holds other values than those of JSON.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{source} is longer than {MAX_YAML_BYTES} characters.")
    try:
        data = yaml.load(text, Loader=_BoundedLoader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML lets through errors of numbers, dates and the like that it cannot build
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ValueError(f"{source} is not a YAML file: {reason}.") from error
    _check_plain(data, source)
    return data


def read_yaml(path: str | Path, kind: str = "") -> Any:
    """A YAML file as plain values; `kind` and errors as for `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, MAX_YAML_BYTES, kind), str(path))


class _BoundedLoader(yaml.SafeLoader):
    """Refuses, before anything is built, documents whose aliases multiply to more than `MAX_YAML_NODES`."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _expanded_nodes(node, {}, 0) > MAX_YAML_NODES:
            raise yaml.YAMLError(f"it holds more than {MAX_YAML_NODES} values")
        return self.construct_document(node)


def _expanded_nodes(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Nodes below and with `node` as if every alias were a copy."""
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        known[id(node)] = 1 + sum(_expanded_nodes(child, known, depth + 1) for child in children)
    return known[id(node)]


def _check_plain(data: Any, source: str) -> None:
    """Raises ValueError for values that JSON lacks and for deep nesting."""
    level, depth = [data], 0
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                odd = next((key for key in value if not isinstance(key, str)), None)
                if odd is not None:
                    raise ValueError(f"{source} has the key {str(odd)[:50]}, which is no text; put it in quotes.")
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif not isinstance(value, _PLAIN):
                raise ValueError(f"{source} holds a {type(value).__name__}, which is no plain value; put it in quotes.")
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{source} holds {value}, which is not a finite number.")
            elif isinstance(value, int) and abs(value) > 10**MAX_DIGITS:
                raise ValueError(f"{source} holds a whole number of more than {MAX_DIGITS} digits.")
        level, depth = inner, depth + 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{source} is nested deeper than {MAX_DEPTH} levels.")
