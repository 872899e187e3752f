"""One command at a time works on a folder.

A lock is the kernel's: it ends with the process, however that ends, and a file left behind locks nothing. File systems without
locks are not protected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

LOCK_FILE = ".lock"


def take_lock(file: Path, wait: float = 0.0) -> FileLock | None:
    """The held lock of a file, which ends with `release` or the process; None if another process holds it.

    Args:
        file: made if it is missing.
        wait: seconds to wait for another process.

    Raises:
        OSError: the file cannot be written.
    """
    lock = FileLock(file, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        return None
    except NotImplementedError:  # no locks in this file system
        pass
    return lock


@contextmanager
def locked(folder: Path, wait: float = 1.0) -> Iterator[None]:
    """Keeps other processes out of a folder.

    Args:
        folder: must exist.
        wait: seconds to wait for another process that only begins or ends there.

    Raises:
        ValueError: another process holds the folder, or it cannot be written.
    """
    try:
        lock = take_lock(folder / LOCK_FILE, wait)
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}.") from error
    if lock is None:
        raise ValueError(f"another command is working on {folder}; wait for its end, or stop it.")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """`locked` for all processes of a command; the main one holds the lock, and all raise what it raises."""
    with ExitStack() as stack:
        answer: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                stack.enter_context(locked(folder))
            except ValueError as error:
                answer = [error]
        broadcast_object_list(answer)
        if answer[0] is not None:
            raise answer[0]
        yield
