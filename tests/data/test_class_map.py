"""Folders that are not simply the classes in their sorted order."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwt_fx.data.class_map import folder_indices, imagenet_part, numeric_order
from qwt_fx.data.classes import resolve
from qwt_fx.errors import DataError


def test_numbers_without_zeros_in_front_are_put_in_order() -> None:
    folders = sorted(str(i) for i in range(12))
    assert folders[2] == "10"
    order = numeric_order(folders)
    assert [order[folders.index(str(i))] for i in range(12)] == list(range(12))
    assert numeric_order([f"{i:04d}" for i in range(12)]) == ()
    assert numeric_order(["1", "01"]) == numeric_order(["a", "1"]) == ()


def test_imagenet_v2s_folders_have_imagenets_names() -> None:
    folders = sorted(str(i) for i in range(1000))
    prompts = resolve(folders)
    from open_clip import IMAGENET_CLASSNAMES

    for k, folder in enumerate(folders):
        assert prompts.names[prompts.class_of(k)] == IMAGENET_CLASSNAMES[int(folder)]
    assert "order of their numbers" in prompts.notes[0]


def test_a_part_of_imagenet_competes_alone_under_its_names() -> None:
    folders = ["n01443537", "n01484850", "n15075141"]
    prompts = resolve(folders)
    assert prompts.names == ("goldfish", "great white shark", "toilet paper")
    assert len(prompts.templates) == 80
    assert imagenet_part(folders) == (1, 2, 999)
    assert imagenet_part([*folders, "n99999999"]) is None
    assert imagenet_part(["cat"]) is None


@pytest.mark.parametrize("text", ["sketch_a 2\nother\t0\nphoto b 2\nunused 1\n",
                                  '{"sketch_a": 2, "other": 0, "photo b": 2, "unused": 1}'])  # fmt: skip
def test_a_map_keeps_the_classes_that_have_a_folder(tmp_path: Path, text: str) -> None:
    names, path = tmp_path / "names", tmp_path / "map"
    names.write_text("cat\ndog\nowl\n")
    path.write_text(text)
    folders = ["other", "photo b", "sketch_a"]
    prompts = resolve(folders, names, None, path)
    assert prompts.names == ("cat", "owl")
    assert [prompts.names[prompts.class_of(k)] for k in range(3)] == ["cat", "owl", "owl"]
    assert prompts.folders == 3


def test_folders_may_be_the_indices_themselves(tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("\n".join(f"class {i}" for i in range(20)))
    prompts = resolve(["11", "3"], names, None, "index")
    assert [prompts.names[prompts.class_of(k)] for k in range(2)] == ["class 11", "class 3"]
    with pytest.raises(DataError, match="folder 'x' is not named by a number"):
        resolve(["11", "x"], names, None, "index")


def test_names_in_a_file_stay_in_the_sorted_order_and_the_catch_is_said(tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("a\nb\nc\n")
    prompts = resolve(["0", "10", "9"], names)
    assert prompts.class_of(1) == 1
    assert "--class-map index" in prompts.notes[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a 1\n", "no class for 1 of 2 folders, the first 'b'"),
        ("a 1\nb 7\n", "folder 'b' has class 7, wanted 0 to 2"),
        ("a 1\nb\n", "line 2: got 'b', wanted FOLDER INDEX"),
        ('{"a": 1, "b": true}', "got True, wanted a class index"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_map_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        folder_indices(path, ["a", "b"], 3)
