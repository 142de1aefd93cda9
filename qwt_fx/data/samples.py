"""Image-caption pairs before they are decoded: where they lie, and how their bytes are read."""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from qwt_fx.data.captions import check_caption, decode_caption, decode_captions
from qwt_fx.data.sample_keys import SampleKeys, extension_of
from qwt_fx.errors import DataError

T = TypeVar("T")

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
        image, caption: (offset, bytes) in the tar, or the bytes where the shard was streamed; no
            caption where none is needed.
        caption_extension: such as "txt" or "json:caption".
    """

    shard: str
    key: str
    image: Stored
    caption: Stored | None
    caption_extension: str

    @property
    def where(self) -> str:
        """Shard and key; the key quoted, because a tar may hold any bytes as a name."""
        return f"{self.shard}: sample {self.key!r}"

    def read(self) -> RawPair:
        """Read both members. Raises `OSError`, or `DataError` on damage or absurd sizes."""
        image, caption, read = self._members()
        return RawPair(image, self._captions(caption), read)

    def _captions(self, data: bytes | None) -> tuple[str, ...]:
        return () if data is None else (decode_caption(data, self.caption_extension),)

    def _members(self) -> tuple[bytes, bytes | None, int]:
        """Both members, and the bytes read for them."""
        image = _fetch(self.shard, self.image, "image", MAX_IMAGE_BYTES)
        caption = None
        if self.caption is not None:
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

    def _captions(self, data: bytes | None) -> tuple[str, ...]:
        return () if data is None else decode_captions(data, self.caption_extension)


@dataclass(frozen=True)
class FilePair:
    """An image file and its caption, if it has one."""

    path: str
    caption: str | None

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
        captions = () if self.caption is None else (check_caption(self.caption),)
        return RawPair(data, captions, len(data))


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
    shard: str,
    groups: Iterator[tuple[str, Mapping[str, Stored]]],
    counts: ScanCounts,
    keys: SampleKeys,
) -> Iterator[SampleLocation]:
    """The groups that have an image and, where it is needed, a caption, as locations.

    Args:
        shard: the tar's path or URL.
        groups: (key, {extension: member}) in the order of the tar.
        counts: filled on the way.
        keys: which members these are.

    Raises:
        DataError: at the end, when no group was complete; says what the shard holds instead.
    """
    for key, files in groups:
        counts.groups += 1
        counts.extensions.update(files)
        image, caption = keys.image_in(files), keys.caption_in(files)
        counts.with_image += image is not None
        counts.with_caption += caption is not None
        if image is not None and (caption is not None or not keys.captioned):
            counts.complete += 1
            text = None if caption is None else files[extension_of(caption)]
            yield SampleLocation(shard, key, files[image], text, caption or "")
    if counts.complete == 0:
        raise DataError(_why_nothing(shard, counts, keys))


def _why_nothing(shard: str, counts: ScanCounts, keys: SampleKeys) -> str:
    """The message for a shard without a single sample of the kind wanted."""
    if counts.groups == 0:
        return f"{shard}: the tar is empty: it holds no files named KEY.EXTENSION"
    extensions = ", ".join(
        f".{e}" if e.isprintable() else repr(e) for e in sorted(counts.extensions)[:8]
    )
    remedy = ""
    if counts.with_image == 0:
        lack, wanted = "an image", ", ".join(f".{e}" for e in keys.image_names)
        remedy = "; name others with --image-key"
    elif counts.with_caption == 0:
        lack, wanted = "a caption", ", ".join(map(_member, keys.caption_names))
        remedy = (
            "; name others with --caption-key (json:KEY for a key of a JSON file), or quantize the "
            "image tower alone, which needs none (--choice image_only)"
        )
    else:
        lack, wanted = "both an image and a caption", "KEY.jpg and KEY.txt side by side"
    return (
        f"{shard}: none of its {counts.groups} samples has {lack}; found {extensions}, "
        f"wanted {wanted}{dotted_names(counts) or remedy}"
    )


def dotted_names(counts: ScanCounts) -> str:
    """The rule by which names are split, where extensions with a dot show that it was not known."""
    dotted = sorted(e for e in counts.extensions if "." in e and e.isprintable())
    if not dotted:
        return ""
    return (
        "; names are split at their first dot, as webdataset does, so that extensions here are such as "
        f".{dotted[0]}: write keys without dots, or name it with --image-key or --caption-key"
    )


def _member(name: str) -> str:
    extension, _, key = name.partition(":")
    return f'.{extension} with "{key}"' if key else f".{extension}"


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
