"""Which class each folder of a validation set shows, where that is not simply its sorted place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence

from qwt_fx.errors import DataError

StrPath = str | os.PathLike[str]

BY_NAME = "index"
WORDNET_ID = re.compile(r"n\d{8}")


def numeric_order(folders: Sequence[str]) -> tuple[int, ...]:
    """Place of each sorted folder in the order of their numbers; empty where the two agree.

    ImageNet-V2's folders are `0` to `999`: sorted by letter, `10` comes before `2`, and nearly
    every label would be wrong.
    """
    if not all(re.fullmatch(r"\d{1,9}", folder) for folder in folders):
        return ()
    numbers = [int(folder) for folder in folders]
    if len(set(numbers)) != len(numbers) or numbers == sorted(numbers):
        return ()
    place = {number: k for k, number in enumerate(sorted(numbers))}
    return tuple(place[number] for number in numbers)


def imagenet_part(folders: Sequence[str]) -> tuple[int, ...] | None:
    """ImageNet-1k index of each folder when all are named by its WordNet ids, else `None`.

    So are ImageNet-A, ImageNet-R (200 classes each) and ImageNet-Sketch.
    """
    if not all(WORDNET_ID.fullmatch(folder) for folder in folders):
        return None
    from timm.data import ImageNetInfo

    index = {str(name): k for k, name in enumerate(ImageNetInfo().label_names())}
    if not all(folder in index for folder in folders):
        return None
    return tuple(index[folder] for folder in folders)


def folder_indices(path: StrPath, folders: Sequence[str], classes: int) -> tuple[int, ...]:
    """Class index of each folder, from a class map.

    Args:
        path: JSON `{"FOLDER": index, ...}`, or lines `FOLDER index`; folders that are not there
            may be in it. The word "index": the folders' names are the indices.
        folders: names, sorted.
        classes: how many classes the indices refer to.

    Raises:
        DataError: unreadable, malformed, a folder without an entry, or an index out of range.
    """
    index_of = _by_name(folders) if os.fspath(path) == BY_NAME else _load(path)
    missing = [folder for folder in folders if folder not in index_of]
    if missing:
        raise DataError(
            f"{os.fspath(path)}: no class for {len(missing)} of {len(folders)} folders, the first "
            f"{missing[0]!r}; add them, or remove the folders"
        )
    for folder in folders:
        if not 0 <= index_of[folder] < classes:
            raise DataError(
                f"{os.fspath(path)}: folder {folder!r} has class {index_of[folder]}, wanted 0 to "
                f"{classes - 1}"
            )
    return tuple(index_of[folder] for folder in folders)


def _by_name(folders: Sequence[str]) -> dict[str, int]:
    for folder in folders:
        if not re.fullmatch(r"\d{1,9}", folder):
            raise DataError(
                f"--class-map {BY_NAME}: folder {folder!r} is not named by a number; give a file"
            )
    return {folder: int(folder) for folder in folders}


def _load(path: StrPath) -> dict[str, int]:
    where = os.fspath(path)
    try:
        with open(where, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a zero byte
        raise DataError(f"{where}: cannot be read ({error})") from error
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        for folder, index in value.items():
            if type(index) is not int:  # JSON's true is an int to isinstance
                raise DataError(f"{where}: {folder!r}: got {index!r}, wanted a class index")
        return dict(value)
    index_of: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        folder, _, index = line.strip().rpartition("\t" if "\t" in line else " ")
        if not line.strip():
            continue
        if not folder.strip() or not re.fullmatch(r"\d{1,9}", index.strip()):
            raise DataError(f"{where}: line {number}: got {line!r}, wanted FOLDER INDEX")
        index_of[folder.strip()] = int(index)
    return index_of
