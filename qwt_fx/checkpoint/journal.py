"""What calibration found, step by step, on the disk: a run that was cut off goes on from there.

Calibration is a walk whose every decision follows from results found on data: a range, a rescale, a
fitted layer, a compensation. A journal keeps these results. The run that goes on walks the same way
again: it runs both graphs forward and edits them as before, but takes each known result instead of
finding it. What it computes from there on is what the first run would have computed, bit for bit:
the same operations on the same values, in the same order.

    FOLDER/run.json                     what the results were found with
    FOLDER/000000-SHA256.safetensors    the results up to the first commit, and so on

A file is written whole or not at all and carries its digest in its name. No activations are kept:
they are computed again, and the journal of a whole tower is no larger than its weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qwt_fx.artifact.output import write_bytes_atomic, write_text_atomic
from qwt_fx.checkpoint.journal_codec import Step, decode, encode, settled
from qwt_fx.errors import ArtifactError, ConfigError, OutputError

RUN = "run.json"
_FILE = re.compile(r"(\d{6})-([0-9a-f]{64})\.safetensors")
# Also what a run that was killed while it wrote one left.
_OURS = re.compile(rf"{re.escape(RUN)}|\.{re.escape(RUN)}\..+|\.?{_FILE.pattern}(\..+)?")

T = TypeVar("T")


class Journal:
    """A journal that keeps nothing: each result is found."""

    def once(self, step: str, find: Callable[[], T]) -> T:
        """The result of a step: what `find` returns, unless an earlier run knows it.

        step: its name. find: deterministic; returns what a record can hold (`checkpoint.journal_codec`).
        """
        found: T = settled(find())
        return found

    def commit(self) -> None:
        """Put the results since the last commit on the disk."""


NO_JOURNAL = Journal()


class StoredJournal(Journal):
    """A journal in a folder; see the module.

    Attributes:
        commits: commits of earlier runs that this one goes on from.
        notes: what the user should know about damaged files.
    """

    def __init__(self, folder: Path, files: list[Path], notes: tuple[str, ...] = ()) -> None:
        self.commits = len(files)
        self.notes = notes
        self._folder = folder
        self._files = deque(files)  # not replayed yet
        self._known: deque[Step] = deque()  # of the file being replayed
        self._found: list[Step] = []  # not on the disk yet
        self._count = len(files)

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> StoredJournal:
        """The journal in a folder, begun or gone on with.

        Args:
            folder: made where missing.
            identity: JSON values: everything that decides the results.

        A file that is damaged or missing ends what is known; that, and what comes behind it, goes.

        Raises:
            ConfigError: the folder's results were found with something else; names the first.
            OutputError: the folder cannot be written, or something else is in the way.
        """
        held = _held(folder)
        if held is not None and held != identity:
            key = min(k for k in held.keys() | identity.keys() if held.get(k) != identity.get(k))
            raise ConfigError(
                f"{folder} holds the checkpoint of another calibration: {key} is "
                f"{identity.get(key)!r}, there it was {held.get(key)!r}; remove it, or leave "
                "--resume out, to begin anew"
            )
        try:
            if held is None:
                _clear(folder)
                write_text_atomic(folder / RUN, json.dumps(identity, indent=1) + "\n")
            return cls(folder, *_verified(folder))
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None

    def once(self, step: str, find: Callable[[], T]) -> T:
        """See `Journal`. Raises `ConfigError` where the journal knows another step's result."""
        if not self._known and self._files:
            self._known.extend(_read(self._files.popleft()))
        if not self._known:
            found: T = settled(find())
            self._found.append((step, found))
            return found
        name, value = self._known.popleft()
        if name != step:
            raise ConfigError(
                f"{self._folder}: the checkpoint goes on with {name!r}, this calibration with "
                f"{step!r}; remove it, or leave --resume out, to begin anew"
            )
        result: T = value
        return result

    def commit(self) -> None:
        """See `Journal`. Raises `OutputError` when the disk does not take it."""
        if not self._found:
            return
        data = encode(self._found)
        name = f"{self._count:06d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        write_bytes_atomic(self._folder / name, data)
        self._count += 1
        self._found.clear()

    def forget(self) -> None:
        """Delete the results; what they were found with stays recorded."""
        for path in self._folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder: the calibration is done."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _held(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _clear(folder: Path) -> None:
    """Make the folder, or empty it of a journal whose beginning is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if not _OURS.fullmatch(path.name):
            raise OutputError(f"{folder} is in the way and holds {path.name!r}: move it")
        path.unlink()


def _verified(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files up to the first that is missing or damaged; the others are removed."""
    good: list[Path] = []
    notes: list[str] = []
    for path in sorted(p for p in folder.iterdir() if p.name != RUN and _OURS.fullmatch(p.name)):
        if (match := _FILE.fullmatch(path.name)) is None:
            path.unlink()
            continue
        number, sha256 = int(match.group(1)), match.group(2)
        if not notes and number == len(good) and _digest(path) == sha256:
            good.append(path)
            continue
        if not notes:
            what = "damaged" if number == len(good) else f"not number {len(good)}"
            notes.append(f"checkpoint {path.name[:13]}... is {what}: going on from the one before")
        path.unlink()
    return good, tuple(notes)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> list[Step]:
    try:
        return decode(path.read_bytes())
    except (OSError, ArtifactError) as error:
        raise OutputError(
            f"{path}: {error}; remove it, or leave --resume out, to begin anew"
        ) from None
