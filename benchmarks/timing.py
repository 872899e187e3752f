"""Interleaved timing: every round runs each variant once, so that a busy machine slows all of them alike."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

Size = Literal["short", "usual", "full"]  # tiny nets, nets of small images, ResNet-18 at 224 px besides
Net = TypeVar("Net")


def nets_of(size: Size, nets: Mapping[str, Net], tiny: Mapping[str, Net]) -> Mapping[str, Net]:
    """The nets of a size, from all by title and the tiny ones.

    >>> list(nets_of("usual", {"a, 32 px": 1, "b, 224 px": 2}, {"c": 3}))
    ['a, 32 px']
    """
    small = {name: net for name, net in nets.items() if "224 px" not in name}
    return {"short": tiny, "usual": small, "full": nets}[size]


class Timing(NamedTuple):
    """Seconds of one variant: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleave(functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Wall time of each function: `warmup` rounds that do not count, then `rounds` that do, in rotating order.

    Args:
        functions: variants by name; each call does the same amount of work.
        rounds: measured rounds.
        warmup: rounds before them (compilation, allocation).
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    try:
        for i in range(-warmup, rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                functions[name]()
                if i >= 0:
                    seconds[name].append(time.perf_counter() - start)
            gc.collect()
    finally:
        gc.enable()
    return {
        name: Timing(float(np.median(s)), *(float(q) for q in np.quantile(s, (0.25, 0.75))), rounds)
        for name, s in seconds.items()
    }


def ratio(timings: Mapping[str, Timing], name: str, floor: str) -> float:
    """Median of one variant divided by the median of another.

    >>> ratio({"a": Timing(3.0, 3, 3, 1), "b": Timing(2.0, 2, 2, 1)}, "a", "b")
    1.5
    """
    return timings[name].median / timings[floor].median


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
