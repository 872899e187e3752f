"""What measuring a config costs, against the float network, and how exact it is.

A config is measured by recalibrating BN on training images and then classifying validation images. 1.00 is the float network
in contiguous layout on the same images, in eval mode for classification and in train mode for recalibration. All variants
run in one process that keeps freed memory, as train.py and search.py do; what that is worth is measured as well. Integer
variants are left out on a CPU that has no integer kernels.

    python -m benchmarks evaluation_speed [--full | --short] [--output folder]
    python -m benchmarks.evaluation_speed accuracy --run folder [--json FILE] [--plot FILE]
    python -m benchmarks.evaluation_speed augmentation --run folder [--json FILE]
    python -m benchmarks.evaluation_speed plot --json FILE --plot FILE

The second form measures accuracies on the supernet of an own run, instead of a small one that the first trains on digits:
how often integer execution and simulation disagree, what recalibration with few images costs, and with images that are not
augmented as in training; the third measures the latter alone. The fourth plots the error of few images from what the first two
wrote.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from scipy.stats import kendalltau
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm
from benchmarks.tables import show
from benchmarks.timing import Size, interleave, nets_of, ratio
from eqnet.augment import Augment
from eqnet.checkpoint import read_json, write_json
from eqnet.command import keep_freed_memory
from eqnet.data import Batches, DataSplits, bn_batches, calibration_batches, random_subset
from eqnet.nn.compiled import choose_kernels
from eqnet.nn.integer import kernels_available
from eqnet.nn.integer_supernet import IntegerSupernet
from eqnet.nn.supernet import Supernet, recalibrate_bn
from eqnet.run import Run, open_data
from eqnet.scoring.evaluation import Evaluator, accuracy
from eqnet.scoring.table import table_genomes

NETS = {
    "cifar_resnet20, 32 px, batch 64": ("cifar_resnet20", 32, 64),
    "resnet18, 224 px, batch 16": ("resnet18", 224, 16),
}
SHORT = {"cifar_resnet20, 16 px, batch 8": ("cifar_resnet20", 16, 8)}
UNIT = "float, contiguous"
# configs, draws of recalibration images, validation images, recalibration images at most
SAMPLES: dict[Size, tuple[int, int, int, int]] = {
    "short": (2, 2, 64, 128),
    "usual": (6, 3, 3000, 512),
    "full": (12, 6, 3000, 2048),
}
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


# -- speed ------------------------------------------------------------------------------------------------------------


def build(net: str) -> tuple[nn.Module, Supernet, Tensor]:
    """A float network, its calibrated supernet at W4A4 in the first form, and images."""
    name, size, batch = {**NETS, **SHORT}[net]
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(batch, 3, size, size)
    supernet = Supernet.from_model(copy.deepcopy(model), images.shape[1:]).eval()
    supernet.calibrate(images[:8])
    supernet.set_config(supernet.space.uniform(4, supernet.space.forms[0]))
    supernet.recalibrate_bn([images])
    return model, supernet, images


def channels_last(module: nn.Module) -> nn.Module:
    """A copy in that layout."""
    return copy.deepcopy(module).to(memory_format=torch.channels_last)


def without_gradients(call: Callable[[], object]) -> Callable[[], None]:
    """The call in inference mode."""

    def run() -> None:
        with torch.inference_mode():
            call()

    return run


def forward_rows(net: str, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Classification and recalibration of one batch: seconds and ratios of each variant."""
    model, supernet, images = build(net)
    packed = images.contiguous(memory_format=torch.channels_last)
    float_last, eager, compiled = channels_last(model), channels_last(supernet), channels_last(supernet)
    assert isinstance(compiled, Supernet)
    compiled.use_kernels(choose_kernels("on", images.device))
    classify: dict[str, Callable[[], object]] = {
        UNIT: lambda: model(images),
        "float, channels_last": lambda: float_last(packed),
        "simulation, eager": lambda: eager(packed),
        "simulation, compiled": lambda: compiled(packed),
    }
    trained_float, trained_last = copy.deepcopy(model), channels_last(model)
    recalibrate: dict[str, Callable[[], object]] = {
        UNIT: lambda: recalibrate_bn(trained_float, [images]),
        "float, channels_last": lambda: recalibrate_bn(trained_last, [packed]),
        "simulation, eager": lambda: recalibrate_bn(eager, [packed]),
        "simulation, compiled": lambda: recalibrate_bn(compiled, [packed]),
    }
    if kernels_available():
        executor = IntegerSupernet(supernet)
        frozen = executor.freeze()

        def layer_by_layer() -> None:
            with executor.layer_by_layer():
                supernet(images)

        twin = copy.deepcopy(supernet)  # the frozen network above keeps its statistics
        other = IntegerSupernet(twin)
        classify["integer, layer by layer"] = layer_by_layer
        classify["integer, fused"] = lambda: frozen(images)
        classify["integer, change of the config"] = executor.freeze
        recalibrate["integer, fused"] = lambda: other.recalibrate_bn([images])
    results = []
    for variants in (classify, recalibrate):
        timings = interleave({name: without_gradients(f) for name, f in variants.items()}, rounds, 2)
        results.append(
            {
                name: {"seconds": t.median, "quartiles": [t.low, t.high], f"/ {UNIT}": ratio(timings, name, UNIT)}
                for name, t in timings.items()
            }
        )
    return results[0], results[1]


