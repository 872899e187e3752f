"""Images per second from JPEG files to normalised batches, against a plain torchvision `ImageFolder` and `DataLoader`.

Synthetic photographs of ImageNet's usual size are written as image files and as tar files. Every variant decodes, crops
(RandomResizedCrop to 224), mirrors and normalises the same images; an epoch counts with the start of its workers.

    python -m benchmarks input_pipeline [--full | --short] [--output folder]
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.timing import Size, interleave
from eqnet.batches import Batches
from eqnet.data import load_data
from eqnet.settings import load_settings
from eqnet.sources import open_source

SIZE, QUALITY, BATCH, CLASSES = (500, 375), 90, 64, 4
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PLAIN = "torchvision ImageFolder"
SAME = "transform={interpolation: bilinear, color_jitter: null}"  # what the baseline does


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG with the spectrum of a photograph: noise whose amplitude falls with its frequency, a few edges, some grain."""
    width, height = SIZE
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(fy, fx), 1 / width)
    channels = []
    light = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * falling, (height, width))
    for _ in range(3):
        colour = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * falling**1.5, (height, width))
        channels.append(light / light.std() + 0.3 * colour / colour.std())
    image = 128 + 45 * np.stack(channels, -1)
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[top : top + rng.integers(20, 200), left : left + rng.integers(20, 200)] += rng.normal(0, 40, 3)
    image += rng.normal(0, 7, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


def write_images(folder: Path, count: int) -> float:
    """`files/train|val/<class>/*.jpg` and `tars/train|val/*.tar` with the same `count` training images; returns mean bytes."""
    rng, sizes = np.random.default_rng(0), []
    for part, images in (("train", count), ("val", CLASSES)):
        (folder / "tars" / part).mkdir(parents=True)
        for label in range(CLASSES):
            (folder / "files" / part / str(label)).mkdir(parents=True)
            with tarfile.open(folder / "tars" / part / f"{label}.tar", "w") as archive:
                for i in range(images // CLASSES):
                    data = photograph(rng)
                    sizes.append(len(data))
                    (folder / "files" / part / str(label) / f"{i:05}.jpg").write_bytes(data)
                    for name, content in ((f"{label}_{i:05}.cls", str(label).encode()), (f"{label}_{i:05}.jpg", data)):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return float(np.mean(sizes))


def plain_epoch(folder: Path, workers: int) -> Callable[[], object]:
    """One epoch of the baseline."""
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = ImageFolder(str(folder / "files" / "train"), transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers)
    return lambda: [len(labels) for _, labels in loader]


def own_epoch(folder: Path, kind: str, workers: int, *options: str) -> Callable[[], object]:
    """One epoch of the batches that training sees. `kind`: "files" or "tars"."""
    name = f"data.name={folder / kind}"
    given = [f"data.{o}" for o in options]
    s = load_settings([name, "data.augment=timm", "data.validation_fraction=0.02", *given])
    data = load_data(s.data, 0)
    batches = Batches(
        data.train,
        BATCH,
        seed=0,
        device="cpu",
        train=True,
        augment="timm",
        mean=data.mean,
        std=data.std,
        workers=workers,
    )
    return lambda: [len(labels) for _, labels in batches.epoch(0)]


def opening(folder: Path, kind: str) -> float:
    """Images per second when a source is opened: files listed, or headers of tar files read; the best of three."""
    settings, seconds = load_settings([f"data.name={folder / kind}"]).data, []
    for _ in range(3):
        start = time.perf_counter()
        count = len(open_source(settings).labels)
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def run(size: Size) -> dict[str, Any]:
    """Images per second of each reader and number of workers, interleaved."""
    sizes = {"short": (2 * BATCH + 8, 1, [0]), "usual": (3 * BATCH, 3, [0, 2]), "full": (5 * BATCH, 5, [0, 1, 2])}
    count, rounds, workers = sizes[size]
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_images(folder, count)
        opened = {kind: opening(folder, kind) for kind in ("files", "tars")}
        for n in workers:
            variants = {
                PLAIN: plain_epoch(folder, n),
                "eqnet, image files": own_epoch(folder, "files", n, SAME),
                "eqnet, tar files": own_epoch(folder, "tars", n, SAME),
                "eqnet, image files, timm's default transform": own_epoch(folder, "files", n),
            }
            images = {name: sum(epoch()) for name, epoch in variants.items()}  # type: ignore[call-overload]
            timings = interleave(variants, rounds, warmup=0)
            speed = {name: images[name] / t.median for name, t in timings.items()}
            rows[f"{n} workers"] = {
                name: {
                    "images per second": speed[name],
                    "quartiles": [images[name] / t.high, images[name] / t.low],
                    f"/ {PLAIN}": speed[name] / speed[PLAIN],
                }
                for name, t in timings.items()
            }
    rows["opening, images per second"] = {kind: {"images per second": value} for kind, value in opened.items()}
    return {f"JPEG {SIZE[0]} x {SIZE[1]}, {size / 1000:.0f} kB: {name}": values for name, values in rows.items()}
