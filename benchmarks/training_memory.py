"""Peak resident memory of a process that trains: the variants of `training_step`, each in a process of its own.

python -m benchmarks training_memory [--full | --short] [--output folder]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import Size, nets_of
from benchmarks.training_step import FLOORS, NETS, SHORT, VARIANTS, make_step
from eqnet.command import keep_freed_memory

STEPS = 3


def peak_memory(net: str, variant: str) -> float:
    """MiB of a process that runs three steps of the variant."""
    command = [sys.executable, "-m", "benchmarks.training_memory", net, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def run(size: Size) -> dict[str, Any]:
    """MiB of every variant, and the ratio to its floor."""
    out: dict[str, Any] = {}
    for net in nets_of(size, NETS, SHORT):
        chosen = [v for v in VARIANTS if size != "short" or v in ("float32, channels_last", "supernet float32, eager")]
        memory = {variant: peak_memory(net, variant) for variant in chosen}
        out[net] = {
            variant: {"peak [MiB]": mib, "/ its floor": mib / memory[FLOORS[VARIANTS[variant][2]]]}
            for variant, mib in memory.items()
        }
    return out


if __name__ == "__main__":
    keep_freed_memory()
    step = make_step(sys.argv[1], sys.argv[2])
    for _ in range(STEPS):
        step()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the memory of the parent
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