def config_rows(net: str, bn_images: int, images: int, configs: int) -> dict[str, Any]:
    """Configs per second, random ones one after the other, each recalibrated and measured."""
    _, supernet, batch = build(net)
    size = len(batch)
    labels = torch.zeros(size, dtype=torch.int64)
    bn, split = [batch] * (bn_images // size), {"validation": [(batch, labels)] * (images // size)}
    evaluators = {"simulation": Evaluator(supernet, bn, split, "off")}
    if kernels_available():
        evaluators["integer"] = Evaluator(supernet, bn, split, "on")
    seconds: dict[str, list[float]] = {name: [] for name in evaluators}
    for i, genome in enumerate(table_genomes(supernet.space, configs, 0)):
        for name, evaluator in evaluators.items() if i % 2 else reversed(evaluators.items()):
            start = time.perf_counter()
            evaluator.measure(supernet.space.decode(genome), "validation")
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    return {
        name: {
            "recalibration images": bn_images,
            "validation images": images,
            "configs per second": 1 / median,
            "quartiles of seconds": np.quantile(seconds[name], (0.25, 0.75)).tolist(),
            "/ simulation": median / medians["simulation"],
        }
        for name, median in medians.items()
    }


def malloc_rows(net: str, rounds: int) -> dict[str, Any]:
    """The float forward pass and the fused integer one in fresh processes, with and without keeping freed memory."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for i in range(rounds):
        for memory in ("returned", "kept") if i % 2 else ("kept", "returned"):
            command = [sys.executable, "-m", "benchmarks.evaluation_speed", "worker", net, memory]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                seconds.setdefault((name, memory), []).append(value)
    return {
        name: {
            "seconds, memory returned": float(np.median(seconds[name, "returned"])),
            "seconds, memory kept": float(np.median(seconds[name, "kept"])),
            "kept / returned": float(np.median(seconds[name, "kept"]) / np.median(seconds[name, "returned"])),
        }
        for name in {name: None for name, _ in seconds}
    }


def worker(net: str, memory: str) -> None:
    """One process of `malloc_rows`: prints seconds as JSON."""
    if memory == "kept":
        keep_freed_memory()
    model, supernet, images = build(net)
    calls: dict[str, Callable[[], object]] = {"float": lambda: model(images), "simulation": lambda: supernet(images)}
    if kernels_available():
        frozen = IntegerSupernet(supernet).freeze()
        calls["integer"] = lambda: frozen(images)
    timings = interleave({name: without_gradients(f) for name, f in calls.items()}, 7, 2)
    print(json.dumps({name: t.median for name, t in timings.items()}))


# -- accuracy ---------------------------------------------------------------------------------------------------------


def train_digits(folder: Path, short: bool) -> Path:
    """A small supernet on the bundled digits, trained by the library."""
    sizes = ["pretrain.epochs=1", "train.epochs=1"] if short else ["pretrain.epochs=10", "train.epochs=5"]
    overrides = [f"output={folder}", "tracking=none", "train.evaluate_epochs=0", "model.arguments={width: 8}", *sizes]
    space = [
        "space.granularity=[tensor]",
        "search.bn_images=64",
        "search.max_validation_images=16",
    ]  # a short evaluation
    done = subprocess.run([sys.executable, str(TRAIN), *overrides, *space], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return folder


def agreement_rows(supernet: Supernet, data: DataSplits, augment: Augment, configs: int, images: int) -> dict[str, Any]:
    """Integer execution against the simulation: top-1 classes and accuracies, over random configs.

    "same statistics": BN recalibrated by the simulation. "own statistics": each recalibrates for itself. "floats in another
    order": two simulations, one with torch's own convolutions instead of oneDNN's.
    """
    executor = IntegerSupernet(supernet) if kernels_available() else None
    bn = bn_batches(data, 512, 64, 0, "cpu", augment)
    split = list(batches(data, images))
    labels = torch.cat([y for _, y in split])

    def classes(network: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([network(x).argmax(1) for x, _ in split])

    found: dict[str, list[tuple[float, float]]] = {}
    with torch.inference_mode():
        for genome in table_genomes(supernet.space, configs, 1):
            supernet.set_config(supernet.space.decode(genome))
            supernet.recalibrate_bn(bn)
            expected = classes(supernet)
            results = {}
            if executor is not None:
                results["integer, same statistics"] = classes(executor.freeze())
                executor.recalibrate_bn(bn)
                results["integer, own statistics"] = classes(executor.freeze())
            with torch.backends.mkldnn.flags(enabled=False):
                supernet.recalibrate_bn(bn)
            results["floats in another order, own statistics"] = classes(supernet)
            for name, got in results.items():
                right = (got == labels).double().mean() - (expected == labels).double().mean()
                found.setdefault(name, []).append((100 * float((got != expected).double().mean()), 100 * float(right)))
    rows: dict[str, Any] = {}
    for name, values in found.items():
        differ, gained = np.array(values).T
        rows[name] = {
            "other top-1 [% of images]": float(differ.mean()),
            "accuracy, mean difference [%]": float(gained.mean()),
            "accuracy, deviation [%]": float(gained.std()),
            "configs": configs,
            "images": len(labels),
        }
    return rows


def batches(data: DataSplits, images: int) -> Batches:
    """Validation images, 64 at a time."""
    split = random_subset(data.validation, images, 0)
    return Batches(split, 64, seed=0, device="cpu", train=False, mean=data.mean, std=data.std)


def augmentation_rows(
    supernet: Supernet, data: DataSplits, augment: Augment, configs: int, images: int
) -> dict[str, Any]:
    """Mean accuracy over random configs, BN recalibrated with 512 images as in training, and as they are."""
    split, rows = list(batches(data, images)), {}
    drawn = {
        f"augmented ({augment})": bn_batches(data, 512, 64, 0, "cpu", augment),
        "as they are": calibration_batches(data, 512, 64, 0, "cpu"),
    }
    for name, bn in drawn.items():
        found = []
        for genome in table_genomes(supernet.space, configs, 3):
            supernet.set_config(supernet.space.decode(genome))
            supernet.recalibrate_bn(bn)
            found.append(accuracy(supernet, split))
        rows[name] = {"accuracy [%]": float(np.mean(found)), "configs": configs}
    return rows


def recalibration_rows(
    supernet: Supernet, data: DataSplits, augment: Augment, sizes: list[int], configs: int, draws: int, images: int
) -> dict[str, Any]:
    """Accuracy after recalibration with few images, over draws of the images and random configs.

    "shared deviation": standard deviation over draws of the mean accuracy of all configs; moves reported accuracies, not their
    order. "own deviation": of what is left, which disturbs the order; without any error of recalibration it would not be 0
    but that of rounding. "Kendall": order of the configs against their order by the mean over draws with the most images.
    """
    executor = IntegerSupernet(supernet) if kernels_available() else None
    split = list(batches(data, images))
    labels = torch.cat([y for _, y in split])
    drawn = [torch.cat(bn_batches(data, max(sizes), 64, seed, "cpu", augment)) for seed in range(draws)]
    measured = np.zeros((configs, draws, len(sizes)))
    with torch.inference_mode():
        for i, genome in enumerate(table_genomes(supernet.space, configs, 2)):
            supernet.set_config(supernet.space.decode(genome))
            for d, k in np.ndindex(draws, len(sizes)):
                (executor or supernet).recalibrate_bn(list(drawn[d][: sizes[k]].split(64)))
                network = supernet if executor is None else executor.freeze()
                got = torch.cat([network(x).argmax(1) for x, _ in split])
                measured[i, d, k] = 100 * float((got == labels).double().mean())
    reference = measured[:, :, -1].mean(1)
    rows: dict[str, Any] = {}
    for k, size in enumerate(sizes):
        m = measured[:, :, k]
        own = m - m.mean(0) - m.mean(1, keepdims=True) + m.mean()
        kendall = float(np.mean([kendalltau(column, reference)[0] for column in m.T]))
        rows[f"{size} images"] = {
            "images": size,
            "accuracy [%]": float(m.mean()),
            "shared deviation [%]": float(m.mean(0).std(ddof=1)),
            "own deviation [%]": float(np.sqrt((own**2).sum() / max((configs - 1) * (draws - 1), 1))),
            "Kendall": kendall if np.isfinite(kendall) else None,  # undefined if all configs are measured alike
        }
    return rows


def plot_recalibration(rows: dict[str, Any], path: Path) -> None:
    """Deviations against the number of images, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    images = [row["images"] for row in rows.values()]
    for name in ("shared deviation [%]", "own deviation [%]"):
        axes.plot(images, [row[name] for row in rows.values()], marker="o", label=name)
    axes.plot(
        images,
        [abs(row["accuracy [%]"] - list(rows.values())[-1]["accuracy [%]"]) for row in rows.values()],
        marker="o",
        label=f"mean accuracy, distance to {images[-1]} images [%]",
    )
    axes.set(xscale="log", xlabel="training images that recalibrate BN", ylabel="error of the accuracy [%]")
    axes.set_xticks(images, [str(n) for n in images])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def accuracy_rows(run: Run, size: Size) -> dict[str, Any]:
    """Agreement and recalibration on the supernet of a run."""
    supernet, data, augment = run.load_supernet()[0], open_data(run), run.settings.data.augment
    configs, draws, images, largest = SAMPLES[size]
    largest = min(largest, len(data.train))
    sizes = [n for n in (32, 64, 128, 256, 512, 1024, 2048) if n <= largest]
    return {
        "agreement": agreement_rows(supernet, data, augment, 30 if size == "full" else configs, images),
        "augmentation": augmentation_rows(supernet, data, augment, configs, images),
        "recalibration": recalibration_rows(supernet, data, augment, sizes, configs, draws, images),
    }


# -- everything -------------------------------------------------------------------------------------------------------


def run(size: Size) -> dict[str, Any]:
    """Speed on the networks, configs per second, memory, and accuracies on digits."""
    keep_freed_memory()
    out: dict[str, Any] = {}
    short, nets = size == "short", nets_of(size, NETS, SHORT)
    for net in nets:
        out[f"{net}: classification"], out[f"{net}: recalibration"] = forward_rows(net, 1 if short else 11)
    for net in nets:
        large = "224" in net
        bn, images, configs = (16, 16, 2) if short else (128, 256, 3) if large else (512, 4096, 4)
        out[f"{net}: configs"] = config_rows(net, bn, images, configs)
    for net in nets:
        out[f"{net}: memory"] = malloc_rows(net, {"short": 1, "usual": 2, "full": 3}[size])
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in accuracy_rows(Run.open(train_digits(Path(folder) / "digits", short)), size).items():
            out[f"digits: {name}"] = rows
    return out


def main() -> None:
    """The accuracies of an own run, and the processes of `malloc_rows`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name in ("accuracy", "augmentation"):
        own = jobs.add_parser(name)
        own.add_argument("--run", required=True)
        own.add_argument("--json", type=Path)
        if name == "accuracy":
            own.add_argument("--plot", type=Path)
    plot = jobs.add_parser("plot")
    plot.add_argument("--json", type=Path, required=True)
    plot.add_argument("--plot", type=Path, required=True)
    job = jobs.add_parser("worker")
    job.add_argument("net")
    job.add_argument("memory", choices=["kept", "returned"])
    arguments = parser.parse_args()
    if arguments.job == "worker":
        return worker(arguments.net, arguments.memory)
    if arguments.job == "plot":
        written = read_json(arguments.json)
        rows = written.get("rows", written)
        return plot_recalibration(rows.get("digits: recalibration") or rows["recalibration"], arguments.plot)
    keep_freed_memory()
    opened = Run.open(arguments.run)
    if arguments.job == "augmentation":
        data, augment = open_data(opened), opened.settings.data.augment
        rows = augmentation_rows(opened.load_supernet()[0], data, augment, 12, 3000)
    else:
        rows = accuracy_rows(opened, "full")
    show(Console(width=170, highlight=False), arguments.run, rows)
    if arguments.json is not None:
        write_json(arguments.json, rows)
    if arguments.job == "accuracy" and arguments.plot is not None:
        plot_recalibration(rows["recalibration"], arguments.plot)
    return None


if __name__ == "__main__":
    main()
