"""What SIGKILL costs: training, table building, search and export are killed at random moments and run again until they end.

    python -m benchmarks.kills [job ...] [--kills 50] [--seed 0]

A chain of runs in one folder goes on until one of them ends by itself; its files must then be those of a run that was never
killed, and no run may begin behind what the one before it had finished. Runs are forked from a server that has imported
everything, so that moments fall into work and not into imports. Exits with 1 if anything was lost, doubled or different.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from eqnet.run import Run
from eqnet.run_checkpoints import PHASES
from eqnet.scoring.table import read_rows

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("run")  # in the folder of a chain
SUBNET = RUN / "search" / "w4-a4" / "subnet.json"
FILE = RUN / "search" / "w4-a4" / "onnxruntime-x86.onnx"
SETTINGS = [
    "tracking=none", "data.max_images=200", "data.batch_size=32", "data.validation_fraction=0.3", "model.arguments={width: 4}",
    "space.bits=[4, 8]", "space.symmetric=[true]", "space.granularity=[tensor]", "pretrain.epochs=3", "train.epochs=4",
    "train.checkpoint_steps=3", "train.log_steps=1", "train.evaluate_epochs=2", "train.calibration_images=32",
    "search.table_size=60", "search.bn_images=32", "search.rounds=1", "search.population=20", "search.generations=10",
]  # fmt: skip
IMPORTS = [  # what the jobs import
    "eqnet.cli", "eqnet.deploy.graph", "eqnet.deploy.outputs", "eqnet.deploy.subnet", "eqnet.html_report",
    "eqnet.report", "eqnet.search", "eqnet.search.exact", "eqnet.estimate", "eqnet.training.trainer", "onnxruntime", "onnxscript",
    "sklearn.datasets", "scipy.stats", "wandb",
]  # fmt: skip
MAX_RUNS = 10  # of a chain for each kill asked for: a job that never gets further is an error
TIMEOUT = 120  # seconds for a run that nobody kills


@dataclass(frozen=True)
class Job:
    """One kind of work.

    Attributes:
        command: (folder) -> script or entry point, and arguments; another one to continue.
        progress: what is finished in a folder, which must never go back.
        results: what must equal that of a run that was not killed.
    """

    command: Callable[[Path], list[str]]
    progress: Callable[[Path], Any]
    results: Callable[[Path], Any]


def train_command(folder: Path) -> list[str]:
    """A new run, or one that goes on."""
    begun = (folder / RUN / "settings.yaml").exists()
    return ["train.py", f"output={RUN}", *SETTINGS, *["--resume"] * begun]


def train_progress(folder: Path) -> tuple[int, int]:
    """The newest checkpoint that is whole."""
    if not (folder / RUN / "settings.yaml").exists():
        return -1, 0
    checkpoint, notes = Run.open(folder / RUN).checkpoints.newest()
    assert not notes, notes
    return (-1, 0) if checkpoint is None else (PHASES.index(checkpoint.phase), checkpoint.step)


def train_results(folder: Path) -> dict[str, bytes]:
    """All files of a run but its checkpoints and pictures."""
    names = (
        "settings.yaml",
        "split.json",
        "metrics.jsonl",
        "float.safetensors",
        "supernet.safetensors",
        "evaluation.json",
    )
    return {name: (folder / RUN / name).read_bytes() for name in names}


def table_rows(folder: Path) -> list[tuple[int, list[float]]]:
    """Rows of the accuracy table, doubled ones included."""
    return sorted(read_rows(folder / RUN / "table"))


def search_results(folder: Path) -> dict[str, Any]:
    """The subnet of every search of the run (one that was killed after it was saved is done twice), and the table."""
    searches = [p for p in (folder / RUN / "search").iterdir() if p.is_dir()]
    documents = {(p / "subnet.json").read_bytes() for p in searches}
    weights = {(p / "subnet.safetensors").read_bytes() for p in searches}
    return {"documents": documents, "weights": weights, "table": table_rows(folder)}


def export_results(folder: Path) -> tuple[bytes, Any]:
    """The exported file and its description, without the place of the run."""
    description = json.loads((folder / f"{FILE}.json").read_text())
    description["source"].pop("run")
    return (folder / FILE).read_bytes(), description


SEARCH = ["search.py", "--run", str(RUN), "--budget", "4"]
JOBS = {
    "train": Job(train_command, train_progress, train_results),
    "table": Job(lambda folder: SEARCH, lambda folder: len(dict(table_rows(folder))), search_results),
    "search": Job(lambda folder: [*SEARCH, "search.generations=60"], lambda folder: 0, search_results),
    "export": Job(
        lambda folder: ["eqnet", "export", str(SUBNET), "--target", "onnxruntime-x86", "--images", "32"],
        lambda folder: 0,
        export_results,
    ),
}


def prepare(job: str, folder: Path) -> None:
    """The state of a folder before a job, from that in which the job before it ended."""
    if job == "search":
        shutil.rmtree(folder / RUN / "search")
        for path in (folder / RUN).glob("predictor.*"):
            path.unlink()
    if job == "table":
        shutil.rmtree(folder / RUN / "table", ignore_errors=True)


def work(command: Sequence[str], folder: Path) -> None:
    """What a forked process does: the command line in its folder; output goes to `output.txt` there."""
    with (folder / "output.txt").open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = list(command)
    if command[0] == "eqnet":
        from eqnet.cli import main

        main()
    else:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")


class Killer:
    """Runs chains of a job.

    Args:
        name: of the job.
        start: folder with its input, copied for each chain.
        folder: where chains go.
        rng: draws the moments.
    """

    def __init__(self, name: str, start: Path, folder: Path, rng: np.random.Generator) -> None:
        self.job, self.start, self.folder, self.rng = JOBS[name], start, folder, rng
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(IMPORTS)
        self.whole = self._new("whole")
        self.run(self.whole, None)  # starts the server
        shutil.rmtree(self.whole)
        self._new("whole")
        begin = time.perf_counter()
        self.run(self.whole, None)
        self.seconds = time.perf_counter() - begin

    def _new(self, name: str) -> Path:
        return Path(shutil.copytree(self.start, self.folder / name))

    def run(self, folder: Path, moment: float | None) -> bool:
        """Starts the job and kills it after `moment` seconds; whether it was killed before its end."""
        process = self._server.Process(target=work, args=(self.job.command(folder), folder))
        process.start()
        process.join(TIMEOUT if moment is None else moment)
        killed = process.is_alive()
        if killed:
            process.kill()
            process.join()
        if (killed and moment is None) or (not killed and process.exitcode != 0):
            raise AssertionError(f"exit code {process.exitcode}: {(folder / 'output.txt').read_text()[-2000:]}")
        return killed

    def chain(self, kills: int) -> int:
        """One chain of at most `kills` kills; how many there were.

        Raises:
            AssertionError: something was lost, doubled or is different.
        """
        folder, done = self._new("chain"), 0
        while done < kills:
            before = self.job.progress(folder)
            if not self.run(folder, float(self.rng.uniform(0, self.seconds))):
                break
            done += 1
            assert self.job.progress(folder) >= before, f"finished work was lost: {before}"
        else:
            self.run(folder, None)
        assert self.job.results(folder) == self.job.results(self.whole), "the results differ from those without a kill"
        shutil.rmtree(folder)
        return done


def survive(jobs: Sequence[str], kills: int, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Kills every job `kills` times.

    Args:
        jobs: names; the ones before them in `JOBS` make their input.
        kills: of each job.
        seed: of the moments.
        folder: an existing one that is empty.

    Returns:
        By job: kills, chains, and seconds of a run without kills.

    Raises:
        AssertionError: something was lost, doubled or is different; the message says what.
    """
    rows: dict[str, dict[str, float]] = {}
    start = folder / "start"
    start.mkdir()
    for number, name in enumerate(JOBS):
        prepare(name, start)
        (folder / name).mkdir()
        killer = Killer(name, start, folder / name, np.random.default_rng((seed, number)))
        done = chains = 0
        while name in jobs and done < kills:
            done, chains = done + killer.chain(kills - done), chains + 1
            assert chains <= MAX_RUNS * kills, "no moment falls into the job"
        if name in jobs:
            rows[name] = {"kills": done, "chains": chains, "seconds": killer.seconds}
        shutil.rmtree(start)
        shutil.move(killer.whole, start)
    return rows


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="job", help=f"{', '.join(JOBS)} (default: all)")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.jobs) - set(JOBS)
    if unknown:
        parser.error(f"unknown job {min(unknown)!r}; the jobs are {', '.join(JOBS)}")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = survive(arguments.jobs or list(JOBS), arguments.kills, arguments.seed, Path(folder))
    table = Table("job", "kills", "chains", "seconds without kills")
    for name, row in rows.items():
        table.add_row(name, f"{row['kills']:.0f}", f"{row['chains']:.0f}", f"{row['seconds']:.2f}")
    console = Console()
    console.print(table)
    console.print(f"all results equal those without kills; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
