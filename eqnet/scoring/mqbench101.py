"""The published table of EMQ (arXiv 2307.10554): reads the pickle of MQ-Bench-101 without running what it holds.

The format is `{number: {"bit_cfg": "[4, 3, ...]", "acc": accuracy in percent}}`: bit-widths of the weights of a ResNet-18, first
convolution, block convolutions, classifier. Down-sampling convolutions are not listed; each inherits the bits of the entry
before it. Names are not in the file and must be given.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqnet.documents import parse_json
from eqnet.scoring.mqbench import Benchmark, search_half
from eqnet.space import LayerConfig, LayerInfo, QuantConfig, QuantFormat, QuantSpace


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, strings and numbers; refuses anything that would call code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


def read_mqbench101(path: Path, layers: Sequence[str], act_bits: int = 8, seed: int = 0) -> Benchmark:
    """Reads a pickle of MQ-Bench-101: `{number: {"bit_cfg": "[4, 3, ...]", "acc": accuracy in percent}}`.

    Only plain containers, strings and numbers are unpickled. The file names no layers, so they must be given: one for each
    entry. Shapes and MACs of layers are unknown, so only what needs no statistics can rank such a table.

    Args:
        path: the file.
        layers: names, in the order of the bit vectors.
        act_bits: of all inputs; the file does not say.
        seed: of the search half.

    Raises:
        ValueError: the file is not such a pickle, a vector has another length than `layers`, or a config appears twice.
    """
    try:
        content = _PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}.") from error
    except Exception as error:  # damaged pickles fail in many ways
        raise ValueError(f"'{path}' is not a plain pickle of MQ-Bench-101: {error}.") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"'{path}' is not a pickle of MQ-Bench-101: it holds no dict of configs.")
    vectors, accuracy = [], []
    for number, entry in content.items():
        try:
            vectors.append(parse_bits(entry["bit_cfg"]))
            accuracy.append(float(entry["acc"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}', entry {number}: not a bit_cfg with acc ({error}).") from error
        if len(vectors[-1]) != len(layers):
            raise ValueError(
                f"'{path}', entry {number}: {len(vectors[-1])} bit-widths for {len(layers)} layer names; name each layer."
            )
    bits = sorted({b for vector in vectors for b in vector})
    infos = [LayerInfo(name, "conv", (1, 1, 1, 1), 1, 1) for name in layers]
    space = QuantSpace.from_layers(infos, bits, [act_bits], (True,), ("channel",), fixed="none")
    act = QuantFormat(act_bits)
    configs = [
        {name: LayerConfig(QuantFormat(b, True, "channel"), act) for name, b in zip(layers, vector, strict=True)}
        for vector in vectors
    ]
    genomes = space.encode_all(QuantConfig(config) for config in configs)
    search, drawn = search_half(len(genomes), seed), ("random",) * len(genomes)
    return Benchmark(space, genomes, np.array(accuracy), search, drawn, {"source": str(path)})


def parse_bits(value: Any) -> tuple[int, ...]:
    """A bit vector from a list, a tuple or the text of one.

    Examples:
        >>> parse_bits("[4, 3, 2]") == parse_bits((4, 3, 2)) == parse_bits([4, 3, 2])
        True
    """
    found = parse_json(value, "the text") if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(type(b) is int for b in found):
        raise ValueError(f"{reprlib.repr(value)} is not a list of whole numbers")
    return tuple(found)
