"""Zero-shot evaluation: features of both towers once, then every figure from the features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.batches.device_memory import embed
from qwt_fx.batches.precision import to_device
from qwt_fx.batches.ranks import Ranks
from qwt_fx.checkpoint.feature_store import Series
from qwt_fx.data.data import Progress
from qwt_fx.data.imagefolder import ImageFolderData
from qwt_fx.errors import DataError
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer, class_weights
from qwt_fx.evaluate.metrics import (
    agreement,
    mcnemar,
    mean_per_class_recall,
    paired_drop_interval,
    topk_correct,
    wilson_interval,
)
from qwt_fx.graph.conditions import plain_conditions
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.text.text_length import trim


@dataclass(frozen=True)
class Features:
    """Un-normalized embeddings of an evaluation set, on the CPU in float32.

    image (n, e), prompts (classes * templates, e), labels (n,) int64.
    """

    image: Tensor
    prompts: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ZeroShot:
    """Per-sample outcome of a zero-shot evaluation.

    predictions, labels (n,) int64; correct1, correct5 (n,) bool.
    """

    predictions: Tensor
    correct1: Tensor
    correct5: Tensor
    labels: Tensor

    @property
    def acc1(self) -> float:
        """Top-1 accuracy, a fraction."""
        return float(self.correct1.double().mean())

    @property
    def acc5(self) -> float:
        """Top-5 accuracy, a fraction."""
        return float(self.correct5.double().mean())

    def to_dict(self) -> JsonObject:
        """The figures of report.json."""
        n = len(self.correct1)
        low, high = wilson_interval(int(self.correct1.sum()), n)
        return {
            "acc1": self.acc1,
            "acc1_ci": [low, high],
            "acc5": self.acc5,
            "mean_per_class_recall": mean_per_class_recall(self.correct1, self.labels),
            "n": n,
        }


def finite_features(features: Tensor, what: str) -> Tensor:
    """Features on the CPU in float32. Raises `DataError` where they are not finite."""
    features = features.detach().float().cpu()
    if not bool(torch.isfinite(features).all()):
        raise DataError(f"the {what} tower returned NaN or infinite features")
    return features


@plain_conditions()
def image_features(
    tower: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    series: Series | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings (n, e) and labels (n,) of (images, labels) batches, un-normalized.

    `series` keeps each batch, and begins with those that an interrupted run has left. Each of the
    `ranks` embeds its batches; the first one gets all of them, the others get none. Raises
    `DataError` for features that are not finite or when there is no image.
    """
    kept = Series(None, "images") if series is None else series
    ranks = ranks or Ranks()

    def embedded() -> Iterator[list[tuple[Tensor, Tensor]]]:
        for images, labels in _from(batches, len(kept) + ranks.rank, ranks.world):
            yield [(finite_features(embed(tower, to_device(images, device)), "image"), labels)]

    with torch.no_grad():
        for features, labels in ranks.in_order(embedded()):
            kept.append({"features": features, "labels": labels})
            if progress is not None:
                progress(kept.rows, -1)
    if not ranks.first:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    if not len(kept):
        raise DataError("evaluation: no image was found")
    stacked = kept.stacked()
    return stacked["features"], stacked["labels"]


def _from(
    batches: Iterable[tuple[Tensor, Tensor]], first: int, step: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Every `step`-th batch from number `first` on, without reading the others where that can be."""
    if isinstance(batches, ImageFolderData):
        return batches.starting_at(first, step)
    return itertools.islice(batches, first, None, step)


@plain_conditions()
def text_features(
    tower: nn.Module,
    tokens: Tensor,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    series: Series | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Embeddings (p, e) of token ids (p, context), un-normalized; the rest as `image_features`.

    A graph that may be given shorter ids gets each batch cut to its longest text (`text.text_length`).
    """
    kept = Series(None, "texts") if series is None else series
    ranks = ranks or Ranks()
    begins = range(len(kept) * batch_size, len(tokens), batch_size)[ranks.rank :: ranks.world]

    def embedded() -> Iterator[list[Tensor]]:
        for begin in begins:
            chunk = trim(tower, tokens[begin : begin + batch_size].to(device))
            yield [finite_features(embed(tower, chunk), "text")]

    with torch.no_grad():
        for features in ranks.in_order(embedded()):
            kept.append({"features": features})
            if progress is not None:
                progress(kept.rows, len(tokens))
    return kept.stacked()["features"] if ranks.first else torch.empty(0, 0)


@plain_conditions()
def zero_shot(
    features: Features,
    templates: int,
    classifier: ClassifierQuantizer = FLOATING_CLASSIFIER,
    chunk: int = 4096,
) -> ZeroShot:
    """Classify every image by the nearest class embedding.

    Raises `DataError` when the prompts are not a multiple of the templates.
    """
    if len(features.prompts) % templates:
        raise DataError(f"{len(features.prompts)} prompts are no multiple of {templates} templates")
    weights = class_weights(features.prompts, templates)
    predictions, top1, top5 = [], [], []
    for begin in range(0, len(features.image), chunk):
        logits = classifier.logits(features.image[begin : begin + chunk], weights)
        labels = features.labels[begin : begin + chunk]
        predictions.append(logits.argmax(dim=1))
        top1.append(predictions[-1] == labels)
        top5.append(topk_correct(logits, labels, 5))
    return ZeroShot(torch.cat(predictions), torch.cat(top1), torch.cat(top5), features.labels)


@plain_conditions()
def compare(
    reference: Features,
    quantized: Features,
    reference_outcome: ZeroShot,
    quantized_outcome: ZeroShot,
    towers: Iterable[str],
) -> JsonObject:
    """Agreement of top-1 predictions, the paired test, embedding SQNR in dB of quantized towers."""
    worse, better, p = mcnemar(reference_outcome.correct1, quantized_outcome.correct1)
    drop = paired_drop_interval(worse, better, len(reference_outcome.correct1))
    pairs = {
        "image": (reference.image, quantized.image),
        "text": (reference.prompts, quantized.prompts),
    }
    return {
        "agreement": agreement(reference_outcome.predictions, quantized_outcome.predictions),
        "mcnemar": {"only_fp32": worse, "only_quantized": better, "p": p},
        "acc1_drop_ci": list(drop),
        "embedding_sqnr_db": embedding_sqnr(pairs, towers),
    }


@plain_conditions()
def embedding_sqnr(
    pairs: Mapping[str, tuple[Tensor, Tensor]], towers: Iterable[str]
) -> dict[str, float | None]:
    """SQNR in dB of (exact, rounded) embeddings by tower; `None` where not quantized or equal."""
    values = {t: sqnr_db(*pairs[t]) if t in set(towers) else math.inf for t in pairs}
    return {tower: value if math.isfinite(value) else None for tower, value in values.items()}
