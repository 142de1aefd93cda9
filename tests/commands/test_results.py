"""What a run says of what it replaces, and of a `--resume` that finds nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwt_fx.artifact.artifact_index import INDEX
from qwt_fx.artifact.output import REPORT
from qwt_fx.commands.results import say_if_nothing_to_resume, say_what_is_replaced
from qwt_fx.commands.screen import Screen

HERE = {"settings": {"w_bits": 6, "seed": 1, "data": {"train_data": "one"}}}


class Recorder(Screen):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def replaced(folder: Path, report: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text("{}")
    if report is not None:
        (folder / REPORT).write_text(report if isinstance(report, str) else json.dumps(report))
    screen = Recorder()
    say_what_is_replaced(folder, HERE, screen)
    return [
        note.removeprefix(f"--output {folder}: replaces the artifact there")
        for note in screen.notes
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"w_bits": 4, "seed": 1}, ", made with w_bits 4, when this run is complete"),
        ({"w_bits": 4, "seed": 2}, ", made with w_bits 4, seed 2, when this run is complete"),
        (HERE["settings"], ", of the same settings, when this run is complete"),
        (
            HERE["settings"] | {"data": {"train_data": "two"}},
            ", of other data, when this run is complete",
        ),
    ],
)
def test_an_artifact_that_makes_way_is_named_with_its_settings(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    assert replaced(tmp_path / "out", {"run": {"settings": settings}}) == [said]


@pytest.mark.parametrize("report", [None, "{", "[]", {"run": None}, {"run": {"settings": 3}}])
def test_an_artifact_without_a_readable_report_is_named_all_the_same(
    tmp_path: Path, report: Any
) -> None:
    assert replaced(tmp_path / "out", report) == [" when this run is complete"]


def test_nothing_is_said_where_no_artifact_is(tmp_path: Path) -> None:
    screen = Recorder()
    say_what_is_replaced(tmp_path, HERE, screen)
    say_what_is_replaced(tmp_path / "none", HERE, screen)
    assert screen.notes == []


def test_a_resume_with_nothing_says_so(tmp_path: Path) -> None:
    screen = Recorder()
    say_if_nothing_to_resume(False, tmp_path / "none", screen)
    (tmp_path / ".lock").touch()
    for folder in (tmp_path / "none", tmp_path):
        say_if_nothing_to_resume(True, folder, screen)
        assert screen.notes.pop() == (
            f"--resume: {folder} holds nothing to go on with: starting anew"
        )
    (tmp_path / "run.json").touch()
    say_if_nothing_to_resume(True, tmp_path, screen)
    assert screen.notes == []
