"""Speed benchmarks: every figure is a ratio against its floor, measured side by side in one run.

    python -m benchmarks [topic ...] [--short] [--output folder]

Prints a table per topic and writes `<topic>.json` into the folder. All topics take about a quarter of an hour on 2 cores; `--short` runs
everything on tiny nets in about a minute, to see that it works.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from eqnet.checkpoint import write_json

TOPICS = ("training_step", "calibration_speed", "evaluation_speed", "search_speed")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def show(console: Console, title: str, rows: dict[str, Any]) -> None:
    """A table of named rows of figures; what nests deeper becomes tables of its own."""
    flat = {name: row for name, row in rows.items() if isinstance(row, dict)}
    for name, row in flat.items():
        if any(isinstance(value, dict) for value in row.values()):
            show(console, f"{title}: {name}", row)
    leaves = {name: row for name, row in flat.items() if not any(isinstance(v, dict) for v in row.values())}
    if leaves:
        columns = list(dict.fromkeys(column for row in leaves.values() for column in row))
        table = Table("", *columns, title=title, title_justify="left")
        for name, row in leaves.items():
            table.add_row(name, *(figure(row.get(column)) for column in columns))
        console.print(table)
    for name, value in rows.items():
        if not isinstance(value, dict):
            console.print(f"{title}: {name}: {figure(value)}")


def figure(value: Any) -> str:
    """Four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " - ".join(figure(v) for v in value)
    return "" if value is None else str(value)


def main() -> None:
    """Runs the topics one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", choices=[*TOPICS, []], default=list(TOPICS), metavar="topic")
    parser.add_argument("--short", action="store_true", help="tiny nets, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    console = Console(width=170, highlight=False)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for topic in arguments.topics or TOPICS:
        start = time.perf_counter()
        rows = importlib.import_module(f"benchmarks.{topic}").run(arguments.short)
        show(console, topic, rows)
        seconds = time.perf_counter() - start
        write_json(arguments.output / f"{topic}.json", {"machine": machine(), "seconds": seconds, "rows": rows})
        console.print(f"{topic}: {seconds:.0f} s, written to {arguments.output / f'{topic}.json'}\n")


if __name__ == "__main__":
    main()
