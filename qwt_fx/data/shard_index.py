"""`SHARD.tar.index.json`: where the samples of a tar lie, so that its headers need not be walked.

    {"schema": 1, "size": bytes of the tar,
     "samples": [{"key": "000012", "files": {"jpg": [offset, bytes], "txt": [offset, bytes]}}, ...]}

`size` refuses an index that belongs to another version of the tar; since tars are padded to 10 KiB
and may differ at equal size, the header of every member that is drawn is compared, too.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator

from qwt_fx.data.samples import SampleLocation, ScanCounts
from qwt_fx.data.tar_shard import BLOCK, HEADER_ERRORS, CountingFile
from qwt_fx.errors import DataError

SCHEMA = 1
_REMEDY = "delete the index or write it anew"


def index_path(shard: str) -> str:
    """The path of the index of `shard`."""
    return f"{shard}.index.json"


def read_groups(shard: str, counts: ScanCounts) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """As `tar_shard.groups`, from the index of `shard`.

    Raises:
        DataError: the index is unreadable, not of this format, or of another version of the tar.
    """
    path = index_path(shard)
    try:
        size = os.stat(shard).st_size
        with open(path, "rb") as file:
            data = file.read()
        index = json.loads(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {_REMEDY}") from error
    counts.bytes_read += len(data)
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        raise DataError(f'{path}: wanted an object with "schema": {SCHEMA}; {_REMEDY}')
    if index.get("size") != size:
        raise DataError(
            f"{path}: stale: written for a tar of {index.get('size')!r} bytes, {shard} has {size}; "
            f"{_REMEDY}"
        )
    samples = index.get("samples")
    if not isinstance(samples, list):
        raise DataError(f'{path}: "samples" is no list; {_REMEDY}')
    for number, entry in enumerate(samples):
        yield _entry(path, number, entry, size)


def _entry(
    path: str, number: int, entry: object, size: int
) -> tuple[str, dict[str, tuple[int, int]]]:
    """One entry of "samples", checked."""
    key = entry.get("key") if isinstance(entry, dict) else None
    files = entry.get("files") if isinstance(entry, dict) else None
    if not isinstance(key, str) or not isinstance(files, dict):
        raise DataError(f'{path}: samples[{number}] lacks "key" or "files"; {_REMEDY}')
    spans: dict[str, tuple[int, int]] = {}
    for extension, span in files.items():
        # `type(x) is int` because JSON's true is an int to isinstance.
        if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)):
            raise DataError(
                f"{path}: samples[{number}] {extension!r}: got {span!r}, wanted [offset, bytes]"
            )
        offset, length = span
        if offset < BLOCK or length < 0 or offset + length > size:
            raise DataError(
                f"{path}: samples[{number}] {extension!r}: [{offset}, {length}] lies outside the "
                f"tar of {size} bytes; {_REMEDY}"
            )
        spans[extension] = (offset, length)
    return key, spans


def check_headers(sample: SampleLocation, counts: ScanCounts) -> None:
    """Compare the tar headers of an indexed sample with what the index says of it.

    Raises:
        DataError: another member stands there: the tar was replaced by one of equal size.
    """
    with CountingFile(sample.shard, counts) as file:
        for span in (sample.image, sample.caption):
            if span is None or isinstance(span, bytes):
                continue
            file.seek(span[0] - BLOCK)
            try:
                member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            except HEADER_ERRORS:
                member = None
            # Long and non-ASCII names are held in extra headers, and here only in part.
            plain = sample.key.isascii() and member is not None and len(member.name) < 100
            if (
                member is None
                or member.size != span[1]
                or (plain and not member.name.lower().startswith(f"{sample.key}.".lower()))
            ):
                raise DataError(
                    f"{index_path(sample.shard)}: stale: {sample.shard} holds no {sample.key!r} of "
                    f"{span[1]} bytes at byte {span[0]}; {_REMEDY}"
                )
