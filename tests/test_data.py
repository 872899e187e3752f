"""Data: sources on disk, splits, and batches that are the same after a resume and on any number of processes."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from eqnet.augment import Augment, kept_generators, keyed_rng, seed_generators
from eqnet.batches import ArrayData, Batches, ImageData
from eqnet.data import DataSplits, bn_batches, calibration_batches, load_data, random_subset
from eqnet.settings import DataSettings

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Settings:
    """Settings as a user may write them, also those that the typed settings would refuse."""

    name: str = "digits"
    root: str = "data"
    download: bool = False
    validation_fraction: float = 0.2
    test_fraction: float = 0.2
    max_images: int | None = None
    input_size: Sequence[int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    augment: Augment = "none"
    transform: Mapping[str, Any] = field(default_factory=dict)


def labels_of(splits: DataSplits) -> dict[str, np.ndarray]:
    return {name: getattr(splits, name).labels for name in SPLITS}


def batches(data: ArrayData | ImageData, size: int, **options: Any) -> Batches:
    channels = data.images.shape[-1] if isinstance(data, ArrayData) else 3
    defaults = {"seed": 3, "device": "cpu", "train": True, "mean": [0.5] * channels, "std": [0.25] * channels}
    return Batches(data, size, **{**defaults, **options})


def same(first: Sequence[tuple[Tensor, Tensor]], second: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


# --- files -----------------------------------------------------------------------------------------------------------


def random_images(count: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def npz_arrays() -> dict[str, np.ndarray]:
    return {
        "train_images": random_images(60),
        "train_labels": np.arange(60) % 3,
        "test_images": random_images(12),
        "test_labels": np.arange(12) % 3,
    }


def write_npz(path: Path, **changes: np.ndarray | None) -> str:
    arrays = {key: value for key, value in {**npz_arrays(), **changes}.items() if value is not None}
    np.savez(path / "set.npz", **arrays)
    return str(path / "set.npz")


def write_folder(folder: Path, counts: Mapping[str, int], size: tuple[int, int] = (12, 10)) -> None:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            # Not crc32 or hash(): the same pixels on every run, different ones in every file.
            rng = np.random.default_rng([number, *name.encode(), *folder.name.encode()])
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
                folder / name / f"{number:02}.png"
            )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "images", {"cat": 10, "dog": 20})
    return tmp_path / "images"


@pytest.fixture
def image_splits(folder: Path) -> DataSplits:
    return load_data(Settings(str(folder), input_size=(3, 8, 8), augment="timm"), seed=0)


def write_fashion_mnist(root: Path) -> dict[str, np.ndarray]:
    raw, written = root / "FashionMNIST" / "raw", {}
    raw.mkdir(parents=True)
    for prefix, count in (("train", 40), ("t10k", 20)):
        images, labels = random_images(count, 28, 28, 1), (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
        written[prefix] = images
    return written


# --- sources ---------------------------------------------------------------------------------------------------------


def test_digits_are_1797_grey_images_of_8_by_8_pixels_in_17_levels() -> None:
    splits = load_data(DataSettings(), seed=0)  # the defaults of a run
    assert sum(len(getattr(splits, name)) for name in SPLITS) == 1797
    assert splits.input_size == (1, 8, 8)
    assert splits.num_classes == 10
    assert splits.class_names == tuple("0123456789")
    levels = np.unique(np.concatenate([getattr(splits, name).images for name in SPLITS]))
    assert levels.tolist() == np.rint(np.arange(17) * 255 / 16).tolist()
    assert abs(len(splits.test) - 0.2 * 1797) <= 1
    assert abs(len(splits.validation) - 0.16 * 1797) <= 1


def test_npz_keeps_its_test_images_and_takes_validation_from_train(tmp_path: Path) -> None:
    name = write_npz(tmp_path, classes=np.array(["ape", "bee", "cow"]))
    splits, arrays = load_data(Settings(name), seed=1), npz_arrays()
    assert splits.class_names == ("ape", "bee", "cow")
    assert splits.input_size == (3, 8, 8)
    np.testing.assert_array_equal(splits.test.images, arrays["test_images"])
    for part, count in (("train", 48), ("validation", 12)):
        data, chosen = getattr(splits, part), splits.indices[part]
        assert len(data) == count
        np.testing.assert_array_equal(data.images, arrays["train_images"][chosen])
        np.testing.assert_array_equal(data.labels, arrays["train_labels"][chosen])


def test_npz_keeps_its_own_validation_images(tmp_path: Path) -> None:
    own = {"validation_images": random_images(9, 8), "validation_labels": np.arange(9) % 3}
    splits, arrays = load_data(Settings(write_npz(tmp_path, **own)), seed=1), npz_arrays()
    for part, expected in (("train", arrays), ("validation", own), ("test", arrays)):
        data = getattr(splits, part)
        np.testing.assert_array_equal(data.images, expected[f"{part}_images"])
        np.testing.assert_array_equal(data.labels, expected[f"{part}_labels"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_labels": None}, "has no test_labels"),
        ({"validation_images": random_images(9, 8)}, "has no validation_labels"),
        ({"validation_images": random_images(9, 9), "validation_labels": np.arange(9) % 3}, "train and validation"),
        ({"train_images": npz_arrays()["train_images"] / 255}, "train_images must be uint8"),
        ({"train_images": npz_arrays()["train_images"][..., 0]}, "train_images must be uint8"),
        ({"test_images": np.zeros((0, 8, 8, 3), np.uint8), "test_labels": np.zeros(0, np.int64)}, "not empty"),
        ({"test_images": random_images(12, 9)}, "one shape"),
        ({"train_labels": np.arange(59) % 3}, "60 integers"),
        ({"train_labels": np.arange(60) / 2}, "60 integers"),
        ({"train_labels": np.arange(60) % 3 - 1}, "train_labels must be numbers from 0"),
        ({"classes": np.array(["ape", "bee"])}, "2 classes and labels from 0 to 2"),
        ({"train_labels": np.zeros(60, int), "test_labels": np.zeros(12, int)}, "2 classes or more"),
        ({"classes": np.array([{"a": 1}], dtype=object)}, "plain arrays"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_data(Settings(write_npz(tmp_path, **changes)), seed=0)


def test_a_damaged_or_missing_npz_is_refused_by_name(tmp_path: Path) -> None:
    path = Path(write_npz(tmp_path))
    path.write_bytes(path.read_bytes()[:2000])
    for name in (path, tmp_path / "other.npz"):
        with pytest.raises(ValueError, match=name.name):
            load_data(Settings(str(name)), seed=0)


def test_fashion_mnist_is_read_from_its_root(tmp_path: Path) -> None:
    written = write_fashion_mnist(tmp_path)
    splits = load_data(Settings("fashion_mnist", root=str(tmp_path)), seed=0)
    assert splits.input_size == (1, 28, 28)
    assert splits.class_names[9] == "Ankle boot"
    np.testing.assert_array_equal(splits.test.images, written["t10k"])
    np.testing.assert_array_equal(splits.train.images, written["train"][splits.indices["train"]])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_a_missing_torchvision_set_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"data\.download=true.*data\.root="):
        load_data(Settings(name, root=str(tmp_path)), seed=0)
    assert not list(tmp_path.iterdir())


def test_a_flat_image_folder_is_split_by_both_fractions(folder: Path) -> None:
    splits = load_data(Settings(str(folder)), seed=0)
    assert splits.class_names == ("cat", "dog")
    counts = {name: np.bincount(labels).tolist() for name, labels in labels_of(splits).items()}
    assert counts == {"test": [2, 4], "validation": [2, 3], "train": [6, 13]}  # a fifth of 30, a fifth of the 24 left


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_one_held_out_folder_is_the_test_split(tmp_path: Path, held_out: str) -> None:
    write_folder(tmp_path / "train", {"cat": 10, "dog": 10})
    write_folder(tmp_path / held_out, {"cat": 3, "dog": 4})
    splits = load_data(Settings(str(tmp_path)), seed=0)
    assert {name: len(labels) for name, labels in labels_of(splits).items()} == {
        "train": 16,
        "validation": 4,
        "test": 7,
    }


def test_three_folders_are_the_three_splits_and_classes_go_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 3, "dog": 4, "emu": 5})
    write_folder(tmp_path / "val", {"dog": 2, "emu": 1})
    write_folder(tmp_path / "test", {"emu": 2})
    splits = load_data(Settings(str(tmp_path)), seed=0)
    assert {name: labels.tolist() for name, labels in labels_of(splits).items()} == {
        "train": [0] * 3 + [1] * 4 + [2] * 5,
        "validation": [1, 1, 2],
        "test": [2, 2],
    }


def test_image_folders_that_do_not_fit_are_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "emu").mkdir()
    with pytest.raises(ValueError, match="emu has no images"):
        load_data(Settings(str(folder)), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="one folder of images per class"):
        load_data(Settings(str(tmp_path / "empty")), seed=0)
    write_folder(tmp_path / "split" / "train", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "split" / "test", {"cow": 3})
    with pytest.raises(ValueError, match="cow is a class without training images"):
        load_data(Settings(str(tmp_path / "split")), seed=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_an_unreadable_image_is_named_in_one_sentence(folder: Path, workers: int, train: bool) -> None:
    broken = folder / "cat" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    splits = load_data(Settings(str(folder), input_size=(3, 8, 8), augment="timm"), seed=0)
    holding = next(data for data in (splits.train, splits.validation, splits.test) if 3 in data.indices)
    with pytest.raises(ValueError, match=r"cat/03\.png cannot be read") as caught:
        list(batches(holding, len(holding), workers=workers, train=train, augment="timm").epoch(0))
    assert "\n" not in str(caught.value)


def test_image_files_follow_the_data_config_of_the_network(folder: Path) -> None:
    config = {"input_size": (3, 6, 6), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0}
    splits = load_data(Settings(str(folder)), seed=0, data_config={**config, "interpolation": "bilinear"})
    assert (splits.input_size, splits.mean, splits.std) == (config["input_size"], config["mean"], config["std"])
    reference = transforms.Compose(
        [
            transforms.Resize(6, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(6),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    paths = sorted(folder.rglob("*.png"))
    for position, index in enumerate(splits.validation.indices):
        image, label = splits.validation[position]
        assert torch.equal(image, reference(Image.open(paths[index])))
        assert splits.class_names[label] == paths[index].parent.name


def test_image_files_can_be_read_in_grey(folder: Path) -> None:
    settings = Settings(str(folder), input_size=(1, 8, 8), mean=[0.5], std=[0.5])
    images, _ = next(batches(load_data(settings, seed=0).test, 4, train=False).epoch(0))
    assert images.shape == (4, 1, 8, 8)


def test_timm_names_are_opened_by_timm(tmp_path: Path) -> None:
    written = write_fashion_mnist(tmp_path)
    settings = Settings("torch/fashion_mnist", str(tmp_path), input_size=(1, 28, 28), mean=[0], std=[1])
    splits = load_data(settings, seed=0, data_config={"crop_pct": 1.0})
    assert splits.num_classes == 10
    assert splits.class_names[9] == "Ankle boot"
    assert len(splits.test) == 20
    for part, images in (("test", written["t10k"]), ("train", written["train"][splits.indices["train"]])):
        for position in (0, 5):
            image, label = getattr(splits, part)[position]
            assert torch.equal(image[0], torch.from_numpy(images[position, :, :, 0]) / 255)
            assert label == getattr(splits, part).labels[position]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch/cifar10", "timm cannot open data.name='torch/cifar10'"),
        ("torch/nonsense", "timm cannot open"),
        ("wds/imagenet", "is a stream"),
        ("TFDS/mnist", "is a stream"),
        ("hfids/food101", "is a stream"),
        ("hfds/food101", "data.download=true"),
        ("cifar11", "no known data set and no folder"),
        ("/no/such/folder", "no known data set and no folder"),
    ],
)
def test_names_that_cannot_be_opened(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_data(Settings(name, root=str(tmp_path)), seed=0)


# --- splits ----------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=25)
@given(
    counts=st.lists(st.integers(5, 40), min_size=2, max_size=6),
    fraction=st.floats(0.1, 0.6),
    seed=st.integers(0, 2**32),
)
def test_splits_are_disjoint_complete_and_stratified(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], fraction: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = random_images(len(labels), 2, 2, 1)
    test = {"test_images": images[:1], "test_labels": labels[:1]}
    name = write_npz(tmp_path_factory.mktemp("sets"), train_images=images, train_labels=labels, **test)
    splits = load_data(Settings(name, validation_fraction=fraction), seed)
    assert sorted(number for part in SPLITS for number in splits.indices[part]) == list(range(len(labels) + 1))
    share = np.bincount(splits.validation.labels, minlength=len(counts))
    assert np.abs(share - fraction * np.array(counts)).max() < 1.5  # its share, with the total rounded to an integer
    assert len(splits.validation) == round(fraction * len(labels))


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = (load_data(Settings(), seed) for seed in (0, 0, 1))
    assert (first.indices, first.fingerprint) == (again.indices, again.fingerprint)
    assert first.fingerprint != other.fingerprint
    assert set(first.indices["test"]) != set(other.indices["test"])


@pytest.mark.parametrize("counts", [[1, 2, 10], [1, 1, 1, 1, 2]])
def test_a_class_of_few_images_stays_in_train(tmp_path: Path, counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    name = write_npz(
        tmp_path, train_images=random_images(len(labels)), train_labels=labels, test_labels=labels[:1].repeat(12)
    )
    splits = load_data(Settings(name, validation_fraction=0.5), seed=0)
    validation = np.bincount(splits.validation.labels, minlength=len(counts))
    assert validation.tolist() == [count // 2 for count in counts]  # no class may lose its only image


def test_max_images_caps_train_alone_and_keeps_the_classes_balanced() -> None:
    whole, capped = load_data(Settings(), 0), load_data(Settings(max_images=100), 0)
    assert len(capped.train) == 100
    assert set(capped.indices["train"]) < set(whole.indices["train"])
    assert np.ptp(np.bincount(capped.train.labels)) <= 2
    assert capped.indices["validation"] == whole.indices["validation"]
    assert capped.indices["test"] == whole.indices["test"]


def test_a_stored_split_is_used_again_whatever_the_seed() -> None:
    first = load_data(Settings(max_images=50), seed=0)
    again = load_data(Settings(), seed=9, indices=first.indices)
    assert again.indices == first.indices
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train.images, first.train.images)


def test_the_fingerprint_changes_with_the_labels(tmp_path: Path) -> None:
    first = load_data(Settings(write_npz(tmp_path)), seed=0)
    swapped = npz_arrays()["train_labels"]
    swapped[[0, 1]] = swapped[[1, 0]]
    again = load_data(Settings(write_npz(tmp_path, train_labels=swapped)), seed=0, indices=first.indices)
    assert again.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ({"train": [0], "validation": [1]}, "must map train, validation, test"),
        ({"train": [0, 2], "validation": [1], "test": [2]}, "twice"),
        ({"train": [0], "validation": [1], "test": [1797]}, "does not fit a source of 1797 images"),
        ({"train": [0], "validation": [-1], "test": [2]}, "does not fit"),
        ({"train": [], "validation": [1], "test": [2]}, "does not fit"),
    ],
)
def test_a_stored_split_that_does_not_fit_is_refused(indices: dict[str, list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_data(Settings(), seed=0, indices=indices)


def test_mean_and_std_are_those_of_the_training_pixels() -> None:
    splits = load_data(Settings(), seed=0)
    pixels = splits.train.images / 255
    np.testing.assert_allclose([splits.mean, splits.std], [[pixels.mean()], [pixels.std()]], rtol=1e-12)
    given = load_data(Settings(mean=[0.5], std=[2.0]), seed=0)
    assert (given.mean, given.std) == ((0.5,), (2.0,))


def test_a_constant_channel_stays_finite(tmp_path: Path) -> None:
    images = random_images(60)
    images[..., 1] = 7
    splits = load_data(Settings(write_npz(tmp_path, train_images=images)), seed=0)
    assert splits.std[1] == 1
    assert calibration_batches(splits, 8, 8, seed=0, device="cpu")[0][:, 1].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": [0.5] * 3}, "data.mean needs one number for each of 1 channels"),
        ({"std": [0.0]}, "data.std needs one positive number"),
        ({"input_size": (3, 8, 8)}, "data.input_size"),
        ({"augment": "timm"}, "data.augment"),
        ({"transform": {"hflip": 0.0}}, "data.transform"),
        ({"validation_fraction": 0.0}, "data.validation_fraction must lie between 0 and 1"),
        ({"test_fraction": 1.0}, "data.test_fraction must lie between 0 and 1"),
        ({"validation_fraction": 0.0001}, "validation split .* is empty"),
        ({"max_images": 0}, "data.max_images"),
    ],
)
def test_settings_that_do_not_fit_a_set_in_memory(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_data(Settings(**changes), seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": "shift"}, "data.augment='shift'"),
        ({"input_size": (8, 8)}, "data.input_size must be"),
        ({"input_size": (4, 8, 8)}, "1 or 3 channels"),
        ({"input_size": (1, 8, 8)}, "data.mean needs one number for each of 1 channels"),
        ({"transform": {"no_such_option": 1}}, "no_such_option"),
        ({"transform": {"normalize": False}}, "normalize"),
        ({"transform": {"auto_augment": "rand-q5"}}, "data.transform"),
    ],
)
def test_settings_that_do_not_fit_image_files(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_data(Settings(str(folder), **changes), seed=0)


def test_calibration_takes_plain_training_images_fixed_by_the_seed(image_splits: DataSplits) -> None:
    for splits in (load_data(Settings(), 0), image_splits):
        first, again, other = (calibration_batches(splits, 10, 4, seed, "cpu") for seed in (5, 5, 6))
        assert [len(images) for images in first] == [4, 4, 2]
        assert torch.equal(torch.cat(first), torch.cat(again))
        assert not torch.equal(torch.cat(first), torch.cat(other))
        whole = Batches(
            splits.train, len(splits.train), seed=0, device="cpu", train=False, mean=splits.mean, std=splits.std
        )
        known = {images.numpy().tobytes() for batch, _ in whole.epoch(0) for images in batch}
        assert {images.numpy().tobytes() for images in torch.cat(first)} <= known
        assert sum(map(len, calibration_batches(splits, 10**6, 512, 0, "cpu"))) == len(splits.train)
        with pytest.raises(ValueError, match="at least 1 image"):
            calibration_batches(splits, 0, 4, 0, "cpu")


def test_bn_sees_training_images_augmented_as_in_training(image_splits: DataSplits) -> None:
    def drawn(splits: DataSplits, augment: Augment, seed: int) -> list[torch.Tensor]:
        return bn_batches(splits, 10, 4, seed, "cpu", augment)

    for splits, augment in ((load_data(Settings(), 0), "shift"), (image_splits, "timm")):
        first, again, other = (drawn(splits, augment, seed) for seed in (5, 5, 6))
        assert [len(images) for images in first] == [4, 4, 2]
        assert torch.equal(torch.cat(first), torch.cat(again))
        assert not torch.equal(torch.cat(first), torch.cat(other))
        plain = {image.numpy().tobytes() for image in torch.cat(calibration_batches(splits, 10, 4, 5, "cpu"))}
        assert {image.numpy().tobytes() for image in torch.cat(drawn(splits, "none", 5))} == plain
        assert not {image.numpy().tobytes() for image in torch.cat(first)} <= plain
    epoch = Batches(
        random_subset(splits.train, 10, 5), 10, seed=5, device="cpu", train=True, augment="timm",
        mean=splits.mean, std=splits.std,
    ).epoch(0)  # fmt: skip
    assert torch.equal(torch.cat(first), next(iter(epoch))[0])


def test_a_random_subset_holds_each_image_once_with_its_label(image_splits: DataSplits) -> None:
    digits = load_data(Settings(), 0).validation
    subset = random_subset(digits, 40, seed=2)
    pairs = {(image.tobytes(), int(label)) for image, label in zip(digits.images, digits.labels, strict=True)}
    chosen = {(image.tobytes(), int(label)) for image, label in zip(subset.images, subset.labels, strict=True)}
    assert len(subset) == 40
    assert chosen <= pairs
    assert len(chosen) == 40
    files = random_subset(image_splits.train, 6, seed=2)
    assert len(set(files.indices)) == 6
    assert dict(zip(image_splits.train.indices, image_splits.train.labels, strict=True)).items() >= set(
        zip(files.indices, files.labels, strict=True)
    )


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "files", "files, 2 workers"])
def training(
    request: pytest.FixtureRequest, image_splits: DataSplits
) -> Iterator[tuple[ArrayData | ImageData, dict[str, Any]]]:
    """A training split of 19 images of either kind, and the options that augment it."""
    if request.param == "memory":
        yield ArrayData(random_images(19), np.arange(19)), {"augment": "shift_flip"}
    else:
        yield image_splits.train, {"augment": "timm", "workers": 2 * request.param.endswith("workers")}


def test_batches_are_a_function_of_seed_and_epoch(training: tuple[Any, dict[str, Any]]) -> None:
    data, options = training
    first = list(batches(data, 6, **options).epoch(1))
    assert same(first, list(batches(data, 6, **options).epoch(1)))
    assert not same(first, list(batches(data, 6, **options).epoch(2)))
    assert not same(first, list(batches(data, 6, **{**options, "seed": 4}).epoch(1)))


def test_one_image_is_augmented_anew_in_each_place_batch_and_epoch(training: tuple[Any, dict[str, Any]]) -> None:
    data, options = training
    loader = batches(data.subset(np.zeros(16, dtype=np.int64)), 8, **options)
    seen = [images for epoch in (0, 1) for images, _ in loader.epoch(epoch)]
    assert len({images.numpy().tobytes() for images in seen}) == 4
    assert all(len({image.numpy().tobytes() for image in images}) > 2 for images in seen)


def test_an_epoch_resumed_in_its_middle_is_the_same(training: tuple[Any, dict[str, Any]]) -> None:
    data, options = training
    loader = batches(data, 6, **options)
    whole = list(loader.epoch(2))
    assert len(whole) == len(loader) == 3  # 19 images: the last one is left out
    for start in range(4):
        assert same(whole[start:], list(loader.epoch(2, start)))
    for start in (-1, 4):
        with pytest.raises(ValueError, match="cannot start at batch"):
            loader.epoch(2, start)


def test_two_processes_see_the_halves_of_each_batch(training: tuple[Any, dict[str, Any]]) -> None:
    data, options = training
    whole = list(batches(data, 6, **options).epoch(5))
    ranks = [list(batches(data, 6, **options, rank=rank, world_size=2).epoch(5)) for rank in (0, 1)]
    assert [len(images) for images, _ in ranks[0]] == [3, 3, 3]
    joined = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*ranks, strict=True)]
    assert same(whole, joined)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_each_image_once(training: tuple[Any, dict[str, Any]], world_size: int) -> None:
    data, options = training
    everything = torch.cat([images for images, _ in batches(data, 19, train=False).epoch(0)])
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for rank in range(world_size):
        loader = batches(data, 6, **options, train=False, rank=rank, world_size=world_size)
        parts.append(list(loader.epoch(0)))
        assert len(parts[-1]) == len(loader)
        assert all(len(images) for images, _ in parts[-1])
    in_order = [part[i] for i in range(4) for part in parts if i < len(part)]
    assert torch.equal(torch.cat([images for images, _ in in_order]), everything)
    assert torch.cat([labels for _, labels in in_order]).tolist() == data.labels.tolist()


def test_training_sees_each_image_at_most_once_per_epoch_in_another_order() -> None:
    data = ArrayData(random_images(19), np.arange(19))
    orders = [torch.cat([labels for _, labels in batches(data, 6).epoch(epoch)]).tolist() for epoch in range(3)]
    assert all(len(set(order)) == len(order) == 18 for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    data = ArrayData(random_images(8), np.arange(8))
    (images, labels), *others = batches(data, 64).epoch(0)
    assert not others
    assert images.shape == (8, 3, 8, 8)
    assert sorted(labels.tolist()) == list(range(8))
    with pytest.raises(ValueError, match="8 images cannot be divided among 3 processes"):
        batches(data, 64, world_size=3)


def test_batches_that_cannot_be_dealt_out_are_refused() -> None:
    data = ArrayData(random_images(19), np.arange(19))
    with pytest.raises(ValueError, match="multiple of 4"):
        batches(data, 6, world_size=4)
    with pytest.raises(ValueError, match="2 images cannot be divided among 3"):
        batches(data, 2, train=False, world_size=3)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        batches(data, 0)
    with pytest.raises(ValueError, match="augment='timm'"):
        batches(data, 6, augment="timm")


def test_images_are_normalised_as_torchvision_does_and_channels_last() -> None:
    data = ArrayData(random_images(5, 6, 7), np.arange(5))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    ((images, labels),) = batches(data, 5, train=False, mean=mean, std=std).epoch(0)
    assert torch.equal(images, torch.stack([reference(image) for image in data.images]))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(("size", "pad"), [(8, 1), (32, 4)])
@pytest.mark.parametrize("augment", ["shift", "shift_flip"])
def test_every_augmented_image_is_a_shift_into_zeros_and_only_shift_flip_mirrors(
    size: int, pad: int, augment: str
) -> None:
    data = ArrayData(random_images(120, size, size, 1), np.arange(120))
    ((images, labels),) = batches(data, 120, augment=augment, mean=[0.0], std=[1 / 255]).epoch(0)
    padded = np.pad(data.images[..., 0], ((0, 0), (pad, pad), (pad, pad)))
    shifts = [(y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    seen = set()
    for image, label in zip(images[:, 0].round().numpy(), labels.tolist(), strict=True):
        found = [
            (y, x, mirrored)
            for y, x in shifts
            for mirrored, crop in enumerate([padded[label, y : y + size, x : x + size]] * 2)
            if np.array_equal(image, crop[:, ::-1] if mirrored else crop)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(2 * pad + 1))
    assert {mirrored for _, _, mirrored in seen} == ({0, 1} if augment == "shift_flip" else {0})


def test_image_files_are_augmented_in_training_alone(image_splits: DataSplits) -> None:
    plain = list(batches(image_splits.train, 19, train=False, augment="timm").epoch(0))
    assert same(plain, list(batches(image_splits.train, 19, train=False, augment="timm").epoch(1)))
    position = {image.numpy().tobytes(): number for number, image in enumerate(plain[0][0])}
    ((unaugmented, _),) = batches(image_splits.train, 19).epoch(0)
    assert sorted(position[image.numpy().tobytes()] for image in unaugmented) == list(range(19))
    ((augmented, _),) = batches(image_splits.train, 19, augment="timm").epoch(0)
    assert sum(image.numpy().tobytes() in position for image in augmented) < 10


def test_options_reach_the_training_transform_of_image_files(folder: Path) -> None:
    options = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": None, "interpolation": "nearest"}
    write_folder(folder / "train", {"cat": 5, "dog": 5}, size=(8, 8))
    settings = Settings(str(folder), input_size=(3, 8, 8), augment="timm", transform={**options, "vflip": 1.0})
    splits = load_data(settings, seed=0, data_config={"crop_pct": 1.0})
    upright = splits.train[0][0]
    assert torch.equal(splits.train.load(0, seed=1), upright.flip(1))


def test_nothing_random_outside_is_touched(image_splits: DataSplits) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for workers in (0, 2):
        list(batches(image_splits.train, 6, augment="timm", workers=workers).epoch(0))
    calibration_batches(load_data(Settings(), 0), 10, 4, 0, "cpu")
    list(batches(ArrayData(random_images(19), np.arange(19)), 6, augment="shift_flip").epoch(0))
    assert states() == before


def test_generators_are_put_back_after_an_error() -> None:
    before = random.getstate(), torch.get_rng_state().tolist()
    draws = []

    def draw_and_fail() -> None:
        with kept_generators():
            seed_generators(5)
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            draw_and_fail()
    assert draws[0] == draws[1]
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_streams_of_random_numbers_are_apart() -> None:
    keys = [("order", 0), ("order", 1), ("augment", 0), ("augment", 0, 0), ("augment", 1, 0), ("subset",), ("split",)]
    draws = [int(keyed_rng(7, *key).integers(2**62)) for key in keys]
    assert len(set(draws)) == len(keys)
