"""What calibration found, step by step, on the disk: a run that was cut off goes on from there.

Calibration is a walk whose every decision follows from results found on data: a range, a rescale, a
fitted layer, a compensation. A journal keeps these results. The run that goes on walks the same way
again: it runs both graphs forward and edits them as before, but takes each known result instead of
finding it. What it computes from there on is what the first run would have computed, bit for bit:
the same operations on the same values, in the same order.

On the disk it is a `checkpoint.resume_folder` with a record a commit. No activations are kept: they
are computed again, and the journal of a whole tower is no larger than its weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

from qwt_fx.artifact.json_values import Json
from qwt_fx.checkpoint.journal_codec import Result, StepResult, decode, encode, settled
from qwt_fx.checkpoint.resume_folder import ResumeFolder
from qwt_fx.errors import ArtifactError, ConfigError, OutputError

_ANEW = "remove it, or leave --resume out, to begin anew"

T = TypeVar("T", bound=Result)


class Journal:
    """A journal that keeps nothing: each result is found."""

    def once(self, step: str, find: Callable[[], T]) -> T:
        """The result of a step: what `find` returns, unless an earlier run knows it.

        step: its name. find: deterministic; returns what a record can hold (`checkpoint.journal_codec`).
        """
        return settled(find())

    def commit(self) -> None:
        """Put the results since the last commit on the disk."""


NO_JOURNAL = Journal()


class StoredJournal(Journal):
    """A journal in a folder; see the module.

    Attributes:
        commits: commits of earlier runs that this one goes on from.
        notes: what the user should know about damaged files.
    """

    def __init__(self, folder: ResumeFolder) -> None:
        files, unusable = folder.records()
        self.commits = len(files)
        self.notes: tuple[str, ...] = ()
        if unusable:
            name = unusable[0].name
            what = "damaged" if int(name[:6]) == len(files) else f"not number {len(files)}"
            self.notes = (f"checkpoint {name[:13]}... is {what}: going on from the one before",)
        for path in unusable:
            path.unlink()
        self._folder = folder
        self._files = deque(files)  # not replayed yet
        self._known: deque[StepResult] = deque()  # of the file being replayed
        self._new: list[StepResult] = []  # not on the disk yet
        self._count = len(files)

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Json]) -> StoredJournal:
        """The journal in a folder, begun or gone on with.

        Args:
            folder: made where missing.
            identity: everything that decides the results.

        A file that is damaged or missing ends what is known; that, and what comes behind it, goes.

        Raises:
            ConfigError: the folder's results were found with something else; names the first.
            OutputError: the folder cannot be written, or something else is in the way.
        """

        def refusal(differs: str) -> ConfigError:
            return ConfigError(
                f"{folder} holds the checkpoint of another calibration: {differs}; {_ANEW}"
            )

        try:
            return cls(ResumeFolder.open(folder, identity, refusal))
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None

    def once(self, step: str, find: Callable[[], T]) -> T:
        """See `Journal`. Raises `ConfigError` where the journal knows another step's result."""
        if not self._known and self._files:
            self._known.extend(_read(self._files.popleft()))
        if not self._known:
            result = settled(find())
            self._new.append((step, result))
            return result
        name, value = self._known.popleft()
        if name != step:
            raise ConfigError(
                f"{self._folder.path}: the checkpoint goes on with {name!r}, this calibration with "
                f"{step!r}; {_ANEW}"
            )
        return cast(T, value)  # the same step, so what it found then

    def commit(self) -> None:
        """See `Journal`. Raises `OutputError` when the disk does not take it."""
        if self._new:
            self._folder.write(self._count, encode(self._new))
            self._count += 1
            self._new.clear()

    def forget(self) -> None:
        """Delete the results; what they were found with stays recorded."""
        self._folder.forget()

    def remove(self) -> None:
        """Delete the folder: the calibration is done."""
        self._folder.remove()


def _read(path: Path) -> list[StepResult]:
    try:
        return decode(path.read_bytes())
    except (OSError, ArtifactError) as error:
        raise OutputError(f"{path}: {error}; {_ANEW}") from None
