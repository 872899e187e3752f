"""What it gains that free processes take the next unit of work, and what taking a unit and keeping a table cost.

Units of work are waits, so the figures are those of the sharing alone. One of the processes is slower than the others.

    python -m benchmarks work_sharing [--full | --short] [--output folder]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
from accelerate import Accelerator
from accelerate.utils import gather_object

from benchmarks.timing import Size
from eqnet.nn.supernet import trace_layers
from eqnet.scoring.table import read_rows, table_genomes
from eqnet.scoring.work import shared
from eqnet.space import QuantSpace

UNIT, SLOWER = 0.02, 4.0  # seconds of a unit; how much slower the first process is


def launch(processes: int, units: int) -> dict[str, Any]:
    """What the main of `processes` processes printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*torchrun, "-m", "benchmarks.work_sharing", str(units)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(units: int) -> None:
    """One of the processes of `launch`."""
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    wait = UNIT * (SLOWER if rank == 0 else 1)
    found: dict[str, Any] = {}
    ways = {
        "a fixed share each": lambda: range(rank, units, world),
        "taken when free": lambda: shared(units, accelerator),
    }
    for name, numbers in ways.items():
        accelerator.wait_for_everyone()
        start, mine = time.perf_counter(), 0
        for _ in numbers():
            time.sleep(wait)
            mine += 1
        counts = gather_object([mine])
        assert sum(counts) == units
        found[name] = {"seconds": time.perf_counter() - start, "units of the slow process": counts[0]}
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    empty = sum(1 for _ in shared(50 * units, accelerator))
    assert sum(gather_object([empty])) == 50 * units
    found["taken"] = 50 * units / (time.perf_counter() - start)
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


def bookkeeping(count: int) -> dict[str, Any]:
    """What every process does for each row of a table besides measuring: draw its config, decode it; one also reads the rows."""
    space = QuantSpace.from_layers(trace_layers(timm.create_model("resnet18", num_classes=10), (3, 64, 64)))
    start = time.perf_counter()
    genomes = table_genomes(space, count, 0)
    drawn = time.perf_counter() - start
    start = time.perf_counter()
    for genome in genomes:
        space.decode(genome)
    decoded = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps({"index": i, "accuracy": i / 7}) for i in range(100 * count)]
        (Path(folder) / "rows-0.jsonl").write_text("\n".join(rows))
        start = time.perf_counter()
        found = len(dict(read_rows(Path(folder))))
        read = time.perf_counter() - start
    speeds = {"drawn": count / drawn, "decoded": count / decoded, "read from files": found / read}
    return {name: {"rows per second": speed} for name, speed in speeds.items()}


def run(size: Size) -> dict[str, Any]:
    """Seconds for all units both ways, and how many units all processes together can take in a second."""
    units, counts = {"short": (40, [2]), "usual": (100, [2, 4]), "full": (400, [2, 4])}[size]
    rows: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    for processes in counts:
        found = launch(processes, units)
        taken[f"{processes} processes"] = {"units taken per second": found.pop("taken")}
        # one process at a quarter of the speed of the others, and nobody ever waiting
        best = units * UNIT / (processes - 1 + 1 / SLOWER)
        for row in found.values():
            row["/ best possible"] = row["seconds"] / best
        rows[f"{processes} processes, one {SLOWER:g} times slower, {units} units of {1000 * UNIT:g} ms"] = found
    return rows | {
        "units that take no time": taken,
        "rows of a table, ResNet-18": bookkeeping(50 if size == "short" else 1000),
    }


if __name__ == "__main__":
    measure(int(sys.argv[1]))
