"""What a subnet costs with and without training a supernet first: seconds and accuracy of both ways, from one float network.

    python -m benchmarks.search_cost --output runs/search_cost [--budget 4] [--json FILE] [key=value ...]

Trains a float network (not counted), and from its weights

- plans: calibration only (`train.epochs=0`) and `search.py --method lcpaq`, then fine-tunes the plan (`train.py subnet=...`);
- searches: trains a supernet, then `search.py`, that is accuracy table, predictor and genetic search.

Seconds are those of whole commands, with start-up and evaluation of the uniform configs: wall time, and CPU time of all threads.
Accuracy is that on the test split, which is measured once for each way. Finished steps are kept, with their seconds, so an
interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.tables import save, show
from eqnet.checkpoint import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


def timed(output: Path, name: str, *command: str) -> dict[str, float]:
    """Wall and CPU seconds of one command of the repository, run unless `output` has them already."""
    stored = output / f"{name}.seconds.json"
    if not stored.exists():
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, *command, "tracking=none"], cwd=ROOT, capture_output=True, text=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write_json(stored, {"wall s": wall, "CPU s": cpu})
    seconds: dict[str, float] = read_json(stored)
    return seconds


def found(run: Path) -> tuple[Path, dict[str, Any]]:
    """The one subnet that was searched on a run."""
    (path,) = (run / "search").glob("*/subnet.json")
    return path, read_json(path)


def main() -> None:
    """Runs what is missing and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", default="4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings of all runs")
    arguments = parser.parse_intermixed_args()
    out, budget = arguments.output.resolve(), arguments.budget
    out.mkdir(parents=True, exist_ok=True)
    timed(out, "float", "train.py", f"output={out / 'float'}", "train.epochs=0", *arguments.overrides)
    weights = [f"model.weights={out / 'float' / 'float.safetensors'}", *arguments.overrides]
    rows: dict[str, dict[str, float]] = {}
    rows["calibration"] = timed(out, "calibration", "train.py", f"output={out / 'ptq'}", "train.epochs=0", *weights)
    rows["plan"] = timed(out, "plan", "search.py", "--run", str(out / "ptq"), "--budget", budget, "--method", "lcpaq")
    path, planned = found(out / "ptq")
    rows["plan"]["test %"] = planned["accuracy"]["test"]
    tune = timed(out, "fine-tuning", "train.py", f"output={out / 'tuned'}", f"subnet={path}", f"supernet={out / 'ptq'}")
    rows["fine-tuning of the plan"] = tune | {"test %": read_json(out / "tuned" / "subnet.json")["accuracy"]["test"]}
    rows["supernet training"] = timed(out, "supernet", "train.py", f"output={out / 'elastic'}", *weights)
    rows["table, predictor, search"] = timed(
        out, "search", "search.py", "--run", str(out / "elastic"), "--budget", budget
    )
    rows["table, predictor, search"]["test %"] = found(out / "elastic")[1]["accuracy"]["test"]

    def total(*names: str) -> dict[str, float]:
        return {unit: sum(rows[name][unit] for name in names) for unit in ("wall s", "CPU s")}

    plan, search = total("calibration", "plan"), total("supernet training", "table, predictor, search")
    rows["training-based / plan"] = {unit: search[unit] / plan[unit] for unit in plan}
    tuned = total("calibration", "plan", "fine-tuning of the plan")
    rows["training-based / plan and fine-tuning"] = {unit: search[unit] / tuned[unit] for unit in plan}
    show(Console(width=110, highlight=False), f"budget {budget}", rows)
    if arguments.json is not None:
        save(arguments.json, rows)


if __name__ == "__main__":
    main()
