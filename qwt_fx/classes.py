"""Class names and prompt templates for zero-shot classification, from open_clip or from files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwt_fx.errors import DataError

PLACEHOLDER = "{}"
DEFAULT_TEMPLATES = ("a photo of a {}.",)
IMAGENET_CLASSES = 1000

_WORDNET_ID = re.compile(r"n\d{8}")
Path = str | os.PathLike[str]


@dataclass(frozen=True)
class ClassPrompts:
    """What each class is called.

    Attributes:
        names: name of class k, the k-th sorted folder.
        templates: sentences with `{}` where the name goes.
        notes: what was assumed, for the user to read.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def prompts(self, k: int) -> list[str]:
        """Every template filled with the name of class `k`, in the order of the templates."""
        return [template.replace(PLACEHOLDER, self.names[k]) for template in self.templates]


def load_classnames(path: Path) -> list[str]:
    """Class names, one a line.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a blank line between names (names it).
    """
    return _lines(path, "class name")


def load_templates(path: Path) -> list[str]:
    """Prompt templates, one a line.

    Raises:
        DataError: as `load_classnames`, or a line without `{}` (names it).
    """
    templates = _lines(path, "template")
    for number, template in enumerate(templates, 1):
        if PLACEHOLDER not in template:
            raise DataError(
                f"{os.fspath(path)}: line {number}: {template!r} has no {PLACEHOLDER} where the "
                "class name goes, such as 'a photo of a {}.'"
            )
    return templates


def folder_caption(folder: str) -> str:
    """A folder's name as words."""
    return folder.replace("_", " ").strip() or folder


def resolve(
    classes: Sequence[str],
    classnames_file: Path | None = None,
    templates_file: Path | None = None,
) -> ClassPrompts:
    """Names and templates of `classes`.

    Without a file, 1,000 folders are taken for ImageNet's (open_clip's names and OpenAI's
    templates); otherwise the folders' own names are used, with one plain template.

    Args:
        classes: folder names, sorted.
        classnames_file, templates_file: as `load_classnames`, `load_templates`.

    Raises:
        DataError: a bad file, no classes, or as many names as there are not folders.
    """
    if not classes:
        raise DataError("no class folders to name, wanted at least one")
    notes: list[str] = []
    imagenet = len(classes) == IMAGENET_CLASSES
    if classnames_file is not None:
        names = load_classnames(classnames_file)
        if len(names) != len(classes):
            raise DataError(
                f"{os.fspath(classnames_file)}: {len(names)} class names for {len(classes)} class "
                "folders; wanted one a line for each folder, in sorted order"
            )
    elif imagenet:
        from open_clip import IMAGENET_CLASSNAMES

        names = [str(name) for name in IMAGENET_CLASSNAMES]
        if not all(_WORDNET_ID.fullmatch(folder) for folder in classes):
            notes.append(
                "1,000 class folders were taken for ImageNet's in its order, although not all are "
                f"named like n01440764 (the first is {classes[0]!r}); if that is wrong, give "
                "--classnames"
            )
    else:
        names = [folder_caption(folder) for folder in classes]
        notes.append(
            f"class names are the names of the {len(classes)} folders (first: {names[0]!r}); "
            "give --classnames for others"
        )
    if templates_file is not None:
        templates = load_templates(templates_file)
    elif imagenet:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        templates = [template(PLACEHOLDER) for template in OPENAI_IMAGENET_TEMPLATES]
    else:
        templates = list(DEFAULT_TEMPLATES)
        notes.append(f"the prompt is {templates[0]!r}; give --templates for others")
    return ClassPrompts(tuple(names), tuple(templates), tuple(notes))


def _lines(path: Path, what: str) -> list[str]:
    """Lines of a UTF-8 file, stripped; trailing blank ones dropped, none left blank."""
    where = os.fspath(path)
    try:
        # Not str.splitlines, which also splits at form feeds and Unicode separators; reading as
        # text turns every newline convention into "\n".
        with open(where, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file.read().split("\n")]
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except ValueError as error:  # a path with a zero byte
        raise DataError(f"{where!r}: cannot be read ({error})") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{where}: empty, wanted one {what} a line")
    if "" in lines:
        raise DataError(
            f"{where}: line {lines.index('') + 1} is blank between others, wanted a {what}; a line "
            "stands for a class or a prompt, so none may be skipped"
        )
    return lines
