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
import select
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, cast

from webdataset.gopen import Pipe, gopen

from qwt_fx.data.sample_keys import USUAL, SampleKeys, extension_of
from qwt_fx.data.samples import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, ScanCounts
from qwt_fx.data.tar_shard import (
    BLOCK,
    HEADER_ERRORS,
    MAGIC,
    check_end_block,
    group_members,
    split_member,
)
from qwt_fx.errors import DataError

# A command or download that sends nothing for so long is taken for dead.
STALL_SECONDS = 300.0

# At least two letters, so that a Windows drive is no scheme.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|gz|bz2|xz|zst)$", re.IGNORECASE)


def is_remote(shard: str) -> bool:
    """Whether `shard` is a `pipe:` or a URL rather than a path."""
    return _SCHEME.match(shard) is not None


def must_stream(shard: str) -> bool:
    """Whether `shard` can only be read from its start to its end."""
    return is_remote(shard) or _COMPRESSED.search(shard) is not None


def groups(
    shard: str, counts: ScanCounts, keys: SampleKeys = USUAL
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: contents}) of the samples of `shard`, in its order.

    Contents of anything but the images and captions of `keys` are left out (empty).

    Raises:
        DataError: the source cannot be opened, is no tar, is cut off, or its command failed.
    """
    limits = dict.fromkeys(map(extension_of, keys.caption_names), MAX_CAPTION_BYTES)
    limits |= dict.fromkeys(keys.image_names, MAX_IMAGE_BYTES)
    return group_members(shard, _members(shard, counts, limits))


class _Counted(io.RawIOBase):
    """A source that adds every byte read to `counts.bytes_read`, and does not wait for ever.

    A command is read without a buffer of its own, so that `select` knows whether bytes are there.
    """

    def __init__(self, source: Pipe | BinaryIO, counts: ScanCounts) -> None:
        self._pipe: Pipe | None = source if isinstance(source, Pipe) else None
        self._stream = self._pipe.stream.raw if self._pipe is not None else source
        self._counts = counts

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._pipe is not None and not _ready(self._stream):
            raise TimeoutError(f"it has sent nothing for {STALL_SECONDS:g} seconds")
        data = self._stream.read(len(buffer))
        if not data and self._pipe is not None:
            _check_end(self._pipe)
        buffer[: len(data)] = data
        self._counts.bytes_read += len(data)
        return len(data)


def _ready(stream: BinaryIO) -> bool:
    """Whether there is something to read, the end included, before the time is over."""
    return bool(select.select([stream], [], [], STALL_SECONDS)[0])


def _check_end(pipe: Pipe) -> None:
    """Raise `OSError` where a command at the end of its output failed, or does not end."""
    try:
        pipe.proc.wait(STALL_SECONDS)
    except subprocess.TimeoutExpired:
        reason = f"it closed its output, but did not end within {STALL_SECONDS:g} seconds"
        raise TimeoutError(reason) from None
    pipe.check_status()


def _close(source: Pipe | BinaryIO) -> None:
    """Close a source; a command that still runs, as after an error or a signal, is ended."""
    if isinstance(source, Pipe) and source.proc.poll() is None:
        source.proc.kill()
    with contextlib.suppress(OSError):  # reported before where it matters
        source.close()


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


def _members(
    shard: str, counts: ScanCounts, limits: Mapping[str, int]
) -> Iterator[tuple[str, int, bytes]]:
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
                    yield member.name, member.offset_data, _contents(tar, member, limits)
            check_end_block(shard, tail.block(tar.offset), tar.offset, tail.position, after)
        # A command that is not read to its end dies of a broken pipe and looks failed; at the
        # end its exit status is looked at.
        while stream.read(1 << 20):
            pass
    # zlib.error and EOFError: damaged and cut off compressed streams; OSError: commands.
    except (*HEADER_ERRORS, zlib.error, lzma.LZMAError, AssertionError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{shard}: cannot be read as a tar, {after} ({reason})") from error
    finally:
        if source is not None:
            _close(source)


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


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo, limits: Mapping[str, int]) -> bytes:
    """The member's bytes if it can be part of a pair, cut just above what a pair may hold."""
    split = split_member(member.name)
    limit = None if split is None else limits.get(split[1])
    file = None if limit is None else tar.extractfile(member)
    return b"" if file is None or limit is None else file.read(limit + 1)
