"""Tar files of webdataset's form are a source like image files: same pixels, same splits, same batches."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from test_data import SPLITS, Settings, batches, labels_of, same, write_folder

from eqnet.data import load_data


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_shards(images: Path, folder: Path, size: int = 12) -> None:
    """The images of a folder, in the same order, `size` in each tar file."""
    folder.mkdir(parents=True)
    classes = sorted(p.name for p in images.iterdir())
    paths = sorted(images.rglob("*.png"))
    for start in range(0, len(paths), size):
        files = {}
        for path in paths[start : start + size]:
            key = f"{path.parent.name}_{path.stem}"
            files[f"{key}.cls"] = str(classes.index(path.parent.name)).encode()
            files[f"{key}.png"] = path.read_bytes()
            files[f"{key}.json"] = b"{}"
        write_tar(folder / f"{start:04}.tar", files)


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_files_give_the_batches_of_image_files(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path / "images", {"cat": 10, "dog": 20})
    write_shards(tmp_path / "images", tmp_path / "shards")
    files, shards = (
        load_data(Settings(str(tmp_path / name), input_size=(3, 8, 8), augment="timm"), seed=0)
        for name in ("images", "shards")
    )
    assert shards.fingerprint == files.fingerprint
    assert shards.class_names == ("0", "1")
    for name in SPLITS:
        first, second = (
            list(batches(getattr(s, name), 4, augment="timm", workers=workers).epoch(1)) for s in (files, shards)
        )
        assert same(first, second)
    assert torch.equal(shards.test[1][0], files.test[1][0])


def test_parts_of_tar_files_are_those_of_image_folders(tmp_path: Path) -> None:
    for part, counts in (("train", {"cat": 5, "dog": 5}), ("val", {"cat": 2, "dog": 1})):
        write_folder(tmp_path / "images" / part, counts)
        write_shards(tmp_path / "images" / part, tmp_path / "shards" / part)
    labels = labels_of(load_data(Settings(str(tmp_path / "shards"), input_size=(3, 8, 8)), seed=0))
    assert labels["test"].tolist() == [0, 0, 1]
    assert len(labels["train"]) + len(labels["validation"]) == 10


PIXELS = b"P6 2 1 255\n" + bytes(6)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.ppm": PIXELS}, "a needs an image"),
        ({"a.cls": b"1"}, "a needs an image"),
        ({"a.ppm": PIXELS, "a.cls": b"cat"}, "a.cls must hold a label"),
        ({"a.ppm": PIXELS, "a.cls": b"-1"}, "a.cls must hold a label"),
        ({"a.ppm": PIXELS, "a.png": PIXELS, "a.cls": b"1"}, "two files"),
        ({"readme.txt": b""}, "hold no images"),
    ],
)
def test_tar_files_that_do_not_fit_are_refused(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=words):
        load_data(Settings(str(tmp_path)), seed=0)


def test_compressed_and_damaged_tar_files_are_named(tmp_path: Path) -> None:
    samples = {f"{i}.{end}": content for i in range(8) for end, content in (("ppm", PIXELS), ("cls", b"%d" % (i % 2)))}
    write_tar(tmp_path / "0.tar", samples, "w:gz")
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as an uncompressed tar file"):
        load_data(Settings(str(tmp_path)), seed=0)
    write_tar(tmp_path / "0.tar", {**samples, "3.ppm": b"no image"})
    splits = load_data(Settings(str(tmp_path), input_size=(3, 8, 8)), seed=0)
    holding = next(data for data in (splits.train, splits.validation, splits.test) if 3 in data.indices)
    with pytest.raises(ValueError, match=r"image 3 in .*0\.tar cannot be read as an image"):
        list(batches(holding, 2, train=False))
