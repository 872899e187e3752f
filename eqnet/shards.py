"""Images in tar files of webdataset's form: `<key>.jpg` beside `<key>.cls`, a whole number as text.

The tar files are not streamed: their headers are read once, and an image is then read at its place, so that order, splits and
resuming are those of any other source. Nothing is unpacked. Compressed tar files have no places and are refused.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from eqnet.augment import Ints

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")


class _Place(NamedTuple):
    """Where an image lies: number of its file, first byte, bytes."""

    file: int
    start: int
    size: int


@dataclass(eq=False)
class ShardImages:
    """Reads images of tar files by number."""

    paths: list[Path] = field(default_factory=list)
    places: list[_Place] = field(default_factory=list)

    def open(self, index: int) -> Image.Image:
        """The image of a number."""
        place = self.places[index]
        with self.paths[place.file].open("rb") as file:
            file.seek(place.start)
            return Image.open(io.BytesIO(file.read(place.size)))

    def describe(self, index: int) -> str:
        """E.g. 'image 17 in photos/train/0001.tar'."""
        return f"image {index} in {self.paths[self.places[index].file]}"

    def add(self, folder: Path) -> Ints:
        """Appends the images of a folder's tar files, in order of their names; returns their labels, int64 [N].

        Raises:
            ValueError: a file is no plain tar file, or an image and a label are not together.
        """
        labels: list[int] = []
        for path in sorted(folder.glob("*.tar")):
            self.paths.append(path)
            try:
                with tarfile.open(path, "r:") as archive:
                    labels += self._samples(archive, path)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ValueError(f"{path} cannot be read as an uncompressed tar file ({error}).") from error
        return np.array(labels, dtype=np.int64)

    def _samples(self, archive: tarfile.TarFile, path: Path) -> list[int]:
        images: dict[str, _Place] = {}
        labels: dict[str, int] = {}
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            key, _, ending = name.partition(".")
            key, ending = f"{folder}/{key}", ending.lower()
            if not member.isreg() or ending not in (*IMAGES, "cls"):
                continue
            if key in (labels if ending == "cls" else images):
                raise ValueError(f"{path} has two files {member.name} for one sample.")
            if ending == "cls":
                file = archive.extractfile(member)
                text = b"" if file is None else file.read(20)
                if not text.strip().isdigit():
                    raise ValueError(f"{path}: {member.name} must hold a label, a whole number; got {text!r}.")
                labels[key] = int(text)
            else:
                images[key] = _Place(len(self.paths) - 1, member.offset_data, member.size)
        alone = sorted(set(images) ^ set(labels))
        if alone:
            raise ValueError(
                f"{path}: {alone[0].removeprefix('/')} needs an image ({', '.join(IMAGES)}) and a .cls file."
            )
        self.places += images.values()
        return [labels[key] for key in images]
