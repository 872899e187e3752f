"""How measuring configs grows with processes: each process measures its share on its own threads.

The same configs, recalibrated and measured one after the other; per process as many threads as leave no core to two of them.

    python -m benchmarks processes [--full | --short] [--output folder]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.evaluation_speed import build
from benchmarks.timing import Size
from eqnet.command import keep_freed_memory
from eqnet.scoring.evaluation import Evaluator
from eqnet.scoring.table import table_genomes

NET, SHORT_NET = "cifar_resnet20, 32 px, batch 64", "cifar_resnet20, 16 px, batch 8"
# name: (processes, threads of each)
VARIANTS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def launch(net: str, configs: int, processes: int, threads: int) -> float:
    """Seconds that `processes` take for all configs, as the main process sees it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    command = [*torchrun, "-m", "benchmarks.processes", net, str(configs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_share(net: str, configs: int) -> None:
    """One of the processes of `launch`; the main one prints the seconds between two barriers."""
    keep_freed_memory()
    accelerator = Accelerator(cpu=True)
    _, supernet, batch = build(net)
    labels = torch.zeros(len(batch), dtype=torch.int64)
    evaluator = Evaluator(supernet, [batch] * 4, {"validation": [(batch, labels)] * 16})
    chosen = [supernet.space.decode(genome) for genome in table_genomes(supernet.space, configs + 1, 0)]
    evaluator.measure(chosen.pop(), "validation")  # a warm-up
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    evaluator.measure_all(chosen, ["validation"], accelerator)
    if accelerator.is_main_process:
        print(json.dumps(time.perf_counter() - start))
    accelerator.end_training()


def run(size: Size) -> dict[str, Any]:
    """Configs per second of each number of processes, interleaved."""
    net = SHORT_NET if size == "short" else NET
    configs, rounds = {"short": (2, 1), "usual": (4, 1), "full": (6, 3)}[size]
    variants = {name: v for name, v in VARIANTS.items() if size != "short" or v[0] == 2}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name in list(variants) if i % 2 == 0 else reversed(variants):
            seconds[name].append(launch(net, configs, *variants[name]))
    first = float(np.median(next(iter(seconds.values()))))
    rows = {
        name: {
            "configs per second": configs / float(np.median(values)),
            "seconds for all": float(np.median(values)),
            "spread": [min(values), max(values)],
            "speed-up": first / float(np.median(values)),
        }
        for name, values in seconds.items()
    }
    return {f"{net}: growth with processes": rows}


if __name__ == "__main__":
    measure_share(sys.argv[1], int(sys.argv[2]))
