"""Image sets, their splits, and batches that can be resumed and sharded.

Small sets stay in memory as uint8; large ones are read image by image through timm's transforms. Train trains, validation selects
(predictor labels, choice of subnets), test is reported once. The images of a source are numbered through its parts in the order
train, validation, test, so three lists of integers describe a split.

Shapes: `N` images, `B` images of a batch, `H` rows, `W` columns, `C` channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqnet.augment import Augment, Ints, channel_statistics, image_transforms, keyed_rng
from eqnet.batches import ArrayData, Batches, Data, ImageData, ImageReader
from eqnet.sources import DataSettings, Source, open_source

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Three disjoint sets of one source, and how to normalise them.

    Attributes:
        train: images that train, calibrate and recalibrate BN.
        validation: images that select.
        test: images that are reported once.
        num_classes: labels are 0 .. num_classes - 1.
        class_names: one name per label.
        input_size: (C, H, W) of a network's input.
        mean: C floats, in units of 1 = white.
        std: C floats, likewise.
        indices: split name -> sorted numbers of its images in the source; pass them to `load_data` to get the same splits.
        fingerprint: sha256 over labels, input size and split; equal for the same data.
    """

    train: Data
    validation: Data
    test: Data
    num_classes: int
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    indices: dict[str, list[int]]
    fingerprint: str


def load_data(
    settings: DataSettings,
    seed: int,
    data_config: Mapping[str, Any] | None = None,
    indices: Mapping[str, Sequence[int]] | None = None,
) -> DataSplits:
    """Opens a data set and splits it into train, validation and test.

    Args:
        settings: the source, fractions, augmentation, overrides of input size, mean and std.
        seed: seed of the split, >= 0.
        data_config: `timm.data.resolve_data_config(pretrained_cfg)` of the network; gives input size, mean, std, interpolation and
            crop of images read from files. Sets in memory take theirs from the training images.
        indices: `DataSplits.indices` of an earlier run, used instead of a new split.

    Raises:
        ValueError: the source is missing, damaged or mislabelled, or the settings do not fit it.
    """
    source = open_source(settings)
    num_classes = len(source.class_names)
    low, high = int(source.labels.min()), int(source.labels.max())
    if num_classes < 2 or low < 0 or high >= num_classes:
        raise ValueError(
            f"data.name={settings.name!r} has {num_classes} classes and labels from {low} to {high}; "
            "labels must lie in 0 .. classes - 1, and there must be 2 classes or more."
        )
    split = _draw_split(source, settings, seed) if indices is None else _stored_split(indices, len(source.labels))
    if isinstance(source.images, np.ndarray):
        data, input_size, mean, std = _arrays(source.images, source.labels, split, settings)
    else:
        data, input_size, mean, std = _image_files(source.images, source.labels, split, settings, data_config or {})
    digest = hashlib.sha256(source.labels.astype("<i8").tobytes() + repr(input_size).encode())
    for name in SPLITS:
        digest.update(f"{name}:{len(split[name])}".encode() + split[name].astype("<i8").tobytes())
    return DataSplits(
        **data,
        num_classes=num_classes,
        class_names=source.class_names,
        input_size=input_size,
        mean=mean,
        std=std,
        indices={name: split[name].tolist() for name in SPLITS},
        fingerprint=digest.hexdigest(),
    )


def _draw_split(source: Source, settings: DataSettings, seed: int) -> dict[str, Ints]:
    """Sorted image numbers of each split; own parts of the source stay whole, the rest comes from its train part by class."""
    rng = keyed_rng(seed, "split")
    numbers, split, start = np.arange(len(source.labels)), {}, 0
    for part, size in source.parts.items():
        split[part] = numbers[start : start + size]
        start += size
    for part, fraction in (("test", settings.test_fraction), ("validation", settings.validation_fraction)):
        if part not in split:
            if not 0 < fraction < 1:
                raise ValueError(f"data.{part}_fraction must lie between 0 and 1; got {fraction}.")
            pool = split["train"]
            chosen = _stratified(source.labels[pool], round(fraction * len(pool)), rng, keep=1)
            split[part], split["train"] = pool[chosen], np.delete(pool, chosen)
    if settings.max_images is not None:
        if settings.max_images < 1:
            raise ValueError(f"data.max_images must be at least 1; got {settings.max_images}.")
        pool = split["train"]
        split["train"] = pool[_stratified(source.labels[pool], min(settings.max_images, len(pool)), rng, keep=0)]
    empty = [part for part, numbers in split.items() if not len(numbers)]
    if empty:
        raise ValueError(
            f"the {empty[0]} split of data.name={settings.name!r} is empty; bring more images of each class."
        )
    return split


def _stratified(labels: Ints, count: int, rng: np.random.Generator, keep: int) -> Ints:
    """Positions of `count` of the labels, sorted, drawn so that every class has its share to within one image.

    Each class keeps back `keep` images, so fewer than `count` may come for classes of few images.
    """
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = count * sizes / len(labels)
    take = np.floor(share).astype(np.int64)
    largest_remainders = np.argsort(take - share, kind="stable")[: count - int(take.sum())]
    take[largest_remainders] += 1
    take = np.minimum(take, sizes - keep)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(inverse[shuffled], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[rank_in_class < np.repeat(take, sizes)])


