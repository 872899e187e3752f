"""Where images come from: scikit-learn's digits, .npz files, torchvision, folders of images or tar files, timm.

The images of a source are numbered through its parts in the order train, validation, test.

Shapes: `N` images, `H` rows, `W` columns, `C` channels.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eqnet.augment import Augment, Ints
from eqnet.batches import ImageReader
from eqnet.shards import ShardImages

_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
MAX_CLASSES = 1_000_000
_NPZ_PARTS = ("train", "validation", "test")


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
class Source:
    """All images of a data set: an array uint8 [N, H, W, C] or a reader, labels int64 [N], and the sizes of its own parts.

    `parts` starts with "train", which also feeds the splits that are missing.
    """

    images: NDArray[np.uint8] | ImageReader
    labels: Ints
    parts: dict[str, int]
    class_names: tuple[str, ...]


def open_source(settings: DataSettings) -> Source:
    """Opens the data set that `settings.name` names.

    Raises:
        ValueError: it is unknown, missing, damaged, or its labels are not integers.
    """
    name = settings.name
    if name == "digits":
        return _digits()
    if name in _TORCHVISION:
        return _torchvision(name, settings.root, settings.download)
    if Path(name).is_dir():
        folders = _part_folders(Path(name))
        return (_shards if any(folders["train"].glob("*.tar")) else _image_folder)(folders)
    if name.endswith(".npz"):
        return _npz(Path(name))
    if name.partition("/")[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        return _timm(name, settings.root, settings.download)
    raise ValueError(
        f"data.name={name!r} is no known data set and no folder; use digits, {', '.join(_TORCHVISION)}, the path of an .npz file "
        "or of a folder of images, or a timm name such as torch/imagenet or hfds/food101."
    )


def _digits() -> Source:
    """1797 grey images of 8x8 pixels in 17 levels, spread over the 256 of a byte."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    return Source(images, labels, {"train": len(labels)}, tuple(str(name) for name in digits.target_names))


def _torchvision(name: str, root: str, download: bool) -> Source:
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
    return Source(images, labels, {"train": len(parts[0]), "test": len(parts[1])}, tuple(parts[0].classes))


def _npz(path: Path) -> Source:
    """Keys `train_images` and `test_images` uint8 [N, H, W, C], `train_labels` and `test_labels` integers [N]; optional are
    `classes`, and `validation_images` with `validation_labels`."""
    try:
        _check_unpacked_size(path)
        with np.load(path, allow_pickle=False) as file:
            parts = [part for part in _NPZ_PARTS if part != "validation" or any(k.startswith(part) for k in file)]
            keys = [f"{part}_{kind}" for part in parts for kind in ("images", "labels")]
            missing = [key for key in keys if key not in file]
            arrays = {key: file[key] for key in (*keys, "classes") if key in file}
    except Exception as error:  # zipfile, zlib and numpy each have their own errors for damaged files
        raise ValueError(f"{path} cannot be read as an .npz file of plain arrays ({error}).") from error
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it needs the arrays {', '.join(keys)}.")
    for part in parts:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{path}: {part}_images must be uint8 [N, H, W, C] and not empty; got {got}.")
        if images.shape[1:] != arrays["train_images"].shape[1:]:
            shapes = f"{list(arrays['train_images'].shape[1:])} and {list(images.shape[1:])}"
            raise ValueError(f"{path}: images of train and {part} must have one shape; got {shapes}.")
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"{path}: {part}_labels must be {len(images)} integers, one per image; got {got}.")
        if labels.min() < 0 or labels.max() >= MAX_CLASSES:
            raise ValueError(f"{path}: {part}_labels must be numbers from 0 to {MAX_CLASSES - 1}.")
    images, labels = (np.concatenate([arrays[f"{part}_{kind}"] for part in parts]) for kind in ("images", "labels"))
    labels = labels.astype(np.int64)
    names = [str(name) for name in arrays["classes"].ravel()] if "classes" in arrays else _numbered(labels)
    return Source(images, labels, {part: len(arrays[f"{part}_labels"]) for part in parts}, tuple(names))


def _check_unpacked_size(path: Path) -> None:
    """Raises ValueError if the arrays of an archive do not fit into the memory of this machine; reads its index only."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"its arrays take {size / 2**30:.1f} GiB and this machine has {memory / 2**30:.1f} GiB of memory; use a folder of images"
        )


def _numbered(labels: Ints) -> list[str]:
    return [str(label) for label in range(int(labels.max()) + 1)]


def _part_folders(root: Path) -> dict[str, Path]:
    """Folders of the parts: `root` itself, or `root/train` with `val` (or `validation`) and `test` beside it.

    Of `val` and `test`, one alone is the test split (ImageNet's `val`): what selects must not be what is reported.
    """
    if not (root / "train").is_dir():
        return {"train": root}
    validation = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    test = root / "test" if (root / "test").is_dir() else None
    held_out = {"validation": validation, "test": test} if test else {"test": validation}
    return {"train": root / "train"} | {part: folder for part, folder in held_out.items() if folder}


def _shards(folders: dict[str, Path]) -> Source:
    """`<folder>/*.tar`, see `eqnet.shards`; classes have numbers for names."""
    images = ShardImages()
    found = {part: images.add(folder) for part, folder in folders.items()}
    labels = np.concatenate(list(found.values()))
    if not len(found["train"]):
        raise ValueError(f"the tar files in {folders['train']} hold no images.")
    if labels.max() >= MAX_CLASSES:
        raise ValueError(f"labels of the tar files in {folders['train'].parent} must be below {MAX_CLASSES}.")
    return Source(images, labels, {part: len(own) for part, own in found.items()}, tuple(_numbered(labels)))


def _image_folder(folders: dict[str, Path]) -> Source:
    """`<folder>/<class>/x.jpg`."""
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
                f"{folder / unknown[0]} is a class without training images; add {folders['train'] / unknown[0]}."
            )
        paths += [path for path, _ in samples]
        labels += [numbers[names[label]] for _, label in samples]
        parts[part] = len(samples)
    return Source(_FolderImages(tuple(paths)), np.array(labels, dtype=np.int64), parts, tuple(numbers))


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


def _timm(name: str, root: str, download: bool) -> Source:
    """Random-access sets of `timm.data.create_dataset`; its "validation" (or "test") part is the test split."""
    from timm.data.dataset_factory import create_dataset

    prefix, _, rest = name.partition("/")
    if prefix.lower() not in ("torch", "hfds"):
        raise ValueError(
            f"data.name={name!r} is a stream, whose order cannot be resumed or split by class; "
            "use a source with random access (a folder of images or of tar files, torch/..., hfds/...)."
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
    return Source(_TimmImages(name, train, test), labels, {"train": len(train), "test": len(test)}, tuple(names))


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
