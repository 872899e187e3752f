"""Latency tables: milliseconds of single layers by shape and formats, measured once and added up.

A table is a JSON file (`LatencyTable.to_json`) or a CSV file with one row per layer and pair of formats:

    kind,weight_shape,act_numel,macs,weight_bits,weight_symmetric,weight_granularity,act_bits,act_symmetric,ms
    conv,32x16x3x3,16384,4718592,8,true,channel,8,false,0.104

`act_bits` is `float` for inputs in floating point. A row of the kind `overhead` with nothing but `ms` is what a whole model
takes besides its layers. Other columns are ignored.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from eqnet.documents import parse_json, read_text
from eqnet.space.cost import CostModel
from eqnet.space.hardware import HardwareTarget
from eqnet.space.qconfig import LayerInfo, QuantFormat
from eqnet.space.space import QuantSpace

SCHEMA = "eqnet latency table 1"
KINDS = get_args(get_type_hints(LayerInfo)["kind"])
COLUMNS = (
    *("kind", "weight_shape", "act_numel", "macs"),
    *("weight_bits", "weight_symmetric", "weight_granularity", "act_bits", "act_symmetric", "ms"),
)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the time of a layer depends on, beside its formats; two layers of one shape share their entries."""

    kind: str
    weight_shape: tuple[int, ...]
    act_numel: int
    macs: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {', '.join(KINDS)} or overhead; got {self.kind!r}")
        if not self.weight_shape or min(self.weight_shape) < 1 or self.act_numel < 0 or self.macs < 0:
            raise ValueError("weight_shape must hold positive sizes; act_numel and macs must not be negative")

    @staticmethod
    def of(layer: LayerInfo) -> LayerShape:
        """The shape of a layer."""
        return LayerShape(layer.kind, layer.weight_shape, layer.act_numel, layer.macs)

    def __str__(self) -> str:
        size = "x".join(map(str, self.weight_shape))
        return f"{self.kind} {size}, {self.act_numel} input elements, {self.macs} MACs"


Key = tuple[LayerShape, QuantFormat, QuantFormat | None]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of layers.

    Attributes:
        entries: time of a layer per image, all its calls together, by shape, weight format and activation format (None:
            floating point).
        overhead_ms: what a whole model takes besides its layers.
        facts: where the numbers come from: target, runtime and its version, machine, threads.
    """

    entries: Mapping[Key, float]
    overhead_ms: float = 0.0
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (shape, _, _), ms in self.entries.items():
            if not 0 < ms < math.inf:
                raise ValueError(f"the time of a layer must be a positive number of milliseconds; {shape} has {ms}.")
        if not 0 <= self.overhead_ms < math.inf:
            raise ValueError(f"the overhead must be a number of milliseconds; got {self.overhead_ms}.")

    def ms(self, layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        """Time of a layer. Raises ValueError naming layer and formats if it was not measured."""
        shape = LayerShape.of(layer)
        found = self.entries.get((shape, weight, act))
        if found is not None:
            return found
        measured = [_formats_text(w, a) for s, w, a in self.entries if s == shape]
        listed = f"it has {'; '.join(measured[:3])}{' and others' * (len(measured) > 3)}" if measured else "it has none"
        raise ValueError(
            f"the latency table has no entry for layer {layer.name!r} ({shape}) with {_formats_text(weight, act)}; {listed} "
            "of this shape. Measure it, or restrict the space to what the table holds."
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        rows = [
            {
                "kind": shape.kind,
                "weight_shape": list(shape.weight_shape),
                "act_numel": shape.act_numel,
                "macs": shape.macs,
                "weight": weight.to_json(),
                "act": None if act is None else act.to_json(),
                "ms": ms,
            }
            for (shape, weight, act), ms in self.entries.items()
        ]
        return {"schema": SCHEMA, "facts": dict(self.facts), "overhead_ms": self.overhead_ms, "entries": rows}

    @staticmethod
    def from_json(data: Any) -> LatencyTable:
        """Inverse of `to_json`. Raises ValueError naming the first entry that is wrong."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ValueError(f"not a latency table: the key 'schema' must be {SCHEMA!r}.")
        try:
            rows, overhead, facts = data["entries"], float(data["overhead_ms"]), dict(data["facts"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a latency table: {error}.") from error
        if not isinstance(rows, list):
            raise ValueError("not a latency table: entries must be a list.")
        return _collect(((f"entry {i}", row) for i, row in enumerate(rows)), _json_row, overhead, facts)


def read_latency_table(path: str | Path) -> LatencyTable:
    """A table from a `.json` or `.csv` file.

    Raises:
        ValueError: unreadable file, or a column or entry that is missing, wrong or given twice (file, line, column).
    """
    path = Path(path)
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"a latency table is a .json or .csv file; got {path}.")
    text = read_text(path, kind="latency table")
    data = parse_json(text, str(path)) if path.suffix == ".json" else None
    try:
        return _read_csv(text) if path.suffix == ".csv" else LatencyTable.from_json(data)
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def latency_cost(space: QuantSpace, table: LatencyTable, target: HardwareTarget | None = None) -> CostModel:
    """Milliseconds per image: the sum over layers of their entries, plus the overhead.

    Layers without MACs (never executed) cost nothing.

    Args:
        space: every format of every layer needs an entry.
        table: measured times.
        target: looks formats up at the width of their container, so that one entry serves all codes that run on the same
            kernel; narrower activations have an entry of their own if the table knows the time of clipped codes
            (`HardwareTarget.timed`). None looks up every format itself.

    Raises:
        ValueError: a missing entry (layer and formats), or a format that the target does not run.
    """

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        if layer.macs == 0:
            return 0.0
        if target is not None:
            weight = target.executed(layer, "weight", weight)
            clipped = None if act is None else target.timed(layer, "act", act)
            act = None if act is None else target.executed(layer, "act", act)
            act = clipped if (LayerShape.of(layer), weight, clipped) in table.entries else act
        return table.ms(layer, weight, act)

    return CostModel(space, "latency", "ms", measure, constant=table.overhead_ms)


def _formats_text(weight: QuantFormat, act: QuantFormat | None) -> str:
    def text(fmt: QuantFormat) -> str:
        return f"{fmt.bits}-bit {'' if fmt.symmetric else 'a'}symmetric"

    inputs = "inputs in floating point" if act is None else f"{text(act)} activations"
    return f"{text(weight)} weights per {weight.granularity} and {inputs}"


def _collect(
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[Any], tuple[Key, float]],
    overhead: float,
    facts: Mapping[str, str],
) -> LatencyTable:
    """A table of parsed rows, each with the name of its place."""
    entries: dict[Key, float] = {}
    places: dict[Key, str] = {}
    for place, row in rows:
        try:
            key, ms = parse(row)
            if not 0 < ms < math.inf:
                raise ValueError(f"ms must be a positive number; got {ms}")
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(f"{place}: {problem}.") from error
        if key in entries:
            raise ValueError(f"{place}: {key[0]} with {_formats_text(*key[1:])} is given twice (first: {places[key]}).")
        entries[key], places[key] = ms, place
    return LatencyTable(entries, overhead, facts)


