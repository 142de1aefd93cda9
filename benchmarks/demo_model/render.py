"""Draw ordered pairs of coloured handwritten digits: the data of the demo CLIP.

The handwriting is scikit-learn's bundled digits (1,797 images of 8 x 8 pixels), split by
sample, stratified by digit, into training, calibration and validation digits; a digit of one
split never appears in an image of another. A class is an ordered pair of (colour, digit), so
4 colours and 10 digits make (4 * 10) ** 2 = 1,600 classes such as "red three next to a blue
seven".

An image is a pure function of (split, class, seed, index): each one has its own generator.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT = 32
WIDTH = 48
CELL = 24
"""Width in pixels of the half of the image in which a digit is centred."""

COLOURS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("red", (225, 50, 50)),
    ("green", (50, 200, 60)),
    ("blue", (70, 100, 240)),
    ("yellow", (230, 210, 50)),
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

EVALUATION_TEMPLATES = ("a {}.", "a photo of a {}.")
CAPTION_TEMPLATES = (*EVALUATION_TEMPLATES, "an image of a {}.", "a {} on a dark background.")
"""Captions of the training and calibration images; validation uses the first two only."""

SPLITS = ("train", "calibration", "validation")
_SPLIT_SEED = 20_240
_SPLIT_SHARES = (6, 1, 2)
_FIXED_TIME = 0

Uint8Image = NDArray[np.uint8]


@dataclass(frozen=True)
class DigitSet:
    """The digits of one split.

    Attributes:
        split: one of ``SPLITS``.
        samples: (n,) int64, row numbers in scikit-learn's data set.
        images: (n, 8, 8) uint8, 0 to 255, ink is bright.
        by_digit: ten (n_d,) int64 arrays, rows of ``images`` that show the digit d.
    """

    split: str
    samples: NDArray[np.int64]
    images: Uint8Image
    by_digit: tuple[NDArray[np.int64], ...]


@cache
def load_digit_set(split: str) -> DigitSet:
    """Load the digits of ``split``; each of the ten digits is divided 6 : 1 : 2 by sample."""
    from sklearn.datasets import load_digits

    position = SPLITS.index(split)
    data = load_digits()
    rng = np.random.default_rng(_SPLIT_SEED)
    bounds = np.concatenate([[0], np.cumsum(_SPLIT_SHARES)]) / sum(_SPLIT_SHARES)
    chosen = []
    for digit in range(len(DIGITS)):
        rows = rng.permutation(np.flatnonzero(data.target == digit))
        first, last = (np.round(bounds * len(rows)).astype(int)[position + i] for i in (0, 1))
        chosen.append(np.sort(rows[first:last]))
    samples = np.concatenate(chosen).astype(np.int64)
    images = np.round(data.images[samples] * (255.0 / 16.0)).astype(np.uint8)
    ends = np.cumsum([len(rows) for rows in chosen])
    by_digit = tuple(
        np.arange(end - len(rows), end) for rows, end in zip(chosen, ends, strict=True)
    )
    return DigitSet(split, samples, images, by_digit)


def class_names() -> list[str]:
    """Return the 1,600 class names; the index is ((c1 * 10 + d1) * 4 + c2) * 10 + d2."""
    things = [f"{colour} {digit}" for colour, _ in COLOURS for digit in DIGITS]
    return [f"{left} next to a {right}" for left in things for right in things]


def balanced_classes(count: int, seed: int) -> NDArray[np.int64]:
    """Return (count,) class indices in random order; class counts differ by at most one."""
    rng = np.random.default_rng((seed, 1))
    total = len(class_names())
    rounds = [rng.permutation(total) for _ in range(-(-count // total))]
    return np.concatenate(rounds)[:count].astype(np.int64)


def render_image(digits: DigitSet, class_index: int, seed: int, index: int) -> Uint8Image:
    """Draw image ``index`` of the stream ``seed``: (32, 48, 3) uint8 RGB."""
    rng = np.random.default_rng((SPLITS.index(digits.split), seed, index))
    left, right = divmod(class_index, len(COLOURS) * len(DIGITS))
    numbers = rng.random(40, dtype=np.float32)
    image = _background(numbers[:9], rng)
    for side, thing in enumerate((left, right)):
        colour, digit = divmod(thing, len(DIGITS))
        draw = numbers[10 + 12 * side : 22 + 12 * side]
        rows = digits.by_digit[digit]
        glyph = digits.images[rows[int(draw[0] * len(rows))]]
        _paste(image, glyph, COLOURS[colour][1], CELL * side + CELL // 2, draw)
    return image.clip(0, 255).astype(np.uint8)


def render_batch(
    digits: DigitSet, classes: Sequence[int] | NDArray[np.int64], seed: int, first: int
) -> Uint8Image:
    """Draw images ``first`` to ``first + n`` of the stream ``seed``: (n, 32, 48, 3) uint8."""
    return np.stack(
        [render_image(digits, int(label), seed, first + i) for i, label in enumerate(classes)]
    )


def _background(numbers: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A dark colour with a linear gradient and a little grey noise: (32, 48, 3) float32."""
    base = 12.0 + 36.0 * numbers[:3]
    slope = 24.0 * numbers[3:5] - 12.0
    down = np.linspace(-1.0, 1.0, HEIGHT, dtype=np.float32)[:, None] * slope[0]
    across = np.linspace(-1.0, 1.0, WIDTH, dtype=np.float32)[None, :] * slope[1]
    noise = rng.integers(-2, 3, size=(HEIGHT // 2, WIDTH // 2)).astype(np.float32) * 3.0
    texture = down + across + noise.repeat(2, axis=0).repeat(2, axis=1)
    image: NDArray[np.float32] = texture[:, :, None] + base
    return image


def _paste(
    image: NDArray[np.float32],
    glyph: Uint8Image,
    colour: tuple[int, int, int],
    centre: int,
    draw: NDArray[np.float32],
) -> None:
    """Blend ``glyph`` (8, 8) in ``colour`` into ``image`` (32, 48, 3), in place.

    ``draw`` (12,) in [0, 1): 1-2 size, 3 angle, 4-5 position, 6-8 colour, 9 ink.
    """
    width, height = (18 + int(7 * number) for number in draw[1:3])
    angle = float(20.0 * draw[3] - 10.0)
    mask = Image.fromarray(glyph).resize((width, height), Image.Resampling.BILINEAR)
    mask = mask.rotate(angle, Image.Resampling.BILINEAR)
    left = centre - width // 2 + int(7 * draw[4]) - 3
    top = HEIGHT // 2 - height // 2 + int(9 * draw[5]) - 4
    x0, x1 = max(left, 0), min(left + width, WIDTH)
    y0, y1 = max(top, 0), min(top + height, HEIGHT)
    part = np.asarray(mask, dtype=np.float32)[y0 - top : y1 - top, x0 - left : x1 - left, None]
    alpha = part * ((0.8 + 0.2 * draw[9]) / 255.0)
    ink = np.asarray(colour, dtype=np.float32) + (48.0 * draw[6:9] - 24.0)
    region = image[y0:y1, x0:x1]
    region += alpha * (ink - region)


def png_bytes(image: Uint8Image) -> bytes:
    """Encode an (h, w, 3) uint8 image as PNG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def validation_files(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield ("CLASS/INDEX.png", PNG bytes) drawn from the validation digits only."""
    digits = load_digit_set("validation")
    for index, label in enumerate(balanced_classes(count, seed)):
        image = render_image(digits, int(label), seed, index)
        yield f"{label:04d}/{index:06d}.png", png_bytes(image)


def write_image_folder(directory: Path, count: int, seed: int) -> None:
    """Write ``count`` validation images as class folders 0000 to 1599, all of them made."""
    for label in range(len(class_names())):
        (directory / f"{label:04d}").mkdir(parents=True, exist_ok=True)
    for name, data in validation_files(count, seed):
        (directory / name).write_bytes(data)


def write_shards(directory: Path, sizes: Sequence[int], seed: int) -> list[Path]:
    """Write calib-000.tar, ... with ``sizes[i]`` PNG and caption pairs of calibration digits."""
    directory.mkdir(parents=True, exist_ok=True)
    digits = load_digit_set("calibration")
    names = class_names()
    labels = balanced_classes(sum(sizes), seed)
    styles = np.random.default_rng((seed, 2)).integers(len(CAPTION_TEMPLATES), size=sum(sizes))
    paths, first = [], 0
    for shard, size in enumerate(sizes):
        path = directory / f"calib-{shard:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(first, first + size):
                caption = CAPTION_TEMPLATES[styles[index]].format(names[labels[index]])
                image = render_image(digits, int(labels[index]), seed, index)
                _add_member(archive, f"{index:06d}.png", png_bytes(image))
                _add_member(archive, f"{index:06d}.txt", caption.encode())
        first += size
        paths.append(path)
    return paths


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mtime = _FIXED_TIME
    archive.addfile(member, io.BytesIO(data))
