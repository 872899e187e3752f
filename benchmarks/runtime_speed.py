"""Speed of exported files in ONNX Runtime, one thread, one image: float32, ONNX Runtime's own `quantize_static`, and eqnet's.

    python -m benchmarks.runtime_speed [--nets NAME ...] [--rounds N] [--run RUN [--images N]] [--output FILE.json]

ResNet-18 at 224 px and CIFAR ResNet-20 with random weights, which take the time of trained ones; with `--run`, the net of a trained
run of eqnet, and the accuracy of each file on the run's test images. All files are calibrated on the same images and run with the
same session options; `quantize_static` writes QDQ, int8 weights per channel and uint8 activations. Calls are timed in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets
from benchmarks.tables import save, show
from benchmarks.timing import interleave, ratio
from eqnet.checkpoint import load_float_weights
from eqnet.data import Batches, bn_batches, calibration_batches, random_subset
from eqnet.deploy.export import export_onnx
from eqnet.deploy.runtime import RUNTIMES, sums_are_exact
from eqnet.deploy.trace import IMAGES, LOWEST_OPSET, OUTPUT, trace_graph
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model, open_data
from eqnet.space.hardware import load_target
from eqnet.space.qconfig import Form

NETS = {"resnet18": 224, "cifar_resnet20": 32}
TARGET = "onnxruntime-x86"
FORM = Form("channel", True, False)
MIXED_SEED = 0


def float_file(model: nn.Module, images: Tensor, path: Path) -> None:
    """The float network as ONNX, by torch's exporter."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = ({0: torch.export.Dim("N", min=1)},)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (images[:2],), path, dynamo=True, opset_version=LOWEST_OPSET, verbose=False,
            dynamic_shapes=shapes, input_names=[IMAGES], output_names=[OUTPUT], external_data=False,
        )  # fmt: skip


def quantize_static_file(source: Path, batches: Iterable[Tensor], path: Path) -> None:
    """What ONNX Runtime's own post-training quantization makes of a float file, as its documentation recommends."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter([batch.numpy() for batch in batches])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.images, None)
            return None if batch is None else {IMAGES: batch}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip


def write_files(
    model: nn.Module, supernet: Supernet, batches: list[Tensor], bn: list[Tensor], folder: Path
) -> dict[str, Path]:
    """Every variant of a net as a file; `bn` recalibrates BN."""
    size, target = tuple(batches[0].shape[1:]), load_target(TARGET)
    space = target.restrict(supernet.space)
    mixed = space.sample(np.random.default_rng(MIXED_SEED))
    files = {name: folder / f"{name}.onnx" for name in ("float32", "quantize_static", "8 bits", "mixed 2-8 bits")}
    float_file(model, batches[0], files["float32"])
    quantize_static_file(files["float32"], batches, files["quantize_static"])
    supernet.set_config(space.largest())
    supernet.recalibrate_bn(bn)
    traced = trace_graph(supernet.extract(), size, LOWEST_OPSET)
    for name, config in {"8 bits": space.uniform(8, FORM), "mixed 2-8 bits": mixed}.items():
        subnet = supernet.extract(config)
        export_onnx(
            subnet, config, space.layers, target, files[name], input_size=size, images=batches, traced=traced
        )  # fmt: skip
    return files


def measure(files: dict[str, Path], image: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of one image, in turns, and how many times as fast float32 and `quantize_static` are slower."""
    sessions = {name: RUNTIMES["onnxruntime"].load(onnx.load(path)) for name, path in files.items()}
    pixels = image.numpy()
    timings = interleave({name: (lambda s=s: s.run(pixels)) for name, s in sessions.items()}, rounds, warmup=3)  # type: ignore[misc]
    return {
        name: {
            "ms": 1e3 * timings[name].median,
            "quartiles": [1e3 * timings[name].low, 1e3 * timings[name].high],
            "float32 / it": ratio(timings, "float32", name),
            "quantize_static / it": ratio(timings, "quantize_static", name),
        }
        for name in files
    }


def accuracy(path: Path, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percent of right answers of a file."""
    session, right, total = RUNTIMES["onnxruntime"].load(onnx.load(path)), 0, 0
    for images, labels in batches:
        right += int((session.run(images.numpy())[OUTPUT].argmax(1) == labels.numpy()).sum())
        total += len(labels)
    return 100.0 * right / total


def random_net(name: str, side: int, rounds: int) -> dict[str, Any]:
    """The figures of a net with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    batches = [torch.randn(4, 3, side, side)]
    supernet = Supernet.from_model(copy.deepcopy(model), (3, side, side)).eval()
    supernet.calibrate(batches[0])
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(model, supernet, batches, batches, Path(folder))
        return measure(files, batches[0][:1], rounds)


def trained_net(run: Run, images: int, calibration: int, rounds: int) -> dict[str, Any]:
    """The figures of the net of a run, with accuracies on `images` test images; files are calibrated on `calibration` others."""
    supernet, facts = run.load_supernet()
    settings, data = run.settings, open_data(run)
    model = create_float_model(settings.model, facts["num_classes"], facts["input_size"][0], weights=False)
    load_float_weights(model, run.path / "float.safetensors")
    batches = calibration_batches(data, calibration, 64, settings.seed, "cpu", settings.data.workers)
    d, count = settings.data, max(calibration, settings.search.bn_images)
    bn = bn_batches(data, count, 64, settings.seed, "cpu", d.augment, d.workers)
    test = Batches(
        random_subset(data.test, images, settings.seed), 64, seed=settings.seed, device="cpu", train=False,
        mean=data.mean, std=data.std, workers=settings.data.workers,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(model, supernet, batches, bn, Path(folder))
        rows = measure(files, batches[0][:1], rounds)
        for name, path in files.items():
            rows[name]["accuracy %"] = accuracy(path, test.epoch(0))
    return rows


def main() -> None:
    """Prints one table for each net and writes all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS))
    parser.add_argument("--size", type=int, help="pixels of a side, instead of 224 and 32")
    parser.add_argument("--rounds", type=int, default=50, help="measurements of each file")
    parser.add_argument("--run", type=Path, help="a trained run, measured besides")
    parser.add_argument("--images", type=int, default=10_000, help="test images of the run")
    parser.add_argument(
        "--calibration", type=int, default=256, help="training images of the run that calibrate the files"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/runtime_speed.json"))
    arguments = parser.parse_args()
    console, rows = Console(width=170, highlight=False), {}
    for name in arguments.nets:
        side = arguments.size or NETS[name]
        rows[f"{name}, {side} px"] = random_net(name, side, arguments.rounds)
    if arguments.run is not None:
        run = Run.open(arguments.run)
        found = trained_net(run, arguments.images, arguments.calibration, arguments.rounds)
        rows[f"{run.settings.model.name}, trained"] = found
    show(console, "runtime_speed", rows)
    exact = sums_are_exact(RUNTIMES["onnxruntime"])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save(arguments.output, rows, **{"exact sums": exact})
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
