"""Embeddings batch by batch on the disk, so that an interrupted evaluation goes on where it was.

    FOLDER/run.json                 what is evaluated, on what: another run's batches are not mixed in
    FOLDER/NAME-000000.safetensors  the tensors of the first batch of the series NAME, and so on

A batch is written whole or not at all. Without a folder the batches are kept in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwt_fx.artifact.output import write_text_atomic
from qwt_fx.errors import OutputError

RUN = "run.json"


class Series:
    """Tensors of consecutive batches, all with the same names.

    `rows` is what the first of the names holds in all batches so far.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._folder, self._name = folder, name
        self._batches: list[dict[str, Tensor]] = []
        while folder is not None and (path := self._path(len(self._batches))).exists():
            self._batches.append(_read(path))

    @property
    def kept(self) -> bool:
        """Whether the batches are on the disk."""
        return self._folder is not None

    def __len__(self) -> int:
        return len(self._batches)

    def _path(self, index: int) -> Path:
        assert self._folder is not None  # asked for only where there is one
        return self._folder / f"{self._name}-{index:06d}.safetensors"

    @property
    def rows(self) -> int:
        """Rows of the first tensor over all batches."""
        return sum(len(next(iter(batch.values()))) for batch in self._batches)

    @property
    def last(self) -> dict[str, Tensor] | None:
        """The tensors of the last batch; `None` when there is none."""
        return self._batches[-1] if self._batches else None

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep one more batch. Raises `OutputError` when it cannot be written."""
        batch = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if self._folder is not None:
            path = self._path(len(self._batches))
            partial = path.with_suffix(".partial")
            try:
                save_file(batch, partial)
                os.replace(partial, path)
            except (OSError, SafetensorError) as error:
                raise OutputError(f"cannot write {path}: {error}") from None
        self._batches.append(batch)

    def stacked(self) -> dict[str, Tensor]:
        """Each tensor of all batches, concatenated along the first dimension."""
        names = self._batches[0] if self._batches else {}
        return {name: torch.cat([batch[name] for batch in self._batches]) for name in names}


class FeatureStore:
    """The series of one evaluation; see the module. `folder` is `None` for memory only.

    In a `with` block the folder goes when the block succeeds, and stays for `--resume` when it
    fails and there are batches.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or self.folder is None or not any(self.folder.glob("*.safetensors")):
            self.remove()

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, Any], *, resume: bool) -> FeatureStore:
        """A store in a folder, for the evaluation that the JSON values `run` describe.

        Args:
            folder: made where missing.
            run: everything that decides the embeddings.
            resume: go on with what the folder holds; otherwise that is removed.

        Raises:
            OutputError: something else is in the way, or `resume` finds another run's batches
                (names the first setting that differs).
        """
        held = _held_run(folder)
        if resume and held is not None and held != run:
            key = min(k for k in held.keys() | run.keys() if held.get(k) != run.get(k))
            raise OutputError(
                f"--resume: {folder} holds another evaluation: {key} is {run.get(key)!r}, "
                f"there it was {held.get(key)!r}; leave --resume out to begin anew"
            )
        if not resume or held is None:
            _clear(folder, known=held is not None)
            write_text_atomic(folder / RUN, json.dumps(run, indent=1) + "\n")
        return cls(folder)

    def series(self, name: str) -> Series:
        """The series of that name, with the batches that are there already."""
        return Series(self.folder, name)

    def remove(self) -> None:
        """Delete the folder: the evaluation is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _held_run(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _clear(folder: Path, *, known: bool) -> None:
    """Remove what an earlier evaluation left. Raises `OutputError` where that is not ours."""
    try:
        if not folder.exists():
            return
        if not known and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} is in the way and no evaluation of qwt-fx: move it")
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"cannot remove {folder}: {error.strerror or error}") from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: damaged ({error}); leave --resume out to begin anew") from None
