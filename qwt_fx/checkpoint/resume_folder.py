"""A folder of what a run has found, so that a run that was cut off goes on from there.

    FOLDER/run.json                           the run's identity: all that decides what it finds
    FOLDER/SERIES-000000-SHA256.safetensors   the first record of a series (or .json), and so on

The identity is compared before anything is taken. A record is written whole or not at all and carries
its digest in its name; what a killed writer left is swept. What to do about a record that is damaged
is for those to say who read it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from qwt_fx.artifact.json_values import Json
from qwt_fx.artifact.output import write_bytes_atomic, write_text_atomic
from qwt_fx.errors import OutputError, QwtError

RUN = "run.json"
_RECORD = re.compile(
    r"(?:(?P<series>.+)-)?(?P<number>\d{6})-(?P<sha256>[0-9a-f]{64})\.(?:safetensors|json)"
)
# `write_bytes_atomic` writes `.NAME.XXXXXXXX` first; a killed run leaves it.
_UNFINISHED = re.compile(rf"\.({re.escape(RUN)}|{_RECORD.pattern})\.[^.]+")


class ResumeFolder:
    """See the module; begun by `open` alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(
        cls,
        path: Path,
        identity: Mapping[str, Json],
        refusal: Callable[[str], QwtError],
        *,
        resume: bool = True,
    ) -> ResumeFolder:
        """The folder of a run, begun or gone on with.

        Args:
            path: made where missing.
            identity: everything that decides what the run finds.
            refusal: the error for a folder of another identity, told what differs, such as
                "seed is 2, there it was 1".
            resume: go on with what the folder holds; otherwise that is removed.

        Raises `OutputError` when the folder cannot be written or something else is in the way.
        """
        folder = cls(path)
        held = folder._identity()
        if resume and held is not None and held != identity:
            key = min(k for k in held.keys() | identity.keys() if held.get(k) != identity.get(k))
            raise refusal(f"{key} is {identity.get(key)!r}, there it was {held.get(key)!r}")
        try:
            if held is None or not resume:
                folder._clear(known=held is not None)
                write_text_atomic(path / RUN, json.dumps(identity, indent=1) + "\n")
            for left in filter(lambda entry: _UNFINISHED.fullmatch(entry.name), path.iterdir()):
                left.unlink()
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
        return folder

    def _identity(self) -> dict[str, Json] | None:
        try:
            value = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _clear(self, *, known: bool) -> None:
        """Remove an earlier run; where its identity is not known, only what looks like one."""
        self.path.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self.path.iterdir()]
        own = (RUN, *filter(_RECORD.fullmatch, names), *filter(_UNFINISHED.fullmatch, names))
        if not known and (foreign := set(names) - set(own)):
            raise OutputError(f"{self.path} is in the way and holds {min(foreign)!r}: move it")
        shutil.rmtree(self.path)

    def _records(self) -> list[Path]:
        return sorted(path for path in self.path.glob("*") if _RECORD.fullmatch(path.name))

    def records(self, series: str = "") -> tuple[list[Path], list[Path]]:
        """The records of a series up to the first damaged or missing one, and those from there on."""
        whole: list[Path] = []
        rest: list[Path] = []
        for path in self._records():
            record = _RECORD.fullmatch(path.name)
            if record is None or (record["series"] or "") != series:
                continue
            follows = not rest and int(record["number"]) == len(whole)
            intact = follows and _sha256(path) == record["sha256"]
            (whole if intact else rest).append(path)
        return whole, rest

    def write(
        self, number: int, data: bytes, series: str = "", suffix: str = ".safetensors"
    ) -> None:
        """Keep a record. Raises `OutputError` when the disk does not take it."""
        name = f"{number:06d}-{hashlib.sha256(data).hexdigest()}{suffix}"
        write_bytes_atomic(self.path / (f"{series}-{name}" if series else name), data)

    @property
    def empty(self) -> bool:
        """Whether there is no record."""
        return not self._records()

    def forget(self) -> None:
        """Delete the records; the identity stays."""
        for path in self._records():
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder: the run is done."""
        shutil.rmtree(self.path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
