"""The checkpoints of `quantize` in `DIR.partial/calibration/`: one journal a tower, then the tower.

    TOWER/         the journal of a tower that is being calibrated (`qwt_fx.checkpoint.journal`)
    TOWER.done/    the tower, converted, as an artifact; its journal holds no results from then on

Towers are calibrated one after another, so at most one journal and the towers before it lie there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import GraphModule

from qwt_fx.artifact.artifact import read_artifact, write_artifact
from qwt_fx.artifact.artifact_index import INDEX
from qwt_fx.artifact.json_values import Json
from qwt_fx.artifact.output import sync
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.checkpoint.calibration_identity import calibration_identity
from qwt_fx.checkpoint.journal import NO_JOURNAL, Journal, StoredJournal
from qwt_fx.errors import ArtifactError, OutputError
from qwt_fx.evaluate.classifier import ClassifierQuantizer
from qwt_fx.graph.graph_info import graph_info


@dataclass(frozen=True)
class FinishedTower:
    """A converted tower, the classifier found with it, and the seconds of each phase."""

    graph: GraphModule
    classifier: ClassifierQuantizer | None
    seconds: dict[str, float]


class TowerCheckpoint:
    """The checkpoint of one tower; this one keeps nothing.

    Attributes:
        finished: the tower, where an earlier run finished it.
        journal: what an earlier run found, and what this one finds.
        notes: what the user should know.
    """

    finished: FinishedTower | None = None
    journal: Journal = NO_JOURNAL
    notes: tuple[str, ...] = ()

    def finish(self, tower: FinishedTower) -> None:
        """Keep the tower instead of its journal."""


class StoredTowerCheckpoint(TowerCheckpoint):
    """In a folder. Raises what `StoredJournal.open` raises."""

    def __init__(
        self, folder: Path, name: str, identity: dict[str, Json], device: torch.device
    ) -> None:
        self._name, self._identity = name, identity
        self._done = folder / f"{name}.done"
        # Opened first: it refuses another calibration's folder, and keeps its identity to the end.
        self.journal = self._journal = StoredJournal.open(folder / name, identity)
        self.notes = self._journal.notes
        if (self._done / INDEX).exists():  # written last
            try:
                self.finished = self._read(device)
            except ArtifactError as error:
                self.notes += (f"the finished {name} tower is damaged ({error}): calibrated anew",)

    def _read(self, device: torch.device) -> FinishedTower:
        artifact = read_artifact(self._done)
        if artifact.extra["identity"] != self._identity:
            raise ArtifactError("it belongs to another calibration")
        entry = artifact.extra["classifier"]
        return FinishedTower(
            artifact.towers[self._name].to(device),
            None if entry is None else ClassifierQuantizer.from_dict(entry),
            artifact.extra["seconds"],
        )

    def finish(self, tower: FinishedTower) -> None:
        """See `TowerCheckpoint`. A tower that cannot be stored keeps its journal."""
        if graph_info(tower.graph).unstorable is not None:
            return
        extra = {
            "identity": self._identity,
            "classifier": None if tower.classifier is None else tower.classifier.to_dict(),
            "seconds": tower.seconds,
        }
        try:
            shutil.rmtree(self._done, ignore_errors=True)
            self._done.mkdir()
            write_artifact(self._done, {self._name: tower.graph}, config={}, extra=extra)
            sync(self._done)
        except OSError as error:
            raise OutputError(f"cannot write {self._done}: {error.strerror or error}") from None
        self._journal.forget()


class TowerCheckpoints:
    """The checkpoints of all towers; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def open(
        self, name: str, prepared: GraphModule, batches: DistributedBatches, device: torch.device
    ) -> TowerCheckpoint:
        """The checkpoint of one tower.

        prepared, batches: what will be calibrated on what; several processes that calibrate together
        keep nothing. Raises what `StoredJournal.open` raises.
        """
        if self.folder is None or batches.ranks.world > 1:
            return TowerCheckpoint()
        identity = calibration_identity(prepared, batches)
        return StoredTowerCheckpoint(self.folder, name, identity, device)

    @property
    def any(self) -> bool:
        """Whether there is something to go on from."""
        return self.folder is not None and any(self.folder.rglob("*.safetensors"))

    def remove(self) -> None:
        """Delete the folder: calibration is done, and saved."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
