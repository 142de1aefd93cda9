"""Zero-shot evaluation: features of both towers once, then every figure from the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwt_fx.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer, class_weights
from qwt_fx.errors import DataError
from qwt_fx.measure import sqnr_db
from qwt_fx.metrics import agreement, topk_correct, wilson_interval
from qwt_fx.trim import trim

Progress = Callable[[int, int], None]


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
    """Per-sample outcome of a zero-shot evaluation: top-1 predictions (n,), correct (n,) bool."""

    predictions: Tensor
    correct1: Tensor
    correct5: Tensor

    @property
    def acc1(self) -> float:
        """Top-1 accuracy, a fraction."""
        return float(self.correct1.double().mean())

    @property
    def acc5(self) -> float:
        """Top-5 accuracy, a fraction."""
        return float(self.correct5.double().mean())

    def to_dict(self) -> dict[str, Any]:
        """The figures of report.json."""
        n = len(self.correct1)
        low, high = wilson_interval(int(self.correct1.sum()), n)
        return {"acc1": self.acc1, "acc1_ci": [low, high], "acc5": self.acc5, "n": n}


def _checked(features: Tensor, what: str) -> Tensor:
    features = features.detach().float().cpu()
    if not bool(torch.isfinite(features).all()):
        raise DataError(f"the {what} tower returned NaN or infinite features")
    return features


def image_features(
    tower: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings (n, e) and labels (n,) of (images, labels) batches, un-normalized.

    Raises `DataError` for features that are not finite or when there is no image.
    """
    features, labels = [], []
    done = 0
    with torch.no_grad():
        for images, batch_labels in batches:
            features.append(_checked(tower(images.to(device)), "image"))
            labels.append(batch_labels)
            done += len(batch_labels)
            if progress is not None:
                progress(done, -1)
    if not features:
        raise DataError("evaluation: no image was found")
    return torch.cat(features), torch.cat(labels)


def text_features(
    tower: nn.Module,
    tokens: Tensor,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Embeddings (p, e) of token ids (p, context), un-normalized.

    A graph that may be given shorter ids gets each batch cut to its longest text (`qwt_fx.trim`).
    """
    features = []
    with torch.no_grad():
        for begin in range(0, len(tokens), batch_size):
            chunk = trim(tower, tokens[begin : begin + batch_size].to(device))
            features.append(_checked(tower(chunk), "text"))
            if progress is not None:
                progress(min(begin + batch_size, len(tokens)), len(tokens))
    return torch.cat(features)


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
    return ZeroShot(torch.cat(predictions), torch.cat(top1), torch.cat(top5))


def compare(
    reference: Features,
    quantized: Features,
    reference_outcome: ZeroShot,
    quantized_outcome: ZeroShot,
    towers: Iterable[str],
) -> dict[str, Any]:
    """Agreement of top-1 predictions, and embedding SQNR in dB of the quantized towers."""
    quantized_towers = set(towers)
    pairs = {
        "image": (reference.image, quantized.image),
        "text": (reference.prompts, quantized.prompts),
    }
    sqnr: dict[str, float | None] = {}
    for tower, (exact, rounded) in pairs.items():
        value = sqnr_db(exact, rounded) if tower in quantized_towers else math.inf
        sqnr[tower] = value if math.isfinite(value) else None
    return {
        "agreement": agreement(reference_outcome.predictions, quantized_outcome.predictions),
        "embedding_sqnr_db": sqnr,
    }
