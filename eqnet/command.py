"""What the commands share: how they end, and where they print."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

# no space, quota, file size limit, read-only file system, permission, damaged device
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


LOST_PEER = ("Connection closed by peer", "Connection reset by peer")  # gloo's words
MISTAKE, INTERRUPTED = 2, 130  # exit codes


class Interrupted(Exception):
    """Work was stopped by a signal; what was done is saved."""


def is_main_process() -> bool:
    """Whether this is the process that prints (before an accelerator exists)."""
    return os.environ.get("RANK", "0") == "0"


def make_console() -> Console:
    """Standard output of the main process; wide enough for tables when it is not a terminal."""
    width = None if sys.stdout.isatty() else 110
    return Console(width=width, quiet=not is_main_process(), highlight=False)


def start_cpu_processes() -> None:
    """Starts the processes that `accelerate launch --cpu --num_processes N` was asked for, on this machine's share of machines.

    That command runs a single process unless it is given MPI, without a word. Its request is read from the command line of
    the launcher (Linux), and this process is replaced by `eqnet.launch`, which starts N of them. Does nothing in any other case.

    Raises:
        ValueError: N is not a multiple of `--num_machines`.
    """
    env = os.environ
    asked = env.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in env  # set for more than one process only
    if not asked or "LOCAL_RANK" in env or "WORLD_SIZE" in env:
        return
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        words = []
    numbers: dict[str, int] = {}
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        name, _, attached = flag.partition("=")
        if name.startswith("--") and (attached or value).isdigit():
            numbers[name[2:].replace("-", "_")] = int(attached or value)
    if "num_processes" not in numbers:
        return
    processes, machines = numbers["num_processes"], numbers.get("num_machines", 1)
    if processes % machines:
        raise ValueError(f"--num_processes={processes} cannot be divided among --num_machines={machines}.")
    place = ["--standalone"]
    if machines > 1:
        place = [f"--nnodes={machines}", f"--node_rank={numbers.get('machine_rank', 0)}"]
        place += [f"--master_addr={env['MASTER_ADDR']}", f"--master_port={env['MASTER_PORT']}"]
    torchrun = ["-m", "eqnet.launch", *place, f"--nproc_per_node={processes // machines}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "--", *sys.argv])


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep freed memory for the next allocation instead of returning it to the kernel.

    On CPU every activation is a fresh allocation, and the kernel clears each returned page anew: networks run 1.2 to 2 times
    slower with the defaults, at the same peak memory. Same as the environment variables MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_THRESHOLD_ and MALLOC_TOP_PAD_. Does nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_TOP_PAD of malloc.h, in bytes
    for option, value in ((-1, 2**31 - 1), (-3, 2**25), (-3, 2**30), (-2, 2**26)):  # older ones refuse 2**30
        mallopt(option, value)


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on the main process; yields the function that advances it by one."""
    with Progress(console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def run_command(command: Callable[[], None]) -> None:
    """Runs a command: the user's mistakes (ValueError) become one sentence on stderr and exit code 2.

    So do a full disk and a folder that cannot be written. An interrupted command exits with 130 and says how to continue, one
    that lost another process of its launch with 1.
    """
    keep_freed_memory()
    try:
        command()
        _leave_launch()
    except ValueError as error:
        if is_main_process():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(MISTAKE)
    except RuntimeError as error:
        if not any(text in str(error) for text in LOST_PEER):
            raise
        print("error: another process of this run has ended.", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{where}: {error.strerror}; what was finished is kept.", file=sys.stderr)
        sys.exit(MISTAKE)
    except (Interrupted, KeyboardInterrupt) as stop:
        if is_main_process():
            print(f"interrupted: {stop or 'what was finished is kept'}.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _leave_launch() -> None:
    """Ends the communication of this process: threads of gloo that still run when Python ends abort it now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
