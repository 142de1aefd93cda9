"""open_clip's csv."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwt_fx.data.imagefolder import read_csv
from qwt_fx.data.samples import FilePair
from qwt_fx.errors import DataError


def read(path: Path, data: bytes) -> list[FilePair]:
    path.write_bytes(data)
    return list(read_csv(str(path)))


def test_relative_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    data = "\ufefftitle\tid\tfilepath\r\na cat, grey\t1\timg/a.jpg\r\n犬\t2\t/b.jpg\r\n".encode()
    assert read(tmp_path / "x.csv", data) == [
        FilePair(str(tmp_path / "img/a.jpg"), "a cat, grey"),
        FilePair("/b.jpg", "犬"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no column 'filepath'"),
        (b"filepath,title\na,b\n", "no column 'filepath' .got 'filepath,title'"),
        (b"filepath\ttitle\n", "no rows"),
        (b"filepath\ttitle\na\tb\nc\n", "line 3 lacks"),
        (b"filepath\ttitle\na\tcaf\xe9\n", "not UTF-8"),
        (b"filepath\ttitle\na\t" + b"x" * 200_000 + b"\n", "not tab-separated"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.csv", data)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/gone.csv", str(tmp_path), "zero\0byte"):
        with pytest.raises(DataError, match="cannot be read"):
            list(read_csv(path))
