"""Class names and templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwt_fx.data.classes import ClassPrompts, load_classnames, load_templates, resolve
from qwt_fx.errors import DataError


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("data", ["猫\ndog", "猫\r\n dog \r\n\r\n\n", "\ufeff猫\rdog\n"])
def test_names_are_lines(tmp_path: Path, data: str) -> None:
    assert load_classnames(written(tmp_path / "x", data)) == ["猫", "dog"]


def test_separators_inside_a_line_do_not_split_it(tmp_path: Path) -> None:
    assert load_classnames(written(tmp_path / "x", "a\x0cb\u2028c\nd")) == ["a\x0cb\u2028c", "d"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\n\nb\n", "x: line 2 is blank"),
        ("\na\n", "x: line 1 is blank"),
        (" \n\n", "x: empty"),
        (b"caf\xe9", "x: not UTF-8"),
    ],
)
def test_bad_name_files_are_refused_with_the_place(
    tmp_path: Path, data: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_classnames(written(tmp_path / "x", data))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path, "zero\0byte"):
        with pytest.raises(DataError, match="cannot be read"):
            load_classnames(path)


def test_a_template_needs_a_place_for_the_name(tmp_path: Path) -> None:
    path = written(tmp_path / "t", "a {}.\nthe {c}.\n")
    with pytest.raises(DataError, match=r"t: line 2: 'the \{c\}\.' has no \{\}"):
        load_templates(path)


def test_prompts_of_a_class_are_all_its_templates() -> None:
    # Names are put in as they are: braces and percent signs mean nothing.
    prompts = ClassPrompts(("cat", "{0.x} %s"), ("a {}.", "{} or {}"))
    assert prompts.prompts(0) == ["a cat.", "cat or cat"]
    assert prompts.prompts(1) == ["a {0.x} %s.", "{0.x} %s or {0.x} %s"]
    assert prompts.sentences == [
        "a cat.", "cat or cat", "a {0.x} %s.", "{0.x} %s or {0.x} %s"
    ]  # fmt: skip


def test_names_and_templates_from_files(tmp_path: Path) -> None:
    names = written(tmp_path / "names", "cat\ndog\n")
    templates = written(tmp_path / "templates", "a {}.\n")
    assert resolve(["c0", "c1"], names, templates) == ClassPrompts(("cat", "dog"), ("a {}.",))


def test_a_count_that_differs_gives_both_numbers(tmp_path: Path) -> None:
    names = written(tmp_path / "names", "cat\ndog\n")
    with pytest.raises(DataError, match="2 class names for 3 class folders"):
        resolve(["a", "b", "c"], names)


def test_without_files_folders_are_the_names_and_notes_say_so() -> None:
    prompts = resolve(["red_three", "zebra"])
    assert prompts.prompts(0) == ["a photo of a red three."]
    assert [note.split()[0:3] for note in prompts.notes] == [
        ["class", "names", "are"],
        ["the", "prompt", "is"],
    ]


def test_a_thousand_folders_are_imagenets() -> None:
    prompts = resolve([f"n{i:08d}" for i in range(1000)])
    assert prompts.notes == ()
    assert (len(prompts.names), len(prompts.templates)) == (1000, 80)
    assert prompts.prompts(0)[0] == "a bad photo of a tench."
    assert prompts.names[999] == "toilet paper"


def test_a_thousand_folders_of_other_names_are_noted() -> None:
    prompts = resolve(sorted(f"class {i}" for i in range(1000)))
    assert prompts.names[0] == "tench"
    assert "--classnames" in prompts.notes[0]


def test_no_folders_are_refused() -> None:
    with pytest.raises(DataError, match="no class folders"):
        resolve([])
