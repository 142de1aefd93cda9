"""`quantize --resume`: what lies in `DIR.partial/` is taken, not made again.

    calibration/       checkpoints of an unfinished calibration (see `tower_checkpoints`)
    activations/       what `--memory-budget` leaves no room for (see `qwt_fx.batches.value_store`)
    calibrated.json    beside the artifact once that is complete: what the report says of its making
    evaluation/        the embeddings of an interrupted evaluation (see `checkpoint.feature_store`)

Nothing of it is left when the run is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from qwt_fx.artifact.artifact import read_artifact
from qwt_fx.artifact.artifact_index import INDEX
from qwt_fx.artifact.output import write_text_atomic
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.commands.quantize.pipeline import QuantizedClip
from qwt_fx.commands.quantize.tower_checkpoints import TowerCheckpoints
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer

_STATE = "calibrated.json"
_EVALUATION = "evaluation"
_CALIBRATION = "calibration"
ACTIVATIONS = "activations"


class PartialRun:
    """What an interrupted `quantize` left in its working folder, and what this one leaves.

    After a `with` block that succeeds, nothing but the artifact and its report.

    Raises `OutputError` where `resume` finds a run of other settings or data.

    Attributes:
        store: embeddings of the evaluation.
        towers: checkpoints of the calibration.
        known: report entries of the finished calibration; `None` when it is still to be done.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self._folder = folder
        shutil.rmtree(folder / ACTIVATIONS, ignore_errors=True)  # of a run that was killed
        self.store = FeatureStore.open(folder / _EVALUATION, identity["settings"], resume=resume)
        self.towers = TowerCheckpoints(folder / _CALIBRATION)
        self.known: dict[str, Any] | None = None
        # The store was just checked to be this run's: so is the state, which comes after it.
        if (folder / _STATE).is_file() and (folder / INDEX).is_file():
            self.known = json.loads((folder / _STATE).read_text(encoding="utf-8"))

    def keep(self, known: dict[str, Any]) -> None:
        """The artifact is complete: remember what the report says of its making."""
        write_text_atomic(self._folder / _STATE, json.dumps(known) + "\n")
        self.known = known
        self.towers.remove()

    def load(self, towers: tuple[str, ...], device: str) -> QuantizedClip:
        """The calibrated towers; the same bits as before they were saved."""
        artifact = read_artifact(self._folder)
        entry = artifact.extra["classifier"]
        classifier = FLOATING_CLASSIFIER if entry is None else ClassifierQuantizer.from_dict(entry)
        graphs = {name: graph.to(device) for name, graph in artifact.towers.items()}
        return QuantizedClip(graphs, towers, classifier)

    def __enter__(self) -> PartialRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        resumable = self.known is not None or self.towers.any
        if kind is None or not resumable:  # else its settings are still needed
            self.store.__exit__(kind, error, trace)
            self.towers.remove()
        if kind is None:
            (self._folder / _STATE).unlink(missing_ok=True)
