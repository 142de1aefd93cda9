"""Class names and prompt templates for zero-shot classification, from open_clip or from files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qwt_fx.data import class_map
from qwt_fx.data.class_map import StrPath
from qwt_fx.errors import DataError

PLACEHOLDER = "{}"
DEFAULT_TEMPLATES = ("a photo of a {}.",)
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ClassPrompts:
    """What each class is called.

    Attributes:
        names: name of class k.
        templates: sentences with `{}` where the name goes.
        notes: what was assumed, for the user to read.
        folder_classes: class of the k-th sorted folder; empty where that is class k.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    notes: tuple[str, ...] = ()
    folder_classes: tuple[int, ...] = ()

    @property
    def folders(self) -> int:
        """How many folders the classes have."""
        return len(self.folder_classes) or len(self.names)

    def class_of(self, folder: int) -> int:
        """The class of the sorted folder number `folder`."""
        return self.folder_classes[folder] if self.folder_classes else folder

    @property
    def sentences(self) -> list[str]:
        """The prompts of all classes, class by class."""
        return [sentence for k in range(len(self.names)) for sentence in self.prompts(k)]

    def prompts(self, k: int) -> list[str]:
        """Every template filled with the name of class `k`, in the order of the templates."""
        return [template.replace(PLACEHOLDER, self.names[k]) for template in self.templates]


def load_classnames(path: StrPath) -> list[str]:
    """Class names, one a line.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a blank line between names (names it).
    """
    return _lines(path, "class name")


def load_templates(path: StrPath) -> list[str]:
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
    classnames_file: StrPath | None = None,
    templates_file: StrPath | None = None,
    class_map_file: StrPath | None = None,
) -> ClassPrompts:
    """Names and templates of `classes`.

    Without a file, 1,000 folders are taken for ImageNet's, in the order of their numbers where that
    is what they are called (ImageNet-V2), and any others that are all named by its WordNet ids for
    a part of it (open_clip's names and OpenAI's templates); otherwise the folders' own names are
    used, with one plain template.

    Args:
        classes: folder names, sorted.
        classnames_file, templates_file: as `load_classnames`, `load_templates`.
        class_map_file: as `qwt_fx.data.class_map.folder_indices`; the names are then all those that
            its indices refer to, and only the classes that have a folder are kept.

    Raises:
        DataError: a bad file, no classes, or as many names as there are not folders.
    """
    if not classes:
        raise DataError("no class folders to name, wanted at least one")
    if class_map_file is not None:
        return _mapped(classes, classnames_file, templates_file, class_map_file)
    notes: list[str] = []
    order = class_map.numeric_order(classes)
    if classnames_file is not None:
        imagenet = len(classes) == IMAGENET_CLASSES
        names = _names_from_file(classnames_file, classes)
        if order:
            notes.append(
                f"line k of {os.fspath(classnames_file)} names the k-th folder sorted by letter, "
                f"so line 2 is folder {classes[1]!r}; if the folders' names are the lines' "
                "numbers, give --class-map index"
            )
            order = ()
    elif (part := _imagenet_indices(classes, order, notes)) is not None:
        imagenet = True
        names = [_imagenet_names()[index] for index in part]
    else:
        imagenet, order = False, ()
        names = [folder_caption(folder) for folder in classes]
        notes.append(
            f"class names are the names of the {len(classes)} folders (first: {names[0]!r}); "
            "give --classnames for others"
        )
    templates = _templates(templates_file, imagenet, notes)
    return ClassPrompts(tuple(names), templates, tuple(notes), order)


def _names_from_file(path: StrPath, classes: Sequence[str]) -> list[str]:
    names = load_classnames(path)
    if len(names) != len(classes):
        raise DataError(
            f"{os.fspath(path)}: {len(names)} class names for {len(classes)} class "
            "folders; wanted one a line for each folder, in sorted order"
        )
    return names


def _imagenet_indices(
    classes: Sequence[str], order: tuple[int, ...], notes: list[str]
) -> Sequence[int] | None:
    """ImageNet's index of class k when the folders are taken for ImageNet's, or a part of it."""
    if len(classes) != IMAGENET_CLASSES:
        part = class_map.imagenet_part(classes)
        if part is not None:
            notes.append(
                f"the {len(classes)} folders are a part of ImageNet's; only these classes compete"
            )
        return part
    if order:
        notes.append(
            "the 1,000 folders were taken for ImageNet's in the order of their numbers (as in V2); "
            "if that is wrong, give --classnames"
        )
    elif not all(class_map.WORDNET_ID.fullmatch(folder) for folder in classes):
        notes.append(
            "1,000 class folders were taken for ImageNet's in its order, although not all are "
            f"named like n01440764 (the first is {classes[0]!r}); if that is wrong, give "
            "--classnames"
        )
    return range(IMAGENET_CLASSES)


def _imagenet_names() -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES

    return [str(name) for name in IMAGENET_CLASSNAMES]


def _templates(path: StrPath | None, imagenet: bool, notes: list[str]) -> tuple[str, ...]:
    if path is not None:
        return tuple(load_templates(path))
    if imagenet:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template(PLACEHOLDER) for template in OPENAI_IMAGENET_TEMPLATES)
    notes.append(f"the prompt is {DEFAULT_TEMPLATES[0]!r}; give --templates for others")
    return DEFAULT_TEMPLATES


def _mapped(
    classes: Sequence[str],
    classnames_file: StrPath | None,
    templates_file: StrPath | None,
    class_map_file: StrPath,
) -> ClassPrompts:
    """Classes by a map from folder to index in the list of names; ImageNet's without a file."""
    every = _imagenet_names() if classnames_file is None else load_classnames(classnames_file)
    indices = class_map.folder_indices(class_map_file, classes, len(every))
    kept = sorted(set(indices))
    notes = [f"{len(classes)} folders show {len(kept)} of {len(every)} classes; only these count"]
    templates = _templates(templates_file, classnames_file is None, notes)
    names = tuple(every[index] for index in kept)
    return ClassPrompts(names, templates, tuple(notes), tuple(kept.index(i) for i in indices))


def _lines(path: StrPath, what: str) -> list[str]:
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
