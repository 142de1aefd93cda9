"""The samples of a shard that cannot be seeked: compressed, behind `pipe:`, or at a URL.

Such a shard is read whole, from webdataset's `gopen`. Its iterators are not used, because a stream
that is cut off between two members, or damaged at a header, ends for them without an error.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from webdataset.gopen import gopen

from qwt_fx.errors import DataError
from qwt_fx.samples import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    ScanCounts,
)
from qwt_fx.tar_shard import BLOCK, HEADER_ERRORS, MAGIC, check_end_block, group_members

# At least two letters, so that a Windows drive is no scheme.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|gz|bz2|xz|zst)$", re.IGNORECASE)
_LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_IMAGE_BYTES) | dict.fromkeys(
    CAPTION_EXTENSIONS, MAX_CAPTION_BYTES
)


def is_remote(shard: str) -> bool:
    """Whether `shard` is a `pipe:` or a URL rather than a path."""
    return _SCHEME.match(shard) is not None


def must_stream(shard: str) -> bool:
    """Whether `shard` can only be read from its start to its end."""
    return is_remote(shard) or _COMPRESSED.search(shard) is not None


def groups(shard: str, counts: ScanCounts) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: contents}) of the samples of `shard`, in its order.

    Contents of anything but images and captions are left out (empty).

    Raises:
        DataError: the source cannot be opened, is no tar, is cut off, or its command failed.
    """
    return group_members(shard, _members(shard, counts))


class _Counted(io.RawIOBase):
    """A stream that adds every byte read to `counts.bytes_read`."""

    def __init__(self, stream: Any, counts: ScanCounts) -> None:
        self._stream = stream
        self._counts = counts

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._counts.bytes_read += len(data)
        return len(data)


class _Tail:
    """Remembers the last two chunks read, where the end-of-archive block is looked for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._chunks = (b"", b"")
        self.position = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._chunks = (self._chunks[1], data) if data else self._chunks
        self.position += len(data)
        return data

    def block(self, offset: int) -> bytes:
        """The block at `offset`, shorter where the stream ended."""
        kept = b"".join(self._chunks)
        start = offset - (self.position - len(kept))
        return kept[start : start + BLOCK]


def _members(shard: str, counts: ScanCounts) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset of the data, contents) of every regular file of the stream."""
    after = "at its start"
    source = None
    try:
        source = gopen(shard)
        stream = _decompressed(shard, io.BufferedReader(_Counted(source, counts)))
        tail = _Tail(stream)
        with tarfile.open(fileobj=cast(BinaryIO, tail), mode="r|") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all headers
                after = f"after member {member.name!r}"
                if member.isreg():
                    yield member.name, member.offset_data, _contents(tar, member)
            check_end_block(shard, tail.block(tar.offset), tar.offset, tail.position, after)
        # A command that is not read to its end dies of a broken pipe and looks failed.
        while stream.read(1 << 20):
            pass
        source.close()
    # zlib.error and EOFError: damaged and cut off compressed streams; OSError: commands.
    except (*HEADER_ERRORS, zlib.error, lzma.LZMAError, AssertionError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{shard}: cannot be read as a tar, {after} ({reason})") from error
    finally:
        if source is not None:
            with contextlib.suppress(OSError):  # reported above where it matters
                source.close()


def _decompressed(shard: str, stream: io.BufferedReader) -> BinaryIO:
    """`stream` behind the decompressor that its first bytes ask for."""
    start = stream.peek(8)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    if kind == "gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
    if kind == "bz2":
        return cast(BinaryIO, bz2.BZ2File(stream))
    if kind == "xz":
        return cast(BinaryIO, lzma.LZMAFile(stream))
    if kind is not None:
        raise DataError(f"{shard}: .{kind} cannot be read; decompress the shard first")
    return stream


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The member's bytes if it can be part of a pair, cut just above what a pair may hold."""
    limit = _LIMITS.get(member.name.rpartition(".")[2].lower())
    file = None if limit is None else tar.extractfile(member)
    return b"" if file is None or limit is None else file.read(limit + 1)
