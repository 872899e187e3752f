"""What the commands share: how they end, and where they print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


class Interrupted(Exception):
    """Work was stopped by a signal; what was done is saved."""


def is_main_process() -> bool:
    """Whether this is the process that prints (before an accelerator exists)."""
    return os.environ.get("RANK", "0") == "0"


def make_console() -> Console:
    """Standard output of the main process; wide enough for tables when it is not a terminal."""
    width = None if sys.stdout.isatty() else 110
    return Console(width=width, quiet=not is_main_process(), highlight=False)


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on the main process; yields the function that advances it by one."""
    with Progress(console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def run_command(command: Callable[[], None]) -> None:
    """Runs a command: the user's mistakes (ValueError) become one sentence on stderr and exit code 2.

    An interrupted command exits with 130 and says how to continue.
    """
    try:
        command()
    except ValueError as error:
        if is_main_process():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as stop:
        if is_main_process():
            print(f"interrupted: {stop or 'what was finished is kept'}.", file=sys.stderr)
        sys.exit(130)