def _json_row(row: Mapping[str, Any]) -> tuple[Key, float]:
    numbers = [*row["weight_shape"], row["act_numel"], row["macs"]]
    if not all(isinstance(n, int) for n in numbers):
        raise ValueError("weight_shape, act_numel and macs must be whole numbers")
    act = None if row["act"] is None else QuantFormat.from_json(row["act"])
    shape = LayerShape(row["kind"], tuple(row["weight_shape"]), row["act_numel"], row["macs"])
    return (shape, QuantFormat.from_json(row["weight"]), act), float(row["ms"])


def _read_csv(text: str) -> LatencyTable:
    reader = csv.DictReader(text.splitlines(), strict=True, skipinitialspace=True)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"line 1: the columns {', '.join(missing)} are missing; a table has {', '.join(COLUMNS)}.")
    rows: list[tuple[str, dict[str, str]]] = []
    overheads: list[tuple[str, dict[str, str]]] = []
    for row in reader:
        cells = {name: (row[name] or "").strip() for name in COLUMNS}
        (overheads if cells["kind"] == "overhead" else rows).append((f"line {reader.line_num}", cells))
    if len(overheads) > 1:
        raise ValueError(f"{overheads[1][0]}: the overhead is given twice (first: {overheads[0][0]}).")
    overhead = 0.0
    for place, cells in overheads:
        try:
            overhead = _number(cells, "ms", float)
        except ValueError as error:
            raise ValueError(f"{place}: {error}.") from error
    return _collect(rows, _csv_row, overhead, {})


def _csv_row(cells: Mapping[str, str]) -> tuple[Key, float]:
    try:
        weight_shape = tuple(int(size) for size in cells["weight_shape"].split("x"))
    except ValueError:
        raise ValueError(f"weight_shape is written like 32x16x3x3; got {cells['weight_shape']!r}") from None
    shape = LayerShape(cells["kind"], weight_shape, _number(cells, "act_numel", int), _number(cells, "macs", int))
    granularity: Any = cells["weight_granularity"]  # checked by QuantFormat
    weight = QuantFormat(_number(cells, "weight_bits", int), _truth(cells, "weight_symmetric"), granularity)
    act = None
    if cells["act_bits"] != "float":
        act = QuantFormat(_number(cells, "act_bits", int), _truth(cells, "act_symmetric"))
    return (shape, weight, act), _number(cells, "ms", float)


def _number(cells: Mapping[str, str], name: str, kind: type[Any]) -> Any:
    try:
        return kind(cells[name])
    except ValueError:
        raise ValueError(f"{name} must be a {'whole ' * (kind is int)}number; got {cells[name]!r}") from None


def _truth(cells: Mapping[str, str], name: str) -> bool:
    if cells[name].lower() not in ("true", "false"):
        raise ValueError(f"{name} must be true or false; got {cells[name]!r}")
    return cells[name].lower() == "true"
