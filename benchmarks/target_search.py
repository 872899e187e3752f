"""One trained supernet, many devices: the best subnet for each target and budget, how long it takes to find, and what runs there.

    python -m benchmarks.target_search RUN [--targets NAME ...] [--budgets BUDGET ...] [--images N] [--json FILE] [--set key=value ...]

Runs `search.py --target` for each target and budget, once before that without a target, so that the accuracy table and the
predictor exist. Prints accuracy in percent of the result and of the best uniform config within the budget, and the seconds from
the start of the command to the saved subnet. Each result is then exported for its target and verified on test images: accuracy of
the simulation, of the integer reference, and of the runtime where the target has one on this machine, each with the share of
images on which it chooses the class of the simulation; integer layers of the target that run in floating point; and the verdict.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.tables import save, show
from eqnet.checkpoint import read_json
from eqnet.deploy.export import export_onnx
from eqnet.deploy.exported import Exported
from eqnet.deploy.subnet import load_subnet
from eqnet.deploy.verify import verify_export
from eqnet.space.hardware import load_target

SEARCH = Path(__file__).resolve().parent.parent / "search.py"
TARGETS = ["onnxruntime-x86", "openvino-cpu", "tensorrt", "vitis-ai", "qualcomm-dsp"]


def search(run: Path, budget: str, target: str | None, overrides: list[str]) -> tuple[Path, float]:
    """The `subnet.json` that a search saved, and its seconds."""
    before = set((run / "search").glob("*/subnet.json"))
    command = [sys.executable, str(SEARCH), "--budget", budget, "--run", str(run), "tracking=none", *overrides]
    start = time.perf_counter()
    done = subprocess.run(command + (["--target", target] if target else []), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    (subnet,) = set((run / "search").glob("*/subnet.json")) - before
    return subnet, seconds


def deployed(subnet: Path, run: Path, target_name: str, count: int | None) -> dict[str, Any]:
    """Exports a subnet and verifies the file on `count` test images, None for all."""
    saved, target = load_subnet(subnet, run), load_target(target_name)
    path = subnet.with_name(f"{target.name}.onnx")
    size, calibration = saved.input_size, saved.training_images(256)
    export_onnx(saved.module, saved.config, saved.layers, target, path, input_size=size, images=calibration)
    exported = Exported.read(path)
    images, labels = saved.labelled_images(sys.maxsize if count is None else count, "test")
    certificate = verify_export(exported, saved.module, saved.layers, target, images, labels, rounds=0)
    with torch.inference_mode():
        simulated = torch.cat([saved.module(part).argmax(1) for part in images.split(64)]).numpy()
    parts = exported.chunks(images.numpy())
    logits = np.concatenate([exported.reference.run({exported.input: part})[exported.output] for part in parts])
    integer, truth = logits.argmax(1), labels.numpy()
    row: dict[str, Any] = {
        "simulation, test %": f"{100 * (simulated == truth).mean():.2f}",
        "integer reference, test %": f"{100 * (integer == truth).mean():.2f}",
        "agreement of the reference %": f"{100 * (integer == simulated).mean():.2f}",
    }
    found = certificate.results.get("accuracy")
    if found is not None:
        agreement = certificate.results["simulation_and_runtime"]["top1_agreement"]
        row |= {"runtime, test %": f"{found['runtime']:.2f}", "agreement of the runtime %": f"{agreement:.2f}"}
        row["layers in float"] = sum("floating point" in line.text for line in certificate.errors)
    return row | {"images": len(labels), "certificate": f"{len(certificate.errors)} errors"}


def main() -> None:
    """Searches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--budgets", nargs="+", default=["w=4", "w=3"])
    parser.add_argument("--images", type=int, help="test images of a file (default: all)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the search")
    arguments = parser.parse_args()
    search(arguments.run, arguments.budgets[0], None, arguments.set)
    rows: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for target in arguments.targets:
        for budget in arguments.budgets:
            path, seconds = search(arguments.run, budget, target, arguments.set)
            subnet = read_json(path)
            row = rows[f"{target}, {budget}"] = {"form": subnet["form"], "seconds": seconds}
            for name, side in (("searched", subnet), ("uniform", subnet["best_uniform"])):
                for split in ("validation", "test"):
                    row[f"{name}, {split} %"] = None if side is None else f"{side['accuracy'][split]:.2f}"
            files[f"{target}, {budget}"] = deployed(path, arguments.run, target, arguments.images)
    rows = {"target and budget": rows, "exported files": files}
    show(Console(width=150, highlight=False), "target and budget", rows)
    if arguments.json:
        save(arguments.json, rows)


if __name__ == "__main__":
    main()
