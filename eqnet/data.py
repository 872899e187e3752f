"""Image sets, their splits, and batches that can be resumed and sharded.

Small sets stay in memory as uint8 and are augmented as whole batches on their device; large ones are read image by image through
timm's transforms. Train trains, validation selects (predictor labels, choice of subnets), test is reported once. The images of a
source are numbered through its parts in the order train, validation, test, so three lists of integers describe a split.

Shapes: `N` images, `B` images of a batch, `H` rows, `W` columns, `C` channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eqnet.augment import (
    ArrayData,
    Augment,
    Batches,
    Data,
    ImageData,
    ImageReader,
    Ints,
    channel_statistics,
    image_transforms,
    keyed_rng,
)

_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
_NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
SPLITS = ("train", "validation", "test")


class DataSettings(Protocol):
    """What `load_data` and the training loop read from the settings."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def download(self) -> bool: ...
    @property
    def validation_fraction(self) -> float: ...
    @property
    def test_fraction(self) -> float: ...
    @property
    def max_images(self) -> int | None: ...
    @property
    def input_size(self) -> Sequence[int] | None: ...
    @property
    def mean(self) -> Sequence[float] | None: ...
    @property
    def std(self) -> Sequence[float] | None: ...
    @property
    def augment(self) -> Augment: ...
    @property
    def transform(self) -> Mapping[str, Any]:
        """Further arguments of `timm.data.create_transform` for training images read from files."""


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


@dataclass(frozen=True, eq=False)
class _Source:
    """All images of a data set: an array uint8 [N, H, W, C] or a reader, labels int64 [N], and the sizes of its own parts.

    `parts` starts with "train", which also feeds the splits that are missing.
    """

    images: NDArray[np.uint8] | ImageReader
    labels: Ints
    parts: dict[str, int]
    class_names: tuple[str, ...]


# --- sources ---------------------------------------------------------------------------------------------------------


def _open_source(settings: DataSettings) -> _Source:
    name = settings.name
    if name == "digits":
        return _digits()
    if name in _TORCHVISION:
        return _torchvision(name, settings.root, settings.download)
    if Path(name).is_dir():
        return _image_folder(Path(name))
    if name.endswith(".npz"):
        return _npz(Path(name))
    if name.partition("/")[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        return _timm(name, settings.root, settings.download)
    raise ValueError(
        f"data.name={name!r} is no known data set and no folder; use digits, {', '.join(_TORCHVISION)}, the path of an .npz file "
        "or of a folder of images, or a timm name such as torch/imagenet or hfds/food101."
    )


def _digits() -> _Source:
    """1797 grey images of 8x8 pixels in 17 levels, spread over the 256 of a byte."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    return _Source(images, labels, {"train": len(labels)}, tuple(str(name) for name in digits.target_names))


def _torchvision(name: str, root: str, download: bool) -> _Source:
    import torchvision.datasets

    kind = getattr(torchvision.datasets, _TORCHVISION[name])
    try:
        parts = [kind(root, train=train, download=download) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever its readers and the network raise
        if download:
            raise ValueError(f"data.name={name!r} could not be downloaded to data.root={root!r} ({error}).") from error
        raise ValueError(
            f"data.name={name!r} is missing or damaged under data.root={root!r}; set data.download=true to fetch it, "
            "or data.root=... to the folder that holds it."
        ) from error
    images = np.concatenate([np.asarray(part.data, dtype=np.uint8) for part in parts])
    labels = np.concatenate([np.asarray(part.targets, dtype=np.int64) for part in parts])
    images = images if images.ndim == 4 else images[..., None]
    return _Source(images, labels, {"train": len(parts[0]), "test": len(parts[1])}, tuple(parts[0].classes))


def _npz(path: Path) -> _Source:
    """Keys `train_images` and `test_images` uint8 [N, H, W, C], `train_labels` and `test_labels` integers [N], optional `classes`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _NPZ_KEYS if key not in file]
            arrays = {key: file[key] for key in (*_NPZ_KEYS, "classes") if key in file}
    except Exception as error:  # zipfile, zlib and numpy each have their own errors for damaged files
        raise ValueError(f"{path} cannot be read as an .npz file of plain arrays ({error}).") from error
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it needs the arrays {', '.join(_NPZ_KEYS)}.")
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{path}: {part}_images must be uint8 [N, H, W, C] and not empty; got {got}.")
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"{path}: {part}_labels must be {len(images)} integers, one per image; got {got}.")
    train, test = arrays["train_images"], arrays["test_images"]
    if train.shape[1:] != test.shape[1:]:
        shapes = f"{list(train.shape[1:])} and {list(test.shape[1:])}"
        raise ValueError(f"{path}: images of train and test must have one shape; got {shapes}.")
    labels = np.concatenate([arrays["train_labels"], arrays["test_labels"]]).astype(np.int64)
    names = [str(name) for name in arrays["classes"].ravel()] if "classes" in arrays else _numbered(labels)
    return _Source(np.concatenate([train, test]), labels, {"train": len(train), "test": len(test)}, tuple(names))


