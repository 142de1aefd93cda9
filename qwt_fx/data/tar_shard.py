"""The samples of a plain tar on disk, found from its member headers alone.

Only the 512-byte headers are read, by seeking from one to the next: about 2 % of a shard of photos.
`tarfile` stops without a word at a damaged header or a missing end marker, which would lose the
rest of the shard; here both are errors.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import TypeVar

from webdataset.tariterators import base_plus_ext

from qwt_fx.data.samples import ScanCounts
from qwt_fx.errors import DataError

T = TypeVar("T")

BLOCK = tarfile.BLOCKSIZE

# What `tarfile` raises on damaged headers, beyond its own errors.
HEADER_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError)

_TIMES = re.compile(rb"(\d+ [acm]time=[\d.]+\n)+")
_MAX_TIMES = 4 * BLOCK
_META = re.compile(r"__[^/]*__($|/)")
MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zst"}


class CountingFile(io.FileIO):
    """An unbuffered file that adds every byte read to `counts.bytes_read`."""

    def __init__(self, path: str, counts: ScanCounts) -> None:
        super().__init__(path, "rb")
        self._counts = counts
        if hasattr(os, "posix_fadvise"):
            # Headers lie far apart: read-ahead would pull in the images between them.
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, size: int | None = -1, /) -> bytes:
        """As `io.FileIO.read`, counted."""
        data = super().read(-1 if size is None else size)
        self._counts.bytes_read += len(data)
        return data


def split_member(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) as webdataset splits names; `None` for what it leaves out."""
    if _META.match(name):
        return None
    key, extension = base_plus_ext(name)
    return None if key is None else (key, extension.lower())


def groups(path: str, counts: ScanCounts) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, bytes)}) of the samples of the tar at `path`, in its order.

    Raises:
        DataError: unreadable, not a tar, empty, cut off or damaged; says at which byte.
    """
    return group_members(path, _members(path, counts))


def group_members(
    shard: str, members: Iterator[tuple[str, int, T]]
) -> Iterator[tuple[str, dict[str, T]]]:
    """Members (name, offset, value) with one key that stand side by side, as in webdataset.

    Raises:
        DataError: one sample has two members of the same name.
    """
    key: str | None = None
    files: dict[str, T] = {}
    for name, offset, value in members:
        split = split_member(name)
        if split is None:
            continue
        if split[0] != key:
            if key is not None:
                yield key, files
            key, files = split[0], {}
        if split[1] in files:
            raise DataError(
                f"{shard}: two members named {name!r} in one sample, the second at byte {offset}: "
                "write the shard anew with one file a name"
            )
        files[split[1]] = value
    if key is not None:
        yield key, files


def _members(path: str, counts: ScanCounts) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """(name, offset of the data, (offset, bytes)) of every regular file of the tar."""
    try:
        file = CountingFile(path, counts)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from error
    with file:
        total = os.fstat(file.fileno()).st_size
        offset, after = 0, "at its start"
        for plain in _plain_members(file):
            _check_member(path, plain, total)
            offset = plain.offset_data + _padded(plain.size)
            after = f"after member {plain.name!r}"
            yield plain.name, plain.offset_data, (plain.offset_data, plain.size)
        file.seek(offset)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all headers
                    _check_member(path, member, total)
                    after = f"after member {member.name!r}"
                    if member.isreg():
                        span = (member.offset_data, member.size)
                        yield member.name, member.offset_data, span
                file.seek(tar.offset)
                check_end_block(path, file.read(BLOCK), tar.offset, total, after)
        except HEADER_ERRORS as error:
            raise DataError(_not_a_tar(path, file, total, after, error)) from error


def _plain_members(file: io.FileIO) -> Iterator[tarfile.TarInfo]:
    """The members up to the first whose headers are not of the plain kind that fills shards.

    `tarfile` takes several times as long, minutes for hundreds of shards; it gets the rest of the tar.
    """
    offset = 0
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        size = _plain_size(block, b"x")
        if size is not None and size <= _MAX_TIMES:
            # webdataset's writer keeps times of fractions of a second in a header of their own.
            if not _TIMES.fullmatch(file.read(_padded(size))[:size]):
                return
            offset += BLOCK + _padded(size)
            block = file.read(BLOCK)
        size = _plain_size(block, b"0")
        name = block[:100].rstrip(b"\0")
        if size is None or not name.isascii() or b"\0" in name:
            return
        member = tarfile.TarInfo(name.decode("ascii"))
        member.size, member.offset_data = size, offset + BLOCK
        yield member
        offset += BLOCK + _padded(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _plain_size(block: bytes, kind: bytes) -> int | None:
    """The size in a header of this kind; `None` for any other header, or anything unusual in it."""
    # Magic in its two spellings; a name of one part; sizes and the checksum in octal digits.
    if len(block) != BLOCK or block[156:157] != kind or block[257:262] != b"ustar" or block[345]:
        return None
    size, checksum = (block[a:b].strip(b" \0") for a, b in ((124, 136), (148, 156)))
    if not (size.isdigit() and checksum.isdigit()):
        return None
    try:
        right = int(checksum, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
        return int(size, 8) if right else None
    except ValueError:  # an 8 or a 9
        return None


def _check_member(path: str, member: tarfile.TarInfo, total: int) -> None:
    """Raise `DataError` unless the whole of `member` lies in the file, in one piece."""
    where = f"{path}: member {member.name!r} at byte {member.offset_data}"
    if member.issparse():
        raise DataError(f"{where} is stored as a sparse file: write the tar without --sparse")
    if member.isreg() and not 0 <= member.size <= total - member.offset_data:
        raise DataError(
            f"{where} is cut off: it needs {member.size} bytes, the file ends after "
            f"{max(total - member.offset_data, 0)}; fetch or write the shard again"
        )


def check_end_block(shard: str, block: bytes, offset: int, total: int, after: str) -> None:
    """Raise `DataError` unless `block`, read at `offset` of `total`, is the end-of-archive mark."""
    if len(block) < BLOCK:
        raise DataError(_cut_off(shard, after, total))
    if block.strip(b"\0"):
        raise DataError(
            f"{shard}: damaged {after}: no member header at byte {offset}; "
            "fetch or write the shard again"
        )


def _cut_off(shard: str, after: str, total: int) -> str:
    return (
        f"{shard}: cut off {after}: ends at byte {total} without the end-of-archive marker; "
        "fetch or write the shard again"
    )


def _not_a_tar(path: str, file: io.FileIO, total: int, after: str, error: Exception) -> str:
    """The message for what `tarfile` refused."""
    if total == 0:
        return f"{path}: the file is empty (0 bytes), wanted a tar; fetch or write the shard again"
    if "unexpected end" in str(error):  # cut off in the padding behind a member
        return _cut_off(path, after, total)
    file.seek(0)
    start = file.read(8)
    for magic, suffix in MAGIC.items():
        if start.startswith(magic):
            return f"{path}: a compressed file, wanted a plain tar: name it .tar.{suffix}"
    return f"{path}: not a readable tar {after} ({error}); fetch or write the shard again"