def _stored_split(indices: Mapping[str, Sequence[int]], num_images: int) -> dict[str, Ints]:
    try:
        split = {name: np.array(indices[name], dtype=np.int64) for name in SPLITS}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the stored split must map {', '.join(SPLITS)} to lists of image numbers ({error!r})."
        ) from error
    numbers = np.concatenate([split[name].ravel() for name in SPLITS])
    if min(part.size for part in split.values()) == 0 or numbers.min() < 0 or numbers.max() >= num_images:
        raise ValueError(
            f"the stored split does not fit a source of {num_images} images; check data.name and data.root."
        )
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError("the stored split has an image twice; train, validation and test must be disjoint.")
    return split


_Built = tuple[dict[str, Any], tuple[int, int, int], tuple[float, ...], tuple[float, ...]]


def _arrays(images: NDArray[np.uint8], labels: Ints, split: dict[str, Ints], settings: DataSettings) -> _Built:
    name, given = settings.name, settings.input_size
    if settings.augment == "timm" or settings.transform:
        raise ValueError(
            f"data.name={name!r} stays in memory; set data.augment to none, shift or shift_flip, no data.transform."
        )
    height, width, channels = images.shape[1:]
    if given is not None and tuple(given) != (channels, height, width):
        raise ValueError(
            f"the images of {name!r} are {[channels, height, width]}; data.input_size={list(given)} differs."
        )
    data = {part: ArrayData(images[chosen], labels[chosen]) for part, chosen in split.items()}
    mean, std = channel_statistics(data["train"].images)
    mean, std = _per_channel("mean", settings.mean, mean, channels), _per_channel("std", settings.std, std, channels)
    return data, (channels, height, width), mean, std


def _image_files(
    reader: ImageReader,
    labels: Ints,
    split: dict[str, Ints],
    settings: DataSettings,
    data_config: Mapping[str, Any],
) -> _Built:
    from timm.data.config import resolve_data_config

    name, size = settings.name, settings.input_size
    if settings.augment not in ("none", "timm"):
        raise ValueError(
            f"data.augment={settings.augment!r} is for sets in memory; set timm or none for data.name={name!r}."
        )
    if size is not None and (len(size) != 3 or min(size) < 1):
        raise ValueError(f"data.input_size must be [channels, height, width]; got {list(size)}.")
    config = resolve_data_config({"input_size": size}, pretrained_cfg=dict(data_config))
    channels, height, width = input_size = tuple(config["input_size"])
    if channels not in (1, 3):
        raise ValueError(f"image files have 1 or 3 channels; data.input_size={list(input_size)} has {channels}.")
    mean = _per_channel("mean", settings.mean, config["mean"], channels)
    std = _per_channel("std", settings.std, config["std"], channels)
    transforms = image_transforms(input_size, mean, std, config, settings.transform)
    mode = "RGB" if channels == 3 else "L"
    data = {part: ImageData(reader, chosen, labels[chosen], mode, *transforms) for part, chosen in split.items()}
    return data, (channels, height, width), mean, std


def _per_channel(
    name: str, given: Sequence[float] | None, derived: Sequence[float], channels: int
) -> tuple[float, ...]:
    values = derived if given is None else given
    if len(values) != channels or (name == "std" and min(values) <= 0):
        kind = "positive number" if name == "std" else "number"
        raise ValueError(f"data.{name} needs one {kind} for each of {channels} channels; got {list(values)}.")
    return tuple(float(value) for value in values)


def random_subset(data: Data, count: int, seed: int) -> Data:
    """`count` images of a split (all if it has fewer) in random order, the same ones for the same seed.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"a subset needs at least 1 image; got {count}.")
    return data.subset(keyed_rng(seed, "subset").permutation(len(data))[:count])


def calibration_batches(
    splits: DataSplits, num_images: int, batch_size: int, seed: int, device: torch.device | str, workers: int = 0
) -> list[Tensor]:
    """Training images without augmentation, the same ones for the same seed, e.g. for step sizes.

    Args:
        splits: from `load_data`.
        num_images: how many; all if there are fewer.
        batch_size: images of a tensor; the last one may have fewer.
        seed: seed of the choice, >= 0.
        device: where the tensors go.
        workers: processes that read images from files.

    Returns:
        float32 [B, C, H, W] tensors, normalised.
    """
    subset = random_subset(splits.train, num_images, seed)
    mean, std = splits.mean, splits.std
    batches = Batches(subset, batch_size, seed=seed, device=device, train=False, mean=mean, std=std, workers=workers)
    return [images for images, _ in batches.epoch(0)]


def bn_batches(
    splits: DataSplits,
    num_images: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    augment: Augment,
    workers: int = 0,
) -> list[Tensor]:
    """Training images that BN statistics are computed of, augmented as in training, the same ones for the same seed.

    A network is trained with the statistics of augmented images. Those of the images as they are differ (shifted images have
    empty borders) and cost accuracy: `benchmarks/evaluation_speed.py` prints how much.

    Args:
        augment: `data.augment` of the run.

    The others and the result are as for `calibration_batches`.
    """
    subset = random_subset(splits.train, num_images, seed)
    everything = Batches(
        subset,
        len(subset),
        seed=seed,
        device=device,
        train=True,
        augment=augment,
        mean=splits.mean,
        std=splits.std,
        workers=workers,
    )
    ((images, _),) = everything.epoch(0)
    return list(images.split(batch_size))
