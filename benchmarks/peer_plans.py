"""Bit-widths of weights as ModelOpt and MCT choose them, beside ours, on the same network, images and size.

    python -m benchmarks.peer_plans --run RUN --env modelopt=peers/modelopt/bin/python --env mct=peers/mct/bin/python \\
        [--bits 5 6] [--images 64] [--json FILE]

RUN is a run of a CIFAR ResNet (`train.py ... train.epochs=0` is enough: only its float weights and its data are read). Each
library lives in an environment of its own, made with one of

    python -m venv peers/modelopt && peers/modelopt/bin/pip install nvidia-modelopt==0.47.0 torch torchvision timm
    python -m venv peers/mct      && peers/mct/bin/pip install model-compression-toolkit==2.6.1 torch torchvision timm

and chooses weights of so many mean bits with the same training images; see `benchmarks/peer_plan_worker.py`. Its plan becomes
a `QuantConfig` (weights per channel, 8-bit inputs), and ours is the exact optimum of each score among the same bit-widths
within the size of that plan. All are measured alike, after training: step sizes calibrated and BN recalibrated with the
same images, loss and accuracy on the validation split. Seconds are process CPU time of the whole plan, ours with calibration.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from benchmarks.tables import show
from benchmarks.timing import machine
from eqnet.checkpoint import load_tensors, write_json
from eqnet.data import Batches, random_subset
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model, open_data
from eqnet.scoring.scores import SCORES
from eqnet.scoring.sensitivity import Batch
from eqnet.search.ilp import exact_search
from eqnet.space import LayerConfig, QuantConfig, QuantFormat, QuantSpace, model_size

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("peer_plan_worker.py")
CHOICES = {"modelopt": (4, 8), "mct": (2, 4, 8)}  # bit-widths of weights that a library chooses from
OUR_SCORES = ("gradient", "fisher", "hessian")


def ask(library: str, python: str, model: str, checkpoint: Path, images: Path, bits: float) -> dict[str, Any]:
    """The answer of one process of `peer_plan_worker.py`. Raises RuntimeError if it died."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, str(WORKER), library, model, str(checkpoint), str(images), str(bits)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process of {library} died:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def as_config(space: QuantSpace, weight_bits: dict[str, int]) -> QuantConfig:
    """A plan as a config: weights symmetric per channel, inputs at 8 bits."""
    act = QuantFormat(8)
    return QuantConfig({layer: LayerConfig(QuantFormat(b, True, "channel"), act) for layer, b in weight_bits.items()})


def measure(
    supernet: Supernet, config: QuantConfig, calibration: list[Tensor], validation: list[Batch]
) -> dict[str, float]:
    """Loss and accuracy of a config, BN recalibrated."""
    supernet.set_config(config)
    supernet.recalibrate_bn(calibration)
    with torch.inference_mode():
        logits = torch.cat([supernet(images) for images, _ in validation])
    labels = torch.cat([y for _, y in validation])
    return {
        "validation loss": float(F.cross_entropy(logits, labels)),
        "validation accuracy [%]": 100 * float((logits.argmax(1) == labels).double().mean()),
    }


def main() -> None:
    """Asks, searches, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--env", action="append", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--bits", type=float, nargs="+", default=[5.0, 6.0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environments = dict(entry.split("=", 1) for entry in arguments.env if "=" in entry)
    if not environments or set(environments) - set(CHOICES):
        parser.error(f"--env needs LIBRARY=PYTHON with one of {', '.join(CHOICES)}; got {arguments.env}.")
    start, accelerator, console = time.perf_counter(), Accelerator(cpu=True), Console(width=170, highlight=False)
    run = Run.open(arguments.run)
    data = open_data(run)

    def batches(split: Any, size: int) -> list[Batch]:
        return list(Batches(split, size, seed=0, device="cpu", train=False, mean=data.mean, std=data.std))

    images = batches(random_subset(data.train, arguments.images, 0), 16)
    validation = batches(random_subset(data.validation, 5000, 0), 64)
    float_model = create_float_model(run.settings.model, data.num_classes, data.input_size[0], weights=False)
    float_model.load_state_dict(load_tensors(run.path / "float.safetensors"))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "images.npz"
        np.savez(
            stored, images=torch.cat([x for x, _ in images]).numpy(), labels=torch.cat([y for _, y in images]).numpy()
        )
        for library, python in environments.items():
            choices: dict[str, Any] = {
                "bits": CHOICES[library],
                "act_bits": [8],
                "symmetric": [True],
                "granularity": ["channel"],
            }
            before = time.process_time()
            supernet = Supernet.from_model(copy.deepcopy(float_model), data.input_size, fixed="none", **choices).eval()
            supernet.calibrate([x for x, _ in images])
            tables, seconds = {}, {}
            calibration_s = time.process_time() - before
            for score in OUR_SCORES:
                before = time.process_time()
                tables[score] = SCORES[score](supernet, supernet.space, images, accelerator, lambda: None)
                seconds[score] = calibration_s + time.process_time() - before
            for bits in arguments.bits:
                answer = ask(library, python, run.settings.model.name, run.path / "float.safetensors", stored, bits)
                size = model_size(supernet.space)
                plans = {
                    f"{library} {answer['version']}": (
                        as_config(supernet.space, answer["weight_bits"]),
                        answer["cpu_s"],
                    )
                }
                limit = size.of(next(iter(plans.values()))[0])
                for score, table in tables.items():
                    before = time.process_time()
                    found = exact_search(table.loss(supernet.space), [size], [limit])
                    spent = seconds[score] + time.process_time() - before
                    plans[f"eqnet, {score}"] = (supernet.space.decode(found.genome), spent)
                rows[f"{library}, {bits:g} mean bits asked for"] = {
                    name: {
                        "size [KiB]": size.of(config) / 1024,
                        **measure(supernet, config, [x for x, _ in images], validation),
                        "CPU seconds": spent,
                    }
                    for name, (config, spent) in plans.items()
                }
    show(console, "plans", rows)
    if arguments.json is not None:
        libraries = " ".join(f"--env {name}=peers/{name}/bin/python" for name in environments)
        command = f"python -m benchmarks.peer_plans --run RUN {libraries}"
        facts = {"model": run.settings.model.name, "images": arguments.images, "validation images": 5000}
        seconds_s = time.perf_counter() - start
        write_json(
            arguments.json, {"command": command, "machine": machine() | facts, "seconds": seconds_s, "rows": rows}
        )


if __name__ == "__main__":
    main()
