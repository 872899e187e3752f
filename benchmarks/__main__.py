"""Speed benchmarks: every figure is a ratio against its floor, measured side by side in one run.

    python -m benchmarks [topic ...] [--full | --short] [--output folder] [--page docs/performance.md]

Prints tables and writes `<topic>.json` into the folder. `--full` adds ResNet-18 at 224 px and more repetitions, which
takes an hour or more; `--short` runs everything on tiny nets, to see that it works.
`--page` fills a page with the tables of the folder.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from rich.console import Console

from benchmarks.tables import fill, show
from benchmarks.timing import machine
from eqnet.checkpoint import atomic_write_bytes, write_json
from eqnet.command import keep_freed_memory

TOPICS = (
    *("training_step", "training_memory", "calibration_speed", "evaluation_speed", "processes", "search_speed"),
    *("work_sharing", "input_pipeline", "estimate"),
)


def main() -> None:
    """Runs the topics one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", metavar="topic", help=", ".join(TOPICS))
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--short", dest="size", action="store_const", const="short", help="tiny nets, to see that it works"
    )
    how.add_argument("--full", dest="size", action="store_const", const="full", help="ResNet-18 at 224 px besides")
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
        rows = importlib.import_module(f"benchmarks.{topic}").run(arguments.size or "usual")
        show(console, topic, rows)
        seconds = time.perf_counter() - start
        command = f"python -m benchmarks {topic}" + (f" --{arguments.size}" if arguments.size else "")
        content = {"command": command, "machine": machine(), "seconds": seconds, "rows": rows}
        write_json(arguments.output / f"{topic}.json", content)
        console.print(f"{topic}: {seconds:.0f} s, written to {arguments.output / f'{topic}.json'}\n")


if __name__ == "__main__":
    main()
