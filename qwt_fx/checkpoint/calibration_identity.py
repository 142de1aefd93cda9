"""What a calibration is of: everything that decides its results; its journal is opened with that."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch.fx import GraphModule

from qwt_fx.artifact.json_values import Json, plain_dict
from qwt_fx.batches.batch import add_to_digest
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.checkpoint.journal import NO_JOURNAL, Journal, StoredJournal
from qwt_fx.errors import ConfigError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.version import __version__


@contextmanager
def calibration_journal(
    checkpoint: str | PathLike[str] | Journal | None,
    prepared: GraphModule,
    batches: DistributedBatches,
) -> Iterator[Journal]:
    """The journal that `qwt_fx.calibrate` was given, or the one in a folder, removed on success.

    Raises `ConfigError` for a folder where several processes calibrate together.
    """
    if checkpoint is None or isinstance(checkpoint, Journal):
        yield checkpoint or NO_JOURNAL
        return
    if batches.ranks.world > 1:
        raise ConfigError(
            f"checkpoint {checkpoint}: got {batches.ranks.world} processes, wanted one: a calibration "
            "that several processes share keeps no checkpoints yet; leave checkpoint out"
        )
    journal = StoredJournal.open(Path(checkpoint), calibration_identity(prepared, batches))
    for note in journal.notes:
        warnings.warn(note, stacklevel=4)  # the caller of calibrate
    yield journal
    journal.remove()


def calibration_identity(prepared: GraphModule, batches: DistributedBatches) -> dict[str, Json]:
    """Versions, device, each setting, and digests of the graph, its tensors and the batches.

    prepared: what `qwt_fx.prepare` returned, not calibrated yet; batches: those of the only process. The
    number of threads is left out: it changes the last bits of sums, but no result is wrong for it.
    """
    settings = plain_dict(graph_info(prepared).config, "config")
    device = next((str(v.device) for v in prepared.state_dict().values()), "cpu")
    return {
        "qwt-fx version": __version__,
        "torch version": str(torch.__version__),
        "device": device,
        **{f"setting {name}": value for name, value in settings.items()},
        "model": _model_digest(prepared),
        "calibration data": batches.digest(),
    }


def _model_digest(gm: GraphModule) -> str:
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        digest.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n".encode())
    named = [*gm.named_parameters(), *gm.named_buffers()]
    for name, value in sorted(named, key=lambda entry: entry[0]):
        digest.update(name.encode())
        add_to_digest(digest, value)
    return digest.hexdigest()
