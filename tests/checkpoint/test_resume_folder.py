"""A folder of a cut-off run: of one identity, without damage, and of nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwt_fx.checkpoint.resume_folder import ResumeFolder
from qwt_fx.errors import ConfigError, OutputError

IDENTITY = {"seed": 1, "data": {"val": "abc"}}


def opened(path: Path, identity: dict = IDENTITY, *, resume: bool = True) -> ResumeFolder:
    return ResumeFolder.open(path, identity, ConfigError, resume=resume)


def texts(folder: ResumeFolder, series: str = "") -> list[str]:
    whole, _ = folder.records(series)
    return [path.read_text() for path in whole]


def test_records_come_back_in_order_and_series_apart(tmp_path: Path) -> None:
    folder = opened(tmp_path / "f")
    for number, text in enumerate(("one", "two")):
        folder.write(number, text.encode())
        folder.write(number, f"loss {text}".encode(), "losses", ".json")
    folder.write(0, b"other", "losses-images")
    again = opened(tmp_path / "f")
    assert texts(again) == ["one", "two"]
    assert texts(again, "losses") == ["loss one", "loss two"]
    assert texts(again, "losses-images") == ["other"]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_from_the_first_damaged_or_missing_record_on_none_is_whole(
    tmp_path: Path, damage: str
) -> None:
    folder = opened(tmp_path / "f")
    for number in range(4):
        folder.write(number, b"%d" % number)
    whole, _ = folder.records()
    if damage == "changed":
        whole[1].write_bytes(b"x")
    else:
        whole[1].unlink()
    good, rest = folder.records()
    assert good == whole[:1]
    assert rest == whole[1 if damage == "changed" else 2 :]


def test_another_identity_is_refused_by_its_first_difference_or_removed(tmp_path: Path) -> None:
    opened(tmp_path / "f").write(0, b"x")
    with pytest.raises(ConfigError, match=r"^seed is 2, there it was 1$"):
        opened(tmp_path / "f", IDENTITY | {"seed": 2, "z": 3})
    assert opened(tmp_path / "f", IDENTITY | {"seed": 2}, resume=False).empty


def test_records_without_an_identity_go_and_other_files_stay(tmp_path: Path) -> None:
    opened(tmp_path / "f").write(0, b"x")
    (tmp_path / "f" / "run.json").unlink()
    assert opened(tmp_path / "f").empty
    (tmp_path / "f" / "run.json").unlink()
    (tmp_path / "f" / "mine").write_text("keep")
    for resume in (False, True):
        with pytest.raises(OutputError, match="is in the way and holds 'mine': move it"):
            opened(tmp_path / "f", resume=resume)
    assert (tmp_path / "f" / "mine").read_text() == "keep"


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    opened(tmp_path / "f").write(0, b"x", "a")
    for name in (".run.json.a1b2", f".a-000001-{'0' * 64}.safetensors.a1b2"):
        (tmp_path / "f" / name).write_bytes(b"half")
    folder = opened(tmp_path / "f")
    assert len(list((tmp_path / "f").iterdir())) == 2
    folder.forget()
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["run.json"]
    folder.remove()
    assert not (tmp_path / "f").exists()
