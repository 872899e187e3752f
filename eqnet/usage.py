"""What a run has used so far: seconds of its parts and memory at the peak, in `used.json` of its folder."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator

from eqnet.checkpoint import read_object, write_json

FILE = "used.json"


@dataclass(frozen=True)
class Used:
    """What `used.json` holds.

    Attributes:
        seconds: by part of a run: start, each phase of training, evaluation, report.
        memory: bytes at the peak, of the main process on CPU, of its device on a GPU.
        processes: of the last launch.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    processes: int = 1

    @staticmethod
    def read(folder: Path) -> Used:
        """What a run has used; nothing if it has no such file. Raises ValueError if the file is damaged."""
        path = folder / FILE
        if not path.exists():
            return Used()
        data = read_object(path, "seconds", "memory", "processes")
        try:
            return Used(
                {str(k): float(v) for k, v in data["seconds"].items()}, int(data["memory"]), int(data["processes"])
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is damaged ({error}).") from error

    def describe(self) -> str:
        """E.g. '0:05:02, peak memory 0.81 GiB'."""
        return f"{clock(sum(self.seconds.values()))}, peak memory {bytes_text(self.memory)}"


class Usage:
    """A clock that runs from its making on and adds to what earlier processes of the same run have stored.

    Seconds belong to one part at a time: those of a part inside another are not counted twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seconds: dict[str, float] = {}
        self._part, self._since = "start", time.monotonic()
        self._earlier: Used | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charges the time of its body to a part."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> str:
        now, before = time.monotonic(), self._part
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._part, self._since = name, now
        return before

    def store(self, accelerator: Accelerator) -> Used:
        """Writes what the run has used until now, by the main process; seconds after the last call are lost in a kill."""
        if self._earlier is None:
            try:
                self._earlier = Used.read(self._folder)
            except ValueError:  # a damaged account of the past is no reason to stop a training
                self._earlier = Used()
        self._switch(self._part)
        seconds = dict(self._earlier.seconds)
        for name, value in self._seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        memory = max(self._earlier.memory, peak_memory(accelerator))
        used = Used(seconds, memory, accelerator.num_processes)
        if accelerator.is_main_process:
            write_json(self._folder / FILE, asdict(used))
        return used


def peak_memory(accelerator: Accelerator) -> int:
    """Bytes that this process has used at its peak, on its GPU if it has one."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clock(seconds: float) -> str:
    """E.g. '0:01:30'."""
    return str(timedelta(seconds=round(seconds)))


def bytes_text(size: float) -> str:
    """E.g. '0.25 GiB' or '3.1 MiB'."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
