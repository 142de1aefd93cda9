"""Walking a tar: webdataset's grouping, and nothing lost without a word."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from shard_files import pairs, write_tar
from webdataset.tariterators import tarfile_samples

from qwt_fx.data import tar_shard
from qwt_fx.data.samples import ScanCounts
from qwt_fx.data.tar_shard import groups
from qwt_fx.errors import DataError


def walk(path: str) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    return list(groups(path, ScanCounts()))


def test_members_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    names = ["d/0.a.JPG", "d/0.txt", "e/0.jpg", "e/0.txt", "d/0.jpg", "__x__", "__y__/1.jpg", "no"]
    names += ["é/ü.jpg", "long" * 60 + ".jpg", "./1.seg.png", "./1.json"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    theirs = [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in tarfile_samples([{"url": path}])
    ]
    data = Path(path).read_bytes()
    ours = [(key, {e: data[a : a + n] for e, (a, n) in files.items()}) for key, files in walk(path)]
    assert ours == theirs


def test_only_headers_are_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"x" * 50_000) for i in range(20)])
    counts = ScanCounts()
    assert len(list(groups(path, counts))) == 20
    assert counts.bytes_read < 25 * 520


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../outside.jpg"
            tar.addfile(info)
    assert walk(str(path)) == []


def test_every_cut_of_a_tar_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    data = Path(path).read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    cut = tmp_path / "cut.tar"
    for size in [*range(0, end + 1, 64), end + 100]:
        cut.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"cut\.tar"):
            walk(str(cut))
    cut.write_bytes(data[: end + 512])  # one block of zeros is an end
    assert len(walk(str(cut))) == 3


def test_a_cut_off_last_member_is_said_with_its_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs([1]), ("2.jpg", b"x" * 5000)])
    data = Path(path).read_bytes()
    start = data.index(b"xxxx")
    Path(path).write_bytes(data[: start + 1000])
    wanted = rf"'2.jpg' at byte {start} is cut off: it needs 5000 bytes, the file ends after 1000"
    with pytest.raises(DataError, match=wanted):
        walk(path)


def test_a_damaged_header_between_samples_is_said_with_its_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs([1, 2, 3]))
    data = bytearray(Path(path).read_bytes())
    place = data.index(b"000002.txt")
    data[place : place + 4] = b"oops"
    Path(path).write_bytes(data)
    with pytest.raises(DataError, match=rf"damaged after member '000002.png'.* at byte {place}"):
        walk(path)


def test_every_flipped_bit_of_a_header_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs([1, 2]))
    data = Path(path).read_bytes()
    place = data.index(b"000002.png")
    for position in range(place, place + 512, 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        Path(path).write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tar"):
            walk(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"1"), ("0.txt", b"2"), ("0.jpg", b"3")])
    with pytest.raises(DataError, match=r"two members named '0.jpg' in one sample"):
        walk(path)


def test_files_that_are_no_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"the file is empty \(0 bytes\)"):
        walk(str(path))
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(DataError, match="not a readable tar at its start"):
        walk(str(path))
    path.write_bytes(gzip.compress(b"x" * 5000))
    with pytest.raises(DataError, match=r"a compressed file.*name it \.tar\.gz"):
        walk(str(path))
    with pytest.raises(DataError, match="cannot be opened"):
        walk(str(tmp_path))


def test_an_archive_of_nothing_has_no_groups(tmp_path: Path) -> None:
    assert walk(write_tar(tmp_path / "a.tar", [])) == []


def plainly(path: str) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of every regular file as `tarfile` finds them."""
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


ODD = {
    "plain": {},
    "long": {"name": f"{'x' * 90}/{'y' * 90}.jpg"},
    "not ascii": {"name": "ü.jpg"},
    "fraction of a second": {"mtime": 1_700_000_000.25},
    "an owner": {"uname": "ü"},
    "a folder": {"type": tarfile.DIRTYPE, "name": "folder"},
    "a link": {"type": tarfile.SYMTYPE, "linkname": "elsewhere"},
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("odd", ODD)
def test_headers_of_every_kind_are_read_as_tarfile_does(
    tmp_path: Path, odd: str, format: int
) -> None:
    path = str(tmp_path / "a.tar")
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(5):
            info = tarfile.TarInfo(f"{i}.jpg")
            for name, value in ODD[odd].items() if i in (1, 3) else ():
                setattr(info, name, f"{i}/{value}" if name == "name" else value)
            info.size = 700 if info.isreg() else 0
            tar.addfile(info, io.BytesIO(b"x" * 700))
    assert list(tar_shard._members(path, ScanCounts())) == [
        (name, offset, (offset, size)) for name, offset, size in plainly(path)
    ]
