"""Batches of a data set: order, augmentation, sharding over processes, and worker processes that read files.

A batch is a pure function of (seed, epoch, batch): a run that resumes inside an epoch, or runs on several processes, sees the same
images, bit for bit.

Shapes: `N` images, `B` images of a batch, `H` rows, `W` columns, `C` channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eqnet.augment import (
    Augment,
    ImageTransform,
    Ints,
    ShiftFlip,
    draw_shift_flip,
    kept_generators,
    keyed_rng,
    normalize,
    seed_generators,
    shift_flip,
    shift_pad,
    upload,
)


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
        """The image at `position`: augmented by this seed, within `kept_generators`, or as for evaluation if None.

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
        seed_generators(seed)
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
            with kept_generators():
                images = [self.data.load(int(p), seed) for p, seed in zip(request.positions, seeds, strict=True)]
        except ValueError as error:
            return error
        # in the layout that networks want at once: stacking and then turning takes twice the time
        batch = torch.empty((len(images), *images[0].shape), memory_format=torch.channels_last)
        for place, image in zip(batch, images, strict=True):
            place.copy_(image)
        return batch, torch.from_numpy(self.data.labels[request.positions])


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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch 0; what evaluation wants, which has no order to change."""
        return self.epoch(0)

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
        chosen = upload(positions[share], self.device)
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
