"""From stored pixels to what a network reads: keyed randomness, augmentation, normalisation.

Every random number is a pure function of (seed, purpose, key), e.g. of (seed, "augment", epoch, batch). Small images are augmented
as whole batches on their device; large ones one by one through `timm.data.create_transform`.

Shapes: `N` images, `B` images of a batch, `H` rows, `W` columns, `C` channels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on a device; a GPU goes on with what it has to do, and so does the caller."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
    row_index = upload(rows, images.device)[:, :, None]
    column_index = upload(columns, images.device)[:, None, :]
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
def kept_generators() -> Iterator[None]:
    """Puts back the states of Python's, numpy's and torch's global CPU generators after its body, which may seed and use them.

    The transforms of timm and torchvision draw from these globals; nothing else in the process may notice. Once around a batch:
    numpy alone takes a quarter of a millisecond for it.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # the default generator only
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_generators(seed: int) -> None:
    """Seeds these generators, within `kept_generators`."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
    random.seed(seed)
    np.random.seed(seed % 2**32)


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
