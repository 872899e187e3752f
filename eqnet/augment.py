"""From stored images to the batches a network reads: keyed randomness, augmentation, normalisation, order, sharding.

Every random number is a pure function of (seed, purpose, key), e.g. of (seed, "augment", epoch, batch): a run that resumes inside
an epoch, or runs on several processes, sees the same images, bit for bit. Small images are augmented as whole batches on their
device; large ones one by one through `timm.data.create_transform`, by worker processes if there are any.

Shapes: `N` images, `B` images of a batch, `H` rows, `W` columns, `C` channels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Augment = Literal["none", "shift", "shift_flip", "timm"]
Purpose = Literal["split", "order", "augment", "subset"]
ImageTransform = Callable[[Image.Image], Tensor]
Ints = NDArray[np.int64]

_PURPOSES: dict[Purpose, int] = {"split": 0, "order": 1, "augment": 2, "subset": 3}


def keyed_rng(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments.

    Args:
        seed: seed of the run, >= 0.
        purpose: keeps the streams of different uses apart.
        key: e.g. epoch and batch index.
    """
    # A spawn key, not a longer entropy tuple: SeedSequence pads entropy with zeros, so (3, 1) and (3, 1, 0) would be one stream.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSES[purpose], *key)))


class ShiftFlip(NamedTuple):
    """Drawn augmentation of one batch: `offsets` int64 [B, 2] (row, column; `pad` means unmoved), `flips` bool [B]."""

    offsets: NDArray[np.int64]
    flips: NDArray[np.bool_]


