"""The retrieval part of `quantize` and `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.batches.ranks import Ranks
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.commands.screen import Screen
from qwt_fx.data.retrieval_data import RetrievalReader
from qwt_fx.evaluate.retrieval_metrics import FP32, QUANTIZED, pair_features, retrieval_metrics


@dataclass
class Retrieval:
    """Image-caption pairs, read once for all models."""

    reader: RetrievalReader
    device: str | torch.device
    store: FeatureStore
    ranks: Ranks = field(default_factory=Ranks)

    def measure(
        self,
        models: Mapping[str, Mapping[str, nn.Module]],
        towers: Sequence[str],
        screen: Screen,
    ) -> JsonObject:
        """Embed the pairs by every model ("fp32", "quantized"); see `retrieval_metrics`.

        Empty but on the first rank.
        """
        with screen.phase("retrieval: pairs") as update:
            series = self.store.series("pairs")
            features = pair_features(self.reader, models, self.device, update, series, self.ranks)
        if features is None:
            return {}
        for note in self.reader.notes():
            screen.note(f"retrieval: {note}")
        shared = features.counts()["shared_captions"]
        if shared:
            screen.note(
                f"retrieval: {shared} of {len(features.owner)} texts have a caption that another "
                "image has, too; only a text's own image counts, ties count by their chance"
            )
        return retrieval_metrics(features, towers)


def with_retrieval(metrics: JsonObject, retrieval: JsonObject) -> JsonObject:
    """The `metrics` entry of a report with the retrieval part added.

    The embeddings' SQNR stays that of the classification set where there is one.
    """
    merged = {**retrieval, **metrics}
    for side in (FP32, QUANTIZED):
        if side in retrieval:
            merged[side] = retrieval[side] | metrics.get(side, {})
    return merged
