"""Figures of a benchmark as tables, on the console and in `docs/performance.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.timing import machine
from eqnet.checkpoint import write_json


def statistics(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, of several values, sample standard deviation, in a number format.

    >>> statistics([1.0, 3.0]), statistics([1.0])
    ('2.00 ± 1.41', '1.00')
    """
    spread = f" ± {np.std(values, ddof=1):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


class Figures(NamedTuple):
    """One table: rows by name, each a figure per column."""

    title: str
    columns: list[str]
    rows: dict[str, list[str]]


def figure(value: Any) -> str:
    """A cell: three significant digits, whole numbers in full.

    >>> figure(0.123456), figure(1234.5), figure([1.0, 2.0]), figure(None), figure("x"), figure(7)
    ('0.123', '1234', '1 - 2', '', 'x', '7')
    """
    if isinstance(value, list):
        return " - ".join(figure(v) for v in value)
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def tables(title: str, rows: dict[str, Any]) -> Iterator[Figures]:
    """Rows that hold figures make one table; rows that hold rows make tables of their own, titled by their name."""
    leaves = {n: r if isinstance(r, dict) else {"": r} for n, r in rows.items()}
    nested = {n: r for n, r in leaves.items() if any(isinstance(v, dict) for v in r.values())}
    flat = {n: r for n, r in leaves.items() if r and n not in nested}
    if flat:
        columns = list(dict.fromkeys(c for row in flat.values() for c in row))
        yield Figures(title, columns, {n: [figure(row.get(c)) for c in columns] for n, row in flat.items()})
    for name, row in nested.items():
        yield from tables(name, row)


def show(console: Console, title: str, rows: dict[str, Any]) -> None:
    """Prints the tables of a topic."""
    for found in tables(title, rows):
        table = Table("", *found.columns, title=found.title, title_justify="left")
        for name, cells in found.rows.items():
            table.add_row(name, *cells)
        console.print(table)


def save(path: Path, rows: dict[str, Any], **facts: Any) -> None:
    """Writes figures and what they were measured on, with more `facts` about that, as JSON that `fill` puts into a page."""
    write_json(path, {"machine": machine() | facts, "rows": rows})


def markdown(path: Path) -> str:
    """The tables of one JSON file of a benchmark, what it was measured on and, where noted, the command that wrote it."""
    data = json.loads(path.read_text())
    facts = ", ".join(f"{k} {v}" for k, v in data["machine"].items())
    command = data.get("command", f"python -m benchmarks {path.stem}")
    parts = [f"`{command}`, {data['seconds']:.0f} s; {facts}." if "seconds" in data else f"Measured on {facts}."]
    for found in tables(path.stem, data["rows"]):
        lines = [f"| {found.title} | {' | '.join(found.columns)} |", "|---" * (len(found.columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in found.rows.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def fill(page: str, folder: Path) -> str:
    """A page with the part between `<!-- topic -->` and `<!-- end -->` replaced by the tables of `topic.json`."""
    for path in sorted(folder.glob("*.json")):
        start, end = f"<!-- {path.stem} -->", "\n<!-- end -->"
        before, found, rest = page.partition(start)
        if found:
            page = before + start + "\n" + markdown(path) + end + rest.partition(end)[2]
    return page
