"""Output folders and files: nothing half-written ever stands under the final name.

A replacement is two renames: the old folder steps aside, the new one takes its name. What a crash
between the two leaves behind is put right by the next run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from qwt_fx.artifact.artifact_index import INDEX, SCHEMA_KEY
from qwt_fx.artifact.json_values import MAX_BYTES, Json, loads
from qwt_fx.errors import ArtifactError, OutputError

try:
    import fcntl
except ImportError:  # not POSIX: two runs into one folder are not told apart
    fcntl = None  # type: ignore[assignment]

PARTIAL_SUFFIX = ".partial"
REPORT = "report.json"
PREPROCESS = "preprocess.json"  # in an export: its "files" are the others
_ASIDE = ".{}.qwt-fx-replaced"
_MARKER = ".qwt-fx-partial"


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; parents are made. Raises `OutputError`."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OutputError(f"cannot write {path}: {error}") from None
    write_bytes_atomic(path, data)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; parents are made. Raises `OutputError`."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _json_object(path: Path) -> dict[str, Json]:
    """The object in a JSON file of ours; empty for anything else."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        document = loads(path.read_bytes(), path.name)
    except (OSError, ArtifactError):
        return {}
    return document if isinstance(document, dict) else {}


def foreign_entry(folder: Path) -> str | None:
    """The first entry of a folder that is not qwt-fx's own; `None` for a folder of ours.

    Ours are an empty folder, one with nothing but a report, an artifact with its report, and an
    export.
    """
    names = sorted(path.name for path in folder.iterdir())
    index = _json_object(folder / INDEX)
    own = {_MARKER}
    if SCHEMA_KEY in index:
        files = index.get("files")
        own |= {INDEX, REPORT, *(files if isinstance(files, dict) else ())}
    elif {"qwt_fx", "schema"} <= set(_json_object(folder / REPORT)):
        own |= {REPORT}
    exported = _json_object(folder / PREPROCESS)
    files = exported.get("files")
    if "qwt_fx" in exported and isinstance(files, list):
        own |= {PREPROCESS, *(name for name in files if isinstance(name, str))}
    return next((n for n in names if n not in own or (folder / n).is_symlink()), None)


class OutputDirectory:
    """A folder that appears under its name only when the work inside the `with` block succeeded.

    The work lies in `path`, `DIR.partial/`, which is kept on failure. An absent or empty folder and
    an existing artifact, report or export are replaced, anything else only with `force`, and never the
    file system's root, a mount point, the home or current folder or a parent of these.

    Args:
        target: the folder; parents are made, a link is followed.
        force: replace a folder that holds other files. All of it goes.
        resume: keep what an earlier run left in `DIR.partial/`.
        keep_partial: keep `DIR.partial/` on failure.

    Raises:
        OutputError: before any work, when the target must not or cannot be replaced or another
            process is writing it; after it, when the rename fails (the result is then kept).
    """

    def __init__(
        self, target: Path, *, force: bool = False, resume: bool = False, keep_partial: bool = True
    ) -> None:
        try:
            self.target = Path(target).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise OutputError(f"--output {target}: {_reason(error)}") from None
        self.path = self.target.parent / (self.target.name + PARTIAL_SUFFIX)
        self._aside = self.target.parent / _ASIDE.format(self.target.name)
        self._force, self._resume, self._keep_partial = force, resume, keep_partial
        self._lock: int | None = None

    def __enter__(self) -> OutputDirectory:
        try:
            self._check_place()
            self._recover()
            self._check_target()
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._open_partial()
        except OSError as error:
            self._unlock()
            raise OutputError(f"cannot write --output {self.target}: {_reason(error)}") from None
        return self

    def _check_place(self) -> None:
        """Folders that are never replaced, `force` or not."""
        target, here, home = self.target, Path.cwd().resolve(), Path.home().resolve()
        kept = {here, *here.parents, home, *home.parents}
        if not target.name or target in kept or target.is_mount():
            raise OutputError(
                f"--output {target}: the root, a mount point, the home and the current folder and "
                "their parents are never replaced; name a new folder inside it"
            )
        if target.exists() and not target.is_dir():
            raise OutputError(f"--output {target} exists and is not a folder; name another")
        for parent in target.parents:
            if parent.exists() and not parent.is_dir():
                raise OutputError(f"--output {target}: {parent} is not a folder; name another")

    def _check_target(self) -> None:
        if self._force or not self.target.exists():
            return
        foreign = foreign_entry(self.target)
        if foreign is None:
            return
        what = f"also holds {foreign!r}"
        if SCHEMA_KEY not in _json_object(self.target / INDEX):
            what = f"is not a qwt-fx artifact (it holds {foreign!r})"
        raise OutputError(
            f"--output {self.target} exists and {what}; name another folder, "
            "or replace it with --force"
        )

    def _recover(self) -> None:
        """Finish or undo a replacement that was cut off between its two renames."""
        if not self._aside.exists():
            return
        if self.target.exists():
            shutil.rmtree(self._aside)
        else:
            os.rename(self._aside, self.target)

    def _open_partial(self) -> None:
        """Make the working folder, lock it, and find out now whether it can be written."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise OutputError(f"{self.path} is in the way: remove it")
        if self.path.exists() and not (self.path / _MARKER).exists():
            foreign = foreign_entry(self.path)
            if foreign is not None:
                raise OutputError(
                    f"{self.path} is in the way and holds {foreign!r}: move it, or name another "
                    "--output"
                )
        self.path.mkdir(exist_ok=True)
        self._lock = os.open(self.path / _MARKER, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._unlock()
                raise OutputError(f"--output {self.target}: another process writes it") from None
            except OSError:  # a file system without locks
                pass
        if not self._resume:
            for entry in self.path.iterdir():
                if entry.name != _MARKER:
                    _remove(entry)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
            else:
                self._leave()
        finally:
            self._unlock()

    def _leave(self) -> None:
        """After a failure: keep what there is; an empty folder is nothing."""
        kept = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        if not self._keep_partial or kept == [_MARKER]:
            shutil.rmtree(self.path, ignore_errors=True)

    def _commit(self) -> None:
        try:
            sync(self.path)
            if self.target.exists():
                # Checked again: hours may have passed, and what came since is not ours to delete.
                self._check_target()
                os.rename(self.target, self._aside)
            try:
                os.rename(self.path, self.target)
            except OSError:
                if self._aside.exists():
                    os.rename(self._aside, self.target)
                raise
            # After the rename: until then the marker says whose folder this is.
            (self.target / _MARKER).unlink(missing_ok=True)
            _sync_folder(self.target.parent)
        except OSError as error:
            raise OutputError(
                f"cannot replace {self.target}: {_reason(error)}; the result is in {self.path}"
            ) from None
        except OutputError as error:
            raise OutputError(f"{error}; the result is in {self.path}") from None
        shutil.rmtree(self._aside, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(folder: Path) -> None:
    """Put a folder's files on the disk before its name says that they are complete."""
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
