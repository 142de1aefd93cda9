"""Folders of images in torchvision's ImageFolder layout: a folder a class, sorted by name."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from qwt_fx.data.decoding import Pixels, Transform, Undecodable, decode_in_order
from qwt_fx.data.sample_keys import USUAL, SampleKeys
from qwt_fx.data.samples import FilePair
from qwt_fx.errors import ConfigError, DataError

_NAMED = 3  # of many


@dataclass(frozen=True)
class ImageFiles:
    """The images below a directory.

    Attributes:
        directory: as given.
        classes: folder names, sorted.
        files: (path, class index), in torchvision's order.
    """

    directory: str
    classes: tuple[str, ...]
    files: tuple[tuple[str, int], ...]


def _holds_image(directory: str) -> bool:
    """Whether torchvision would find an image below a directory."""
    files = (name for *_, names in os.walk(directory, followlinks=True) for name in names)
    return any(name.lower().endswith(IMG_EXTENSIONS) for name in files)


def list_images(directory: str | os.PathLike[str]) -> ImageFiles:
    """The class folders of `directory` and their images.

    Raises:
        DataError: no such directory, no class folders in it, or a class folder without images.
    """
    path = os.fspath(directory)
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such folder; wanted one that holds a folder of images a class")
    try:
        images = ImageFolder(path)
    except FileNotFoundError as error:
        # torchvision's two messages: no class folders, or no images in some of them (naming each).
        classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        if not classes:
            raise DataError(
                f"{path}: holds no class folders; wanted a folder of images a class"
            ) from error
        empty = [name for name in classes if not _holds_image(os.path.join(path, name))]
        named = ", ".join(empty[:_NAMED]) + (", ..." if len(empty) > _NAMED else "")
        raise DataError(
            f"{path}: {len(empty)} of {len(classes)} class folders hold no image ({named}); wanted "
            f"at least one each, of {', '.join(IMG_EXTENSIONS)}"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return ImageFiles(path, tuple(images.classes), tuple(images.samples))


@dataclass(frozen=True)
class ImageFolderData:
    """A validation folder; iterating gives the same batches each time, in the folders' order.

    `len` is the number of batches, `images` that of images. Every image is there: one that
    cannot be decoded ends the iteration with a `DataError` that names the file.
    """

    files: ImageFiles
    transform: Transform
    batch_size: int
    workers: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Folder names, sorted; labels are indices into it."""
        return self.files.classes

    @property
    def images(self) -> int:
        """Images in all classes."""
        return len(self.files.files)

    def counts(self) -> list[int]:
        """Images of each class."""
        labels = np.array([label for _, label in self.files.files])
        return [int(n) for n in np.bincount(labels, minlength=len(self.classes))]

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (B, 3, H, W) float32 and labels (B,) int64; the last may be smaller."""
        return self.starting_at(0)

    def starting_at(self, number: int, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Every `step`-th batch from `number` on; the images of the others are not read."""
        size = self.batch_size
        files = [
            file
            for begin in range(number * size, self.images, step * size)
            for file in self.files.files[begin : begin + size]
        ]
        # The caption is not used, and must not be empty.
        sources = [FilePair(path, "image") for path, _ in files]
        images: list[Pixels] = []
        done = 0
        with closing(decode_in_order(sources, self.transform, self.workers)) as results:
            for result in results:
                if isinstance(result, Undecodable):
                    raise DataError(
                        f"{result.where}: cannot be decoded ({result.reason}); a validation image "
                        "is never left out: mend or remove the file"
                    )
                if images and result.image.shape != images[0].shape:
                    raise DataError(
                        f"{sources[done + len(images)].where}: the transform returned "
                        f"{result.image.shape}, for other images {images[0].shape}"
                    )
                images.append(result.image)
                if len(images) == size or done + len(images) == len(files):
                    labels = [y for _, y in files[done : done + len(images)]]
                    done += len(images)
                    batch, images = images, []
                    yield torch.from_numpy(np.stack(batch)), torch.tensor(labels)


def open_validation(
    directory: str | os.PathLike[str], transform: Transform, batch_size: int, workers: int
) -> ImageFolderData:
    """Open an ImageFolder for evaluation.

    Args:
        directory: one folder a class, sorted by name.
        transform: PIL RGB image to a (3, H, W) tensor.
        batch_size: images a batch, at least 1.
        workers: decoding processes; 0 decodes in this one.

    Raises:
        ConfigError: a number out of range.
        DataError: no class folders, or one without images.
    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"batch_size {batch_size}, workers {workers}: wanted >= 1 and >= 0")
    return ImageFolderData(list_images(directory), transform, batch_size, workers)


COLUMNS = ("filepath", "title")


def read_csv(path: str, keys: SampleKeys = USUAL) -> Iterator[FilePair]:
    """The pairs of the file, row by row; relative image paths start at the file's folder.

    keys: the columns, by default `COLUMNS`.

    Raises:
        DataError: unreadable, not UTF-8, a column missing, a row without it, or no rows.
    """
    folder = os.path.dirname(os.path.abspath(path))
    rows = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            columns = reader.fieldnames or []
            image_column = _column(path, columns, keys.image or COLUMNS[:1], "--image-key")
            title_column = None
            if keys.captioned or set(columns) & {*keys.caption, COLUMNS[1]}:
                names = keys.caption or COLUMNS[1:]
                title_column = _column(path, columns, names, "--caption-key")
            for row in reader:
                image = row[image_column]
                title = None if title_column is None else row[title_column]
                if not image or (title is None and title_column is not None):
                    raise DataError(
                        f"{path}: line {reader.line_num} lacks a {image_column} or a "
                        f"{title_column or COLUMNS[1]}; wanted both, separated by a tab"
                    )
                rows += 1
                yield FilePair(os.path.join(folder, image), title)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:  # a path with a zero byte
        raise DataError(f"{path!r}: cannot be read ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not tab-separated ({error})") from error
    if rows == 0:
        raise DataError(f"{path}: no rows below the header, wanted at least one image")


def _column(path: str, columns: Sequence[str], names: Sequence[str], flag: str) -> str:
    """The first column of these names, in any case."""
    for column in columns:
        if column.lower() in map(str.lower, names):
            return column
    raise DataError(
        f"{path}: no column {' or '.join(map(repr, names))} (got {', '.join(map(repr, columns))}); "
        f"wanted tab-separated columns '{COLUMNS[0]}' and '{COLUMNS[1]}', or others named by {flag}"
    )
