"""Speed benchmarks: every figure is a ratio against its floor, measured side by side in one run.

    python -m benchmarks [topic ...] [--short] [--output folder] [--page docs/performance.md]

Prints tables and writes `<topic>.json` into the folder. All topics take about a quarter of an hour on 2 cores; `--short` runs
everything on tiny nets in about a minute, to see that it works. `--page` fills a page with the tables of the folder.
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

from benchmarks.tables import fill, show
from eqnet.checkpoint import atomic_write_bytes, write_json
from eqnet.command import keep_freed_memory

TOPICS = ("training_step", "training_memory", "calibration_speed", "evaluation_speed", "search_speed")


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


def main() -> None:
    """Runs the topics one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", metavar="topic", help=", ".join(TOPICS))
    parser.add_argument("--short", action="store_true", help="tiny nets, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--page", type=Path, help="fill this page with the tables of the folder; measure nothing")
    arguments = parser.parse_args()
    if arguments.page is not None:
        page = arguments.page.read_text()
        atomic_write_bytes(arguments.page, fill(page, arguments.output).encode())
        return
    unknown = set(arguments.topics) - set(TOPICS)
    if unknown:
        parser.error(f"unknown topic {min(unknown)!r}; the topics are {', '.join(TOPICS)}")
    keep_freed_memory()
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