def shift_pad(height: int) -> int:
    """Largest shift in pixels for images of this height: 4 at 32 (the usual CIFAR crop), 1 at 8."""
    return max(1, height // 8)


def draw_shift_flip(rng: np.random.Generator, count: int, pad: int, *, flip: bool) -> ShiftFlip:
    """Random shifts of up to `pad` pixels each way and, if `flip`, a mirror image with probability one half."""
    offsets = rng.integers(0, 2 * pad + 1, size=(count, 2))
    flips = rng.random(count) < 0.5 if flip else np.zeros(count, dtype=np.bool_)
    return ShiftFlip(offsets, flips)


def shift_flip(images: Tensor, drawn: ShiftFlip, pad: int) -> Tensor:
    """Pads with zero pixels, crops every image at its own offset, mirrors the flipped ones.

    Args:
        images: uint8 [B, H, W, C], any device.
        drawn: parameters of these B images.
        pad: pixels added on each side.

    Returns:
        uint8 [B, H, W, C].
    """
    count, height, width, _ = images.shape
    rows = drawn.offsets[:, :1] + np.arange(height)
    columns = np.arange(width)
    columns = drawn.offsets[:, 1:] + np.where(drawn.flips[:, None], columns[::-1], columns)
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    which = torch.arange(count, device=images.device)[:, None, None]
    row_index = torch.from_numpy(rows).to(images.device)[:, :, None]
    column_index = torch.from_numpy(columns).to(images.device)[:, None, :]
    return padded[which, row_index, column_index]


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixel / 255 - mean) / std, rounded as torchvision's `ToTensor` and `Normalize` do.

    Args:
        images: uint8 [B, H, W, C].
        mean: float32 [C], in units of 1 = white, on the device of the images.
        std: float32 [C], likewise.

    Returns:
        float32 [B, C, H, W] in channels-last memory format.
    """
    values = images.permute(0, 3, 1, 2).to(torch.float32)  # keeps the strides, which are channels-last already
    return values.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel over all images and pixels, in units of 1 = white.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        `(mean, std)`, C floats each; a constant channel gets std 1 so that dividing by it stays finite.
    """
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean = float(share @ values)
        means.append(mean)
        stds.append(float(np.sqrt(share @ (values - mean) ** 2)) or 1.0)
    return tuple(means), tuple(stds)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its body with Python's, numpy's and torch's global CPU generators seeded, then puts their states back.

    The transforms of timm and torchvision draw from these globals; nothing else in the process may notice.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(
        devices=[]
    ):  # the default generator only: torch.manual_seed would reseed every GPU as well
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def image_transforms(
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[ImageTransform, ImageTransform]:
    """The fixed transform for evaluation and the random one for training.

    Args:
        input_size: (C, H, W).
        mean: C floats.
        std: C floats.
        config: from `timm.data.resolve_data_config`: interpolation, crop_pct, crop_mode.
        options: further arguments of `timm.data.create_transform` for training, e.g. `{"auto_augment": "rand-m9"}`.

    Returns:
        `(evaluation, training)`, each from a PIL image to float32 [C, H, W], normalised.

    Raises:
        ValueError: `options` has an argument that timm does not take.
    """
    from timm.data.transforms_factory import create_transform

    shared: dict[str, Any] = {"input_size": input_size, "mean": tuple(mean), "std": tuple(std)}
    evaluation = create_transform(
        **shared, interpolation=config["interpolation"], crop_pct=config["crop_pct"], crop_mode=config["crop_mode"]
    )
    training_options = {"interpolation": config["interpolation"], **options}
    try:
        # The last three are named so that an option which would change the type of the result is refused as a duplicate.
        training = create_transform(
            **shared, **training_options, is_training=True, use_prefetcher=False, normalize=True, separate=False
        )
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"data.transform={dict(options)} does not fit timm.data.create_transform ({error})."
        ) from error
    return evaluation, training


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Images in memory: `images` uint8 [N, H, W, C], `labels` int64 [N]."""

    images: NDArray[np.uint8]
    labels: Ints

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Ints) -> ArrayData:
        """The images at these positions, in this order."""
        return ArrayData(self.images[positions], self.labels[positions])


class ImageReader(Protocol):
    """Reads images of a source by number."""

    def open(self, index: int) -> Image.Image: ...
    def describe(self, index: int) -> str:
        """What to call this image in an error, e.g. its path."""


@dataclass(frozen=True, eq=False)
class ImageData(Dataset[tuple[Tensor, int]]):
    """Images read one by one; an item is (float32 [C, H, W] normalised, label).

    Attributes:
        reader: where the images come from.
        indices: their numbers in the reader, int64 [N].
        labels: int64 [N].
        mode: PIL mode that the images are converted to, "RGB" or "L".
        evaluation: fixed transform.
        training: random transform.
    """

    reader: ImageReader
    indices: Ints
    labels: Ints
    mode: str
    evaluation: ImageTransform
    training: ImageTransform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.load(position, None), int(self.labels[position])

    def subset(self, positions: Ints) -> ImageData:
        """The images at these positions, in this order."""
        return replace(self, indices=self.indices[positions], labels=self.labels[positions])

    def load(self, position: int, seed: int | None) -> Tensor:
        """The image at `position`: augmented by this seed, or as for evaluation if None.

        Raises:
            ValueError: it cannot be read.
        """
        index = int(self.indices[position])
        try:
            image = self.reader.open(index).convert(self.mode)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            raise ValueError(f"{self.reader.describe(index)} cannot be read as an image ({error}).") from error
        if seed is None:
            return self.evaluation(image)
        with seeded(seed):
            return self.training(image)


Data = ArrayData | ImageData


class _Request(NamedTuple):
    """One batch to read: positions int64 [B], one augmentation seed per image or None."""

    positions: Ints
    seeds: NDArray[np.int64] | None


class _Batched(Dataset[Any]):
    """Reads whole batches in a worker; a user's error travels as a value, since `DataLoader` would bury it in a traceback."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, request: _Request) -> tuple[Tensor, Tensor] | ValueError:
        seeds = [None] * len(request.positions) if request.seeds is None else request.seeds.tolist()
        try:
            images = [self.data.load(int(p), seed) for p, seed in zip(request.positions, seeds, strict=True)]
        except ValueError as error:
            return error
        return torch.stack(images), torch.from_numpy(self.data.labels[request.positions])


def _unchanged(batch: Any) -> Any:
    return batch