def _numbered(labels: Ints) -> list[str]:
    return [str(label) for label in range(int(labels.max()) + 1)]


def _image_folder(root: Path) -> _Source:
    """`root/<class>/x.jpg`, or `root/train/<class>/x.jpg` with `val` (or `validation`) and `test` beside it.

    Of `val` and `test`, one alone is the test split (ImageNet's `val`): what selects must not be what is reported.
    """
    folders = {"train": root}
    if (root / "train").is_dir():
        validation = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
        test = root / "test" if (root / "test").is_dir() else None
        held_out = {"validation": validation, "test": test} if test else {"test": validation}
        folders = {"train": root / "train"} | {part: folder for part, folder in held_out.items() if folder}
    paths: list[str] = []
    labels: list[int] = []
    parts: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for part, folder in folders.items():
        samples, names = _scan(folder)
        numbers = numbers or {name: label for label, name in enumerate(names)}
        unknown = sorted(set(names) - set(numbers))
        if unknown:
            raise ValueError(
                f"{folder / unknown[0]} is a class without training images; add {root / 'train' / unknown[0]}."
            )
        paths += [path for path, _ in samples]
        labels += [numbers[names[label]] for _, label in samples]
        parts[part] = len(samples)
    return _Source(_FolderImages(tuple(paths)), np.array(labels, dtype=np.int64), parts, tuple(numbers))


def _scan(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        found = ImageFolder(str(folder), allow_empty=True)
    except OSError as error:
        raise ValueError(f"image folder {folder} must hold one folder of images per class ({error}).") from error
    counts = np.bincount(np.array(found.targets, dtype=np.int64), minlength=len(found.classes))
    if (counts == 0).any():
        empty = folder / found.classes[int(np.argmin(counts))]
        raise ValueError(f"class folder {empty} has no images ({', '.join(IMG_EXTENSIONS)}); add some or remove it.")
    return found.samples, found.classes


@dataclass(frozen=True)
class _FolderImages:
    paths: tuple[str, ...]

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def describe(self, index: int) -> str:
        return self.paths[index]


def _timm(name: str, root: str, download: bool) -> _Source:
    """Random-access sets of `timm.data.create_dataset`; its "validation" (or "test") part is the test split."""
    from timm.data.dataset_factory import create_dataset

    prefix, _, rest = name.partition("/")
    if prefix.lower() not in ("torch", "hfds"):
        raise ValueError(
            f"data.name={name!r} is a stream, whose order cannot be resumed or split by class; "
            "use a source with random access (a folder of images, torch/..., hfds/...)."
        )
    if prefix.lower() == "hfds" and not download and not Path(rest).exists():
        hint = "HF_HUB_OFFLINE=1 in the environment keeps it to the local cache"
        raise ValueError(f"data.name={name!r} may need the network; set data.download=true to allow it ({hint}).")
    try:
        train = create_dataset(name, root=root, split="train", download=download)
        try:
            test = create_dataset(name, root=root, split="validation", download=download)
        except ValueError:  # Hugging Face sets without that split
            test = create_dataset(name, root=root, split="test", download=download)
    except Exception as error:  # anything from a missing package to a network error
        reason = str(error) or type(error).__name__
        raise ValueError(f"timm cannot open data.name={name!r} with data.root={root!r} ({reason}).") from error
    pairs = [_timm_labels(dataset, name) for dataset in (train, test)]
    labels = np.concatenate([pair[0] for pair in pairs])
    if pairs[0][1] != pairs[1][1]:
        raise ValueError(f"data.name={name!r} names its classes differently in train and validation; make them one.")
    names = pairs[0][1] or _numbered(labels)
    return _Source(_TimmImages(name, train, test), labels, {"train": len(train), "test": len(test)}, tuple(names))


def _timm_labels(dataset: Any, name: str) -> tuple[Ints, list[str]]:
    reader = getattr(dataset, "reader", None)  # Hugging Face sets have one, torchvision's are the data set itself
    targets = np.asarray(list(reader.dataset[reader.label_key]) if reader else getattr(dataset, "targets", None))
    if not np.issubdtype(targets.dtype, np.integer) or targets.ndim != 1:
        raise ValueError(f"data.name={name!r} lists no integer label per image; convert it to a folder of images.")
    numbers = reader.class_to_idx if reader else getattr(dataset, "class_to_idx", {})
    return targets.astype(np.int64), sorted(numbers, key=numbers.__getitem__)


@dataclass(frozen=True)
class _TimmImages:
    name: str
    train: Any
    test: Any

    def open(self, index: int) -> Image.Image:
        dataset, local = (self.train, index) if index < len(self.train) else (self.test, index - len(self.train))
        reader = getattr(dataset, "reader", None)
        # timm's own __getitem__ silently takes the next image for one that it cannot read.
        return Image.open(reader[local][0]) if reader else dataset[local][0]

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


# --- splits ----------------------------------------------------------------------------------------------------------


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
    source = _open_source(settings)
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


def _draw_split(source: _Source, settings: DataSettings, seed: int) -> dict[str, Ints]:
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
    """Training images without augmentation, the same ones for the same seed, e.g. for step sizes and BN statistics.

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
