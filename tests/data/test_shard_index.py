"""`SHARD.index.json`: right, stale and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shard_files import pairs, write_index, write_tar

from qwt_fx.data.samples import SampleLocation, ScanCounts
from qwt_fx.data.shard_index import index_path, read_groups
from qwt_fx.data.shards import sample_locations
from qwt_fx.data.tar_shard import groups
from qwt_fx.errors import DataError


def draw(path: str) -> list[SampleLocation]:
    return list(sample_locations([path], 5, 1))


@pytest.fixture
def shard(tmp_path: Path) -> str:
    return write_tar(tmp_path / "a.tar", pairs(range(20)))


def test_a_written_index_says_what_a_walk_finds(shard: str) -> None:
    walked = list(groups(shard, ScanCounts()))
    write_index(shard)
    assert index_path(shard) == f"{shard}.index.json"
    assert list(read_groups(shard, ScanCounts())) == walked


def test_names_that_headers_hold_in_part_are_not_taken_for_stale(tmp_path: Path) -> None:
    members = [
        (f"{prefix}{i}.{extension}", data)
        for i, prefix in enumerate(("é/ü", "long/" * 40, "x" * 120, "plain", "Upper/Case"))
        for extension, data in (("PNG", b"x" * 99), ("txt", b"caption"))
    ]
    path = write_tar(tmp_path / "a.tar", members)
    walked = draw(path)
    write_index(path)
    assert draw(path) == walked


def test_an_index_of_a_tar_of_another_size_is_refused(shard: str) -> None:
    write_index(shard)
    write_tar(Path(shard), pairs(range(40)))
    with pytest.raises(DataError, match=r"index\.json: stale: written for a tar of \d+ bytes"):
        draw(shard)


def test_an_index_of_another_tar_of_equal_size_is_refused(shard: str) -> None:
    write_index(shard)
    size = Path(shard).stat().st_size
    write_tar(Path(shard), pairs(range(1, 21)))
    assert Path(shard).stat().st_size == size
    with pytest.raises(DataError, match=r"index\.json: stale: .* holds no '0000"):
        draw(shard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, '"schema": 1'),
        ({"samples": None}, "is no list"),
        ({"samples": [3]}, 'lacks "key"'),
        ({"samples": [{"key": "0", "files": {"jpg": [512, True]}}]}, "wanted .offset, bytes"),
        ({"samples": [{"key": "0", "files": {"jpg": [0, 5]}}]}, "outside the tar"),
        ({"samples": [{"key": "0", "files": {"jpg": [512, 10**9]}}]}, "outside the tar"),
        ({"samples": []}, "the tar is empty"),
    ],
)
def test_an_index_of_another_shape_is_refused(
    shard: str, change: dict[str, object], message: str
) -> None:
    write_index(shard)
    path = Path(index_path(shard))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        draw(shard)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\xff", b"{", b"[" * 100_000])
def test_an_index_that_is_no_json_is_refused(shard: str, data: bytes) -> None:
    Path(index_path(shard)).write_bytes(data)
    with pytest.raises(DataError, match="not JSON"):
        draw(shard)