def _read(
    data: ImageData, requests: Sequence[_Request], device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images float32 [B, C, H, W] and labels int64 [B] of each request, in order, on `device`."""
    loader: DataLoader[Any] = DataLoader(
        _Batched(data),
        batch_size=None,  # the requests are the batches
        sampler=requests,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # DataLoader draws a worker seed, which must not come from the global generator
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        images, labels = batch
        yield (
            images.to(device, non_blocking=True, memory_format=torch.channels_last),
            labels.to(device, non_blocking=True),
        )


# --- batches ---------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of a data set in an order that depends on nothing but (seed, epoch).

    The global batch does not depend on the number of processes: process `rank` gets the rank-th slice of it, and the augmentation
    of an image is the same as in a run on one process.

    Training shuffles, augments and drops the last, incomplete batch; a set smaller than one batch is one batch. Evaluation keeps
    the order and every image, once; where the last batch has fewer images than there are processes, some processes get one batch
    fewer, so nothing that waits for all processes belongs into an evaluation loop.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str,
        train: bool,
        augment: Augment = "none",
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        """Puts images in memory on the device, as uint8.

        Args:
            data: one split.
            batch_size: images of a batch, of all processes together.
            seed: seed of order and augmentation, >= 0.
            device: where the batches go.
            train: training or evaluation.
            augment: used in training only.
            mean: C floats; images read from files are normalised by their own transform.
            std: C floats, likewise.
            rank: number of this process.
            world_size: number of processes.
            workers: processes that read images from files; 0 reads in this one.

        Raises:
            ValueError: a batch cannot be divided among the processes, or the augmentation is not for this kind of data.
        """
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1; got {batch_size}.")
        allowed = ("none", "shift", "shift_flip") if isinstance(data, ArrayData) else ("none", "timm")
        if augment not in allowed:
            raise ValueError(f"data.augment={augment!r} does not fit this data set; use {' or '.join(allowed)}.")
        self.data, self.seed, self.device, self.train = data, seed, torch.device(device), train
        self.augment: Augment = augment if train else "none"
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.batch_size = min(batch_size, len(data)) if train else batch_size
        if self.batch_size < world_size or (train and self.batch_size % world_size):
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be divided among {world_size} processes; "
                f"set data.batch_size to a multiple of {world_size}, of at most {len(data)} for these images."
            )
        if isinstance(data, ArrayData):
            self._images = torch.from_numpy(data.images).to(self.device)
            self._labels = torch.from_numpy(data.labels).to(self.device)
            self._mean = torch.tensor(mean, dtype=torch.float32, device=self.device)
            self._std = torch.tensor(std, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        """Batches per epoch of this process."""
        full, rest = divmod(len(self.data), self.batch_size)
        share = self._share(rest)
        return full + int(not self.train and share.stop > share.start)

    def _share(self, count: int) -> slice:
        """This process's slice of a global batch of `count` images."""
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start + 1`, ... of an epoch: a pure function of (seed, epoch, batch).

        Yields:
            images float32 [B, C, H, W], normalised, channels-last, and labels int64 [B], both on the device.

        Raises:
            ValueError: `start` is not in 0 .. len(self), or an image cannot be read.
        """
        if not 0 <= start <= len(self):
            raise ValueError(
                f"an epoch of {len(self)} batches cannot start at batch {start}; the data or the batch size have changed."
            )
        count = len(self.data)
        order = keyed_rng(self.seed, "order", epoch).permutation(count) if self.train else np.arange(count)
        batches = [
            (batch, order[batch * self.batch_size : (batch + 1) * self.batch_size]) for batch in range(start, len(self))
        ]
        if isinstance(self.data, ArrayData):
            return (self._array_batch(epoch, batch, positions) for batch, positions in batches)
        return _read(
            self.data,
            [self._request(epoch, batch, positions) for batch, positions in batches],
            self.device,
            self.workers,
        )

    def _array_batch(self, epoch: int, batch: int, positions: Ints) -> tuple[Tensor, Tensor]:
        share = self._share(len(positions))
        chosen = torch.from_numpy(positions[share]).to(self.device)
        images = self._images.index_select(0, chosen)
        if self.augment != "none":
            pad = shift_pad(images.shape[1])
            rng = keyed_rng(self.seed, "augment", epoch, batch)
            drawn = draw_shift_flip(rng, len(positions), pad, flip=self.augment == "shift_flip")
            images = shift_flip(images, ShiftFlip(drawn.offsets[share], drawn.flips[share]), pad)
        return normalize(images, self._mean, self._std), self._labels.index_select(0, chosen)

    def _request(self, epoch: int, batch: int, positions: Ints) -> _Request:
        share = self._share(len(positions))
        if self.augment == "none":
            return _Request(positions[share], None)
        seeds = keyed_rng(self.seed, "augment", epoch, batch).integers(0, 2**32, size=len(positions))
        return _Request(positions[share], seeds[share])
