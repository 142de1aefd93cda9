"""Output folders and files: nothing half-written ever stands under the final name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from qwt_fx.errors import OutputError

PARTIAL_SUFFIX = ".partial"
_ASIDE_SUFFIX = ".replaced"
_REPORT = "report.json"


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all; parents are made. Raises `OutputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None


def is_ours(folder: Path) -> bool:
    """Whether a folder is an artifact, or holds nothing but a report."""
    if [p.name for p in folder.iterdir()] == [_REPORT]:
        return True
    try:
        document = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "qwt_fx_artifact" in document


class OutputDirectory:
    """A folder that appears under its name only when the work inside the `with` block succeeded.

    The work lies in `DIR.partial/`, which is kept on failure. An absent or empty folder and an
    existing artifact are replaced; anything else needs `force`. Raises `OutputError` before any
    work when the target must not or cannot be replaced.
    """

    def __init__(self, target: Path, *, force: bool = False) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.with_name(self.target.name + PARTIAL_SUFFIX)
        self._aside = self.target.with_name(self.target.name + _ASIDE_SUFFIX)
        self._force = force

    def __enter__(self) -> OutputDirectory:
        self._recover()
        self._check_target()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir()
            # A folder that cannot be written is found now, not after hours of work.
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OutputError(f"cannot write --output {self.target}: {error.strerror}") from None
        return self

    def _recover(self) -> None:
        """Finish or undo a replacement that was cut off between its two renames."""
        if not self._aside.exists() or not is_ours_or_empty(self._aside):
            return
        if self.target.exists():
            shutil.rmtree(self._aside)
        else:
            os.rename(self._aside, self.target)

    def _check_target(self) -> None:
        target = self.target
        here, home = Path.cwd(), Path.home()
        if (
            target.name == ""
            or target in (here, home, *here.parents, *home.parents)
            or target.is_mount()
        ):
            raise OutputError(f"--output {target}: will not replace this folder; name a new one")
        if target.is_symlink():
            raise OutputError(f"--output {target} is a link; name the folder itself")
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(f"--output {target} exists and is not a folder; name another")
        if not self._force and not is_ours_or_empty(target):
            raise OutputError(
                f"--output {target} exists and is not a qwt-fx artifact; "
                "name another folder, or replace it with --force"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        try:
            if self.target.exists():
                if self._aside.exists():
                    raise OutputError(f"{self._aside} is in the way; remove it")
                os.rename(self.target, self._aside)
            os.rename(self.path, self.target)
        except OSError as failure:
            raise OutputError(
                f"cannot replace {self.target}: {failure.strerror}; the result is in {self.path}"
            ) from None
        shutil.rmtree(self._aside, ignore_errors=True)


def is_ours_or_empty(folder: Path) -> bool:
    """Whether a folder may be replaced without asking."""
    return folder.is_dir() and (not any(folder.iterdir()) or is_ours(folder))
