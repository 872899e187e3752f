"""The cost of a quantized training step in eqnet and in other libraries, in one interleaved run.

    python -m benchmarks.peers --env brevitas=peers/brevitas/bin/python --env nncf=peers/nncf/bin/python \\
        [--env modelopt=...] [--env aimet=...] [--rounds 15] [--json FILE]

Without --env only eqnet and the float control run. Each library lives in an environment of its own (their requirements
clash), made with one of

    python -m venv peers/brevitas && peers/brevitas/bin/pip install brevitas==0.13.4 torch torchvision "setuptools<81"
    python -m venv peers/nncf     && peers/nncf/bin/pip install nncf==3.4.0 torch torchvision
    python -m venv peers/modelopt && peers/modelopt/bin/pip install nvidia-modelopt==0.47.0 torch torchvision
    python -m venv peers/aimet    && peers/aimet/bin/pip install aimet-torch==2.42.0 torch torchvision

(To share one torch between them, write the folder of its site-packages into a .pth file in each environment's
site-packages before installing.) NNCF compiles its kernels at first use, about a minute, and needs g++ and ninja.

Every library gets torchvision's resnet18 (random weights of seed 0, batch 16, 128 x 128, float32, one thread, AdamW) and
builds a W8A8 network in its usual way; see `benchmarks/peer_worker.py`. Every round each process takes one float and one
quantized step, in rotating order, so that all see the same noise. The figure is process CPU time; wall time is in the JSON.

- eqnet: 8-bit config of form channel-sym-sym of a supernet with all formats; step sizes learned (LSQ), per channel for
  weights, per tensor for layer inputs; BN kept; eager.
- brevitas graph: `quantize(preprocess_for_quantize(model))`; BN merged into the convolutions before training; weights per
  tensor, scale max |w| in every step with gradient; learned scale for every activation and residual sum; int32 bias.
- brevitas layerwise: `layerwise_quantize(model)`; BN kept; weights as above; learned scale for every layer input.
- nncf: `nncf.quantize`; BN kept; learned range per channel of weights, and per tensor of activations, residual sums
  included; C++ kernels.
- modelopt: `mtq.quantize(model, mtq.INT8_DEFAULT_CFG)`; BN kept; fixed ranges, per channel for weights, per tensor for
  inputs of layers and of pooling.
- aimet: `QuantizationSimModel(prepare_model(model))`; BN kept; learned min and max, per channel for weights, per tensor and
  asymmetric for activations and outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.tables import show
from benchmarks.timing import machine
from eqnet.checkpoint import write_json

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("peer_worker.py")
REQUIREMENTS = {
    "brevitas": 'brevitas==0.13.4 torch torchvision "setuptools<81"',
    "nncf": "nncf==3.4.0 torch torchvision",
    "modelopt": "nvidia-modelopt==0.47.0 torch torchvision",
    "aimet": "aimet-torch==2.42.0 torch torchvision",
}
WARMUP = 2
TITLE = "one training step of resnet18, batch 16, 128 px, W8A8, one thread, process CPU time"


class Worker:
    """A process of `peer_worker.py`; a context manager that ends it.

    Attributes:
        library: its name.
        description: what the process says about itself: versions and variants.
        samples: seconds per step by variant, `{"cpu": [...], "wall": [...]}`.

    Raises:
        ValueError: the interpreter or the library is missing.
        RuntimeError: the process died.
    """

    def __init__(self, library: str, python: str) -> None:
        self.library = library
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        search = f"{Path(python).absolute().parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja of the environment
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PATH": search}
        environment.pop("PYTHONPATH", None)
        if library == "eqnet":
            environment["PYTHONPATH"] = str(ROOT)
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER), library],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise ValueError(_how_to_install(library, f"cannot run '{python}': {error.strerror}")) from error
        try:
            self.description = self._answer()
            if "error" in self.description:
                raise ValueError(_how_to_install(library, f"'{python}' says {self.description['error']}"))
        except BaseException:
            self.close()
            raise
        self.variants: list[dict[str, Any]] = self.description.pop("variants")
        self.samples: list[dict[str, list[float]]] = [{"cpu": [], "wall": []} for _ in self.variants]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            tail = self._errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"the process of {self.library} died:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self, variant: int, count: bool) -> None:
        """One training step of a variant; its seconds are kept if `count`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{variant}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if not np.isfinite(answer["loss"]):
            raise RuntimeError(f"the loss of {self.library} is {answer['loss']}.")
        for clock, seconds in self.samples[variant].items() if count else ():
            seconds.append(answer[clock])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per variant: facts, medians in ms, ratios to the float variant of the same memory format."""
        rows = []
        for variant, samples in zip(self.variants, self.samples, strict=True):
            row = {key: value for key, value in variant.items() if key != "floor"}
            for clock in ("cpu", "wall"):
                row[f"{clock}_ms"] = round(1e3 * float(np.median(samples[clock])), 2)
                if variant["floor"] is not None:
                    floor = self.samples[variant["floor"]][clock]
                    row[f"{clock}_ratio"] = round(float(np.median(samples[clock]) / np.median(floor)), 4)
                    by_round = np.quantile(np.divide(samples[clock], floor), (0.25, 0.5, 0.75))
                    row[f"{clock}_ratio_by_round"] = [round(float(q), 4) for q in by_round]
            rows.append({**row, "samples": samples})
        return rows


def _how_to_install(library: str, problem: str) -> str:
    if library not in REQUIREMENTS:
        return f"no environment for {library}: {problem}."
    folder = f"peers/{library}"
    return (
        f"no environment for {library}: {problem}; make one with `python -m venv {folder} && "
        f"{folder}/bin/pip install {REQUIREMENTS[library]}` and pass --env {library}={folder}/bin/python."
    )


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """The items, starting with number `by`, wrapped around.

    >>> rotated("abc", 4)
    ['b', 'c', 'a']
    """
    start = by % len(items)
    return [*items[start:], *items[:start]]


def measure(environments: dict[str, str], rounds: int, console: Console) -> dict[str, Any]:
    """Runs every library, interleaved.

    Args:
        environments: interpreter of each library; see `peer_worker.BUILDERS` for the names.
        rounds: measured steps of each variant, after two that do not count.
        console: progress goes there.

    Returns:
        `{library: {"version", "torch", "python", "rows": [...]}}`, JSON-able.
    """
    with ExitStack() as stack:
        workers = []
        for library, python in environments.items():
            console.print(f"building {library}")
            workers.append(stack.enter_context(Worker(library, python)))
        for r in range(-WARMUP, rounds):
            for worker in rotated(workers, r):
                for variant in rotated(range(len(worker.variants)), r):
                    worker.step(variant, count=r >= 0)
        return {worker.library: {**worker.description, "rows": worker.rows()} for worker in workers}


def table_rows(results: dict[str, Any]) -> dict[str, Any]:
    """One row per quantized variant: what it quantizes and learns, milliseconds of process CPU time, ratio to its float step."""
    rows = {}
    for library, result in results.items():
        floors = {row["memory_format"]: row for row in result["rows"] if row["name"] == "float"}
        for row in result["rows"]:
            if row["name"] == "float":
                continue
            rows[f"{library} {result['version']}, {row['name']}, {row['memory_format']}"] = {
                "weights": row["weights"] or "-",
                "activations": row["acts"] or "-",
                "learned scalars": row["learned"] if row["weights"] else "-",
                "float [ms]": floors[row["memory_format"]]["cpu_ms"],
                "quantized [ms]": row["cpu_ms"],
                "/ float": row["cpu_ratio"],
                "quartiles by round": row["cpu_ratio_by_round"],
            }
    return {TITLE: rows}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", action="append", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=120, highlight=False)
    environments = {}
    for entry in arguments.env:
        library, _, python = entry.partition("=")
        if library not in REQUIREMENTS or not python:
            parser.error(f"--env needs LIBRARY=PYTHON with one of {', '.join(REQUIREMENTS)}; got {entry!r}.")
        environments[library] = python
    environments |= {"float": sys.executable, "eqnet": sys.executable}  # last: a missing environment shows at once
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {arguments.rounds}.")
    start, load = time.perf_counter(), os.getloadavg()[0]
    try:
        results = measure(environments, arguments.rounds, console)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    rows = table_rows(results)
    show(console, "peers", rows)
    console.print(
        "weights, activations: quantized tensors; learned scalars: of their quantizers, trained in this step."
    )
    if arguments.json:
        libraries = " ".join(f"--env {name}=peers/{name}/bin/python" for name in environments if name in REQUIREMENTS)
        loads = [round(x, 2) for x in (load, os.getloadavg()[0])]
        facts = machine() | {"threads": 1, "rounds": arguments.rounds, "load before and after": loads}
        seconds = time.perf_counter() - start
        command = f"python -m benchmarks.peers {libraries}"
        write_json(
            arguments.json, {"command": command, "machine": facts, "seconds": seconds, "rows": rows, "samples": results}
        )


if __name__ == "__main__":
    main()
