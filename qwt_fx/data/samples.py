"""Image-caption pairs before they are decoded: where they lie, and how their bytes are read."""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from qwt_fx.data.captions import check_caption, decode_caption, decode_captions
from qwt_fx.errors import DataError

T = TypeVar("T")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")

# A damaged header can claim any size; nothing a CLIP is calibrated on comes near these.
MAX_IMAGE_BYTES = 256 << 20
MAX_CAPTION_BYTES = 1 << 20

# (byte offset in the shard, bytes) of a member of a tar on disk, or the member itself.
Stored = tuple[int, int] | bytes


@dataclass(frozen=True)
class RawPair:
    """An image still encoded, its captions, and the bytes read from storage to get them."""

    image: bytes
    captions: tuple[str, ...]
    bytes_read: int

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


class PairSource(Protocol):
    """An image-caption pair that has not been read yet; travels to worker processes by pickle."""

    @property
    def where(self) -> str:
        """What a message calls this pair."""

    def read(self) -> RawPair:
        """The pair. Raises `OSError` or `DataError` when it cannot be read."""


@dataclass(frozen=True)
class SampleLocation:
    """One image-caption pair of a shard.

    Attributes:
        shard: the tar's path or URL.
        key: member name up to its first dot, folders kept.
        image, caption: (offset, bytes) in the tar, or the bytes where the shard was streamed.
        caption_extension: "txt" or "json".
    """

    shard: str
    key: str
    image: Stored
    caption: Stored
    caption_extension: str

    @property
    def where(self) -> str:
        """Shard and key; the key quoted, because a tar may hold any bytes as a name."""
        return f"{self.shard}: sample {self.key!r}"

    def read(self) -> RawPair:
        """Read both members. Raises `OSError`, or `DataError` on damage or absurd sizes."""
        image, caption, read = self._members()
        return RawPair(image, (decode_caption(caption, self.caption_extension),), read)

    def _members(self) -> tuple[bytes, bytes, int]:
        """Both members, and the bytes read for them."""
        image = _fetch(self.shard, self.image, "image", MAX_IMAGE_BYTES)
        caption = _fetch(self.shard, self.caption, "caption", MAX_CAPTION_BYTES)
        read = sum(span[1] for span in (self.image, self.caption) if isinstance(span, tuple))
        return image, caption, read


@dataclass(frozen=True)
class CaptionedSample(SampleLocation):
    """One image of a shard with all of its captions, where `SampleLocation` has one."""

    @classmethod
    def of(cls, sample: SampleLocation) -> CaptionedSample:
        """The same place, read for all captions."""
        return cls(sample.shard, sample.key, sample.image, sample.caption, sample.caption_extension)

    def read(self) -> RawPair:
        """Read both members; raises as `SampleLocation.read`."""
        image, caption, read = self._members()
        return RawPair(image, decode_captions(caption, self.caption_extension), read)


@dataclass(frozen=True)
class FilePair:
    """An image file and its caption."""

    path: str
    caption: str

    @property
    def where(self) -> str:
        """The file's path."""
        return self.path

    def read(self) -> RawPair:
        """Read the file. Raises `OSError`, or `DataError` on an absurd size."""
        size = os.stat(self.path).st_size
        if size > MAX_IMAGE_BYTES:
            raise DataError(f"image of {size} bytes, wanted at most {MAX_IMAGE_BYTES}")
        with open(self.path, "rb") as file:
            data = file.read()
        return RawPair(data, (check_caption(self.caption),), len(data))


@dataclass
class ScanCounts:
    """What one walk through a shard has met so far; filled while the walk goes on."""

    bytes_read: int = 0
    groups: int = 0
    complete: int = 0
    with_image: int = 0
    with_caption: int = 0
    extensions: set[str] = field(default_factory=set)


def random_order(items: Iterable[T], keep: int, seed: str) -> list[T]:
    """The first `keep` items of a uniformly random order of `items`, holding no more than these.

    Every item gets its random number by position, so that a larger `keep` finds the same order.
    """
    number = random.Random(seed).random
    order = heapq.nsmallest(keep, ((number(), i, item) for i, item in enumerate(items)))
    return [item for _, _, item in order]


def complete_samples(
    shard: str, groups: Iterator[tuple[str, Mapping[str, Stored]]], counts: ScanCounts
) -> Iterator[SampleLocation]:
    """The groups that have an image and a caption, as locations.

    Args:
        shard: the tar's path or URL.
        groups: (key, {extension: member}) in the order of the tar.
        counts: filled on the way.

    Raises:
        DataError: at the end, when no group was complete; says what the shard holds instead.
    """
    for key, files in groups:
        counts.groups += 1
        counts.extensions.update(files)
        image = next((e for e in IMAGE_EXTENSIONS if e in files), None)
        caption = next((e for e in CAPTION_EXTENSIONS if e in files), None)
        counts.with_image += image is not None
        counts.with_caption += caption is not None
        if image is not None and caption is not None:
            counts.complete += 1
            yield SampleLocation(shard, key, files[image], files[caption], caption)
    if counts.complete == 0:
        raise DataError(_why_nothing(shard, counts))


def _why_nothing(shard: str, counts: ScanCounts) -> str:
    """The message for a shard without a single image-caption pair."""
    if counts.groups == 0:
        return f"{shard}: the tar is empty: it holds no files named KEY.EXTENSION"
    extensions = ", ".join(
        f".{e}" if e.isprintable() else repr(e) for e in sorted(counts.extensions)[:8]
    )
    if counts.with_caption == 0:
        lack, wanted = "a caption", '.txt (or .json with a "caption")'
    elif counts.with_image == 0:
        lack, wanted = "an image", ", ".join(f".{e}" for e in IMAGE_EXTENSIONS)
    else:
        lack, wanted = "both an image and a caption", "KEY.jpg and KEY.txt side by side"
    return (
        f"{shard}: none of its {counts.groups} samples has {lack}; found {extensions}, "
        f"wanted {wanted}"
    )


def _fetch(shard: str, stored: Stored, what: str, limit: int) -> bytes:
    """The bytes of one member, read from the tar unless already here."""
    size = len(stored) if isinstance(stored, bytes) else stored[1]
    if size > limit:
        raise DataError(f"{what} of {size} bytes, wanted at most {limit}")
    if isinstance(stored, bytes):
        return stored
    with open(shard, "rb", buffering=0) as file:
        file.seek(stored[0])
        data = file.read(size)
    if len(data) != size:
        raise DataError(f"{what} has {len(data)} of {size} bytes: the shard changed while in use")
    return data
