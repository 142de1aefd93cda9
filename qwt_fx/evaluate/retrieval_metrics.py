"""Retrieval with a floating-point and a quantized model, and with one on each side.

Cross-precision retrieval: a gallery is embedded once and searched for years, so that the model of
the queries and that of the gallery need not be the same. The side `quantized_queries` has a gallery
in FP32, the side `fp32_queries` a quantized one. On each side

* `image_retrieval_recall@K`: the queries are texts, the gallery holds images; so the text tower of
  the queries' model meets the image tower of the gallery's;
* `text_retrieval_recall@K`: the reverse;
* `image_self_recall@1`: an image's query embedding finds the very same image among the gallery's
  embeddings: the image tower alone;
* `text_self_recall@1`: the same for distinct captions: the text tower alone.

A figure is `None` where the tower that should be quantized is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.batches.device_memory import embed
from qwt_fx.batches.precision import to_device
from qwt_fx.batches.ranks import Ranks
from qwt_fx.checkpoint.feature_store import Series
from qwt_fx.data.data import Progress
from qwt_fx.data.retrieval_data import RetrievalBatch, RetrievalReader
from qwt_fx.errors import DataError
from qwt_fx.evaluate.evaluate import embedding_sqnr, finite_features, text_features
from qwt_fx.evaluate.retrieval import (
    CROSS_RECALLS,
    CROSS_SIDES,
    IMAGE_RETRIEVAL,
    RETRIEVAL_COUNTS,
    TEXT_RETRIEVAL,
    recall_at,
    retrieval_recalls,
)
from qwt_fx.graph.conditions import plain_conditions

FP32, QUANTIZED = "fp32", "quantized"
# (model of the queries, model of the gallery)
_MODELS = {"quantized_queries": (QUANTIZED, FP32), "fp32_queries": (FP32, QUANTIZED)}


@dataclass(frozen=True)
class PairFeatures:
    """Un-normalized embeddings of retrieval data by model name ("fp32", "quantized"), float32.

    Attributes:
        image: (n, e) for each model.
        text: (m, e) for each model; equal captions have equal rows.
        owner: (m,) int64, the image of each text.
        first: (m,) int64, the first text with the same token ids.
        skipped: samples that could not be decoded.
    """

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    owner: Tensor
    first: Tensor
    skipped: int

    @property
    def distinct(self) -> Tensor:
        """Indices of the texts that are the first of their kind."""
        distinct: Tensor = torch.unique(self.first)
        return distinct

    def counts(self) -> dict[str, int]:
        """The `retrieval` entry of report.json.

        `shared_captions`: texts whose caption another image has, too.
        """
        n = len(self.owner)
        low = torch.full((n,), n).scatter_reduce(0, self.first, self.owner, "amin")
        high = torch.full((n,), -1).scatter_reduce(0, self.first, self.owner, "amax")
        shared = int((low != high)[self.first].sum())
        images = len(next(iter(self.image.values())))
        return dict(zip(RETRIEVAL_COUNTS, (images, n, self.skipped, shared), strict=True))


@plain_conditions()
def pair_features(
    reader: RetrievalReader,
    models: Mapping[str, Mapping[str, nn.Module]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    series: Series | None = None,
    ranks: Ranks | None = None,
) -> PairFeatures | None:
    """Embed retrieval data by every model in one walk.

    Args:
        reader: not iterated yet.
        models: towers "image" and "text" by model name; a tower that two models share runs once.
        device: where the towers are.
        progress: called as progress(images, -1).
        series: keeps each batch, and begins with those that an interrupted run has left.
        ranks: each embeds its batches; the first one gets all of them, the others get `None`.

    Raises:
        DataError: damaged data, too many undecodable samples, or features that are not finite.
    """
    kept = Series(None, "pairs") if series is None else series
    if kept.last is not None:
        reader.tried, reader.skipped = kept.last["read"][0].tolist()
    ranks = ranks or Ranks()

    def embedded() -> Iterator[list[tuple[dict[str, Tensor], int, list[str]]]]:
        for batch in reader.batches(ranks.rank, ranks.world):
            features = _embed(batch, models, device) if len(batch.images) else {}
            yield [(features, batch.tried, batch.messages)]

    with torch.no_grad():
        for features, tried, messages in ranks.in_order(embedded()):
            reader.count(tried, messages)
            if features:
                kept.append(features | {"read": torch.tensor([[reader.tried, reader.skipped]])})
            if progress is not None:
                progress(kept.rows, -1)
    if not ranks.first:
        return None
    reader.judge()
    if not len(kept):
        raise DataError(f"{reader.spec}: holds no image-caption pairs, wanted at least one")
    stacked = kept.stacked()
    first = _first_equal(stacked["identities"])
    captions = stacked["captions"]
    return PairFeatures(
        image={name: stacked[f"{name}.image"] for name in models},
        # Equal captions met in different batches differ in their last bits: take one for all.
        text={name: stacked[f"{name}.text"][first] for name in models},
        owner=torch.arange(len(captions)).repeat_interleave(captions),
        first=first,
        skipped=reader.skipped,
    )


def _embed(
    batch: RetrievalBatch,
    models: Mapping[str, Mapping[str, nn.Module]],
    device: torch.device | str,
) -> dict[str, Tensor]:
    done: dict[int, Tensor] = {}
    features = {"captions": batch.captions, "identities": batch.identities}
    for name, towers in models.items():
        image, text = towers["image"], towers["text"]
        if id(image) not in done:
            done[id(image)] = finite_features(
                embed(image, to_device(batch.images, device)), "image"
            )
        if id(text) not in done:
            done[id(text)] = text_features(text, batch.tokens, device=device)
        # A copy: files do not hold one tensor under two names.
        features |= {
            f"{name}.image": done[id(image)].clone(),
            f"{name}.text": done[id(text)].clone(),
        }
    return features


def _first_equal(identities: Tensor) -> Tensor:
    """(m,) int64 -> (m,) int64: the index of the first equal entry."""
    _, group = torch.unique(identities, return_inverse=True)
    index = torch.arange(len(identities))
    first = torch.full_like(index, len(index)).scatter_reduce(0, group, index, "amin")
    return first[group]


@plain_conditions()
def retrieval_metrics(features: PairFeatures, towers: Sequence[str]) -> JsonObject:
    """The retrieval part of the `metrics` entry of report.json.

    `towers` are the quantized ones. SQNR is in dB, recalls are fractions.
    """
    metrics: JsonObject = {
        name: retrieval_recalls(features.image[name], features.text[name], features.owner)
        for name in features.image
    }
    metrics["retrieval"] = features.counts()
    if {FP32, QUANTIZED} <= set(features.image):
        pairs = {
            tower: (by_model[FP32], by_model[QUANTIZED])
            for tower, by_model in (("image", features.image), ("text", features.text))
        }
        metrics[QUANTIZED]["embedding_sqnr_db"] = embedding_sqnr(pairs, towers)
        metrics["cross_precision"] = {
            side: _cross(features, *_MODELS[side], towers) for side in CROSS_SIDES
        }
    return metrics


def _cross(
    features: PairFeatures, queries: str, gallery: str, towers: Sequence[str]
) -> dict[str, float | None]:
    recalls: dict[str, float | None] = dict.fromkeys(CROSS_RECALLS)
    texts, owner = features.text, features.owner
    images = torch.arange(len(features.image[FP32]))
    # Image retrieval has texts for queries and images in the gallery, text retrieval the reverse.
    in_image_retrieval, in_text_retrieval = (
        ("text", "image") if queries == QUANTIZED else ("image", "text")
    )
    if in_image_retrieval in towers:
        by_text = recall_at(texts[queries], features.image[gallery], owner, images)
        recalls |= {f"{IMAGE_RETRIEVAL}@{k}": value for k, value in by_text.items()}
    if in_text_retrieval in towers:
        by_image = recall_at(features.image[queries], texts[gallery], images, owner)
        recalls |= {f"{TEXT_RETRIEVAL}@{k}": value for k, value in by_image.items()}
    if "image" in towers:
        by_self = recall_at(features.image[queries], features.image[gallery], images, images, (1,))
        recalls["image_self_recall@1"] = by_self[1]
    if "text" in towers:
        rows = features.distinct
        by_self = recall_at(texts[queries][rows], texts[gallery][rows], rows, rows, (1,))
        recalls["text_self_recall@1"] = by_self[1]
    return recalls
