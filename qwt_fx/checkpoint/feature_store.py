"""Embeddings batch by batch on the disk, so that an interrupted evaluation goes on where it was.

On the disk it is a `checkpoint.resume_folder` with a record a batch. Without a folder the batches are
kept in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qwt_fx.artifact.json_values import Json
from qwt_fx.checkpoint.resume_folder import ResumeFolder
from qwt_fx.errors import OutputError


class Series:
    """Tensors of consecutive batches, all with the same names.

    `rows` is what the first of the names holds in all batches so far.
    """

    def __init__(self, folder: ResumeFolder | None, name: str) -> None:
        self._folder, self._name = folder, name
        self._batches: list[dict[str, Tensor]] = []
        whole, rest = ([], []) if folder is None else folder.records(name)
        try:
            for path in whole:
                self._batches.append(load(path.read_bytes()))
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from None
        if rest:
            raise _damaged(rest[0], f"wanted number {len(whole)} and the SHA-256 of its name")

    @property
    def kept(self) -> bool:
        """Whether the batches are on the disk."""
        return self._folder is not None

    def __len__(self) -> int:
        return len(self._batches)

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
            self._folder.write(len(self), save(batch), self._name)
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

    def __init__(self, folder: ResumeFolder | None = None) -> None:
        self._folder = folder

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or self._folder is None or self._folder.empty:
            self.remove()

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, Json], *, resume: bool) -> FeatureStore:
        """A store in a folder, for the evaluation that `run` describes.

        Args:
            folder: made where missing.
            run: everything that decides the embeddings.
            resume: go on with what the folder holds; otherwise that is removed.

        Raises:
            OutputError: something else is in the way, or `resume` finds another run's batches
                (names the first setting that differs).
        """

        def refusal(differs: str) -> OutputError:
            return OutputError(
                f"--resume: {folder} holds another evaluation: {differs}; "
                "leave --resume out to begin anew"
            )

        return cls(ResumeFolder.open(folder, run, refusal, resume=resume))

    def series(self, name: str) -> Series:
        """The series of that name, with the batches that are there already."""
        return Series(self._folder, name)

    def remove(self) -> None:
        """Delete the folder: the evaluation is done."""
        if self._folder is not None:
            self._folder.remove()


def _damaged(path: Path, why: object) -> OutputError:
    return OutputError(f"{path}: damaged ({why}); leave --resume out to begin anew")
