"""Streams: the same samples as on disk, and every cut noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_files import pairs, write_tar

from qwt_fx.data.samples import ScanCounts
from qwt_fx.data.stream_shard import groups, is_remote, must_stream
from qwt_fx.errors import DataError


def stream(shard: str) -> list[tuple[str, dict[str, bytes]]]:
    return list(groups(shard, ScanCounts()))


def expected(values: range) -> list[tuple[str, dict[str, bytes]]]:
    data = dict(pairs(values))
    return [(f"{v:06d}", {e: data[f"{v:06d}.{e}"] for e in ("png", "txt")}) for v in values]


@pytest.mark.parametrize(
    ("shard", "streamed", "remote"),
    [
        ("a.tar", False, False),
        ("C:\\a.tar", False, False),
        ("a.tar.gz", True, False),
        ("a.TGZ", True, False),
        ("pipe:cat a.tar", True, True),
        ("https://host/a.tar", True, True),
    ],
)
def test_what_must_be_streamed(shard: str, streamed: bool, remote: bool) -> None:
    assert (must_stream(shard), is_remote(shard)) == (streamed, remote)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_hold_what_was_written(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / f"a.tar.{kind}", pairs(range(20)), f"w:{kind}")
    assert stream(path) == expected(range(20))


def test_members_that_cannot_be_used_are_not_held(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", [*pairs([1]), ("000001.npy", b"x" * 5000)], "w:gz")
    assert stream(path)[0][1]["npy"] == b""


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    # Much behind the end of the archive: a writer that is not read to its end fails by SIGPIPE.
    path = write_tar(tmp_path / "a.tar", pairs(range(5)))
    with Path(path).open("ab") as file:
        file.write(b"\0" * 2_000_000)
    counts = ScanCounts()
    assert list(groups(f"pipe:cat '{path}'", counts)) == expected(range(5))
    assert counts.bytes_read == Path(path).stat().st_size


@pytest.mark.filterwarnings("error")
def test_commands_that_fail_are_data_errors(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    for command in (f"cat '{tmp_path}/gone.tar' 2>/dev/null", f"cat '{path}'; exit 3"):
        with pytest.raises(DataError, match="cannot be read as a tar"):
            stream(f"pipe:{command}")


@pytest.mark.parametrize("kind", ["", "gz", "xz"])
def test_every_cut_of_a_stream_is_noticed(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "a", pairs(range(3)), f"w:{kind}" if kind else "w")
    data = Path(path).read_bytes()
    end = len(data) if kind else len(data.rstrip(b"\0")) // 512 * 512 + 512
    cut = tmp_path / f"cut.tar.{kind or 'gz'}"  # a plain tar inside is read, too
    for size in range(0, end, max(end // 40, 1)):
        cut.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"cut\.tar"):
            stream(str(cut))


def test_a_damaged_header_in_a_stream_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(40)))
    data = bytearray(Path(path).read_bytes())
    place = data.index(b"000020.txt")
    data[place : place + 4] = b"oops"
    Path(path).write_bytes(data)
    with pytest.raises(DataError, match=rf"damaged after member '000020.png'.* at byte {place}"):
        stream(f"pipe:cat '{path}'")
