"""Figures that describe an evaluation: accuracy, intervals, paired tests, agreement, SQNR."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the k largest logits. logits (n, c), labels (n,) -> bool (n,)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1)


def mean_per_class_recall(correct: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the share of their samples that are correct.

    correct (n,) bool, labels (n,) int64; a class without samples does not count (scikit-learn's
    balanced accuracy, CLIP_benchmark's name).
    """
    counts = torch.bincount(labels)
    hits = torch.bincount(labels, weights=correct.double())
    seen = counts > 0
    return float((hits[seen] / counts[seen]).mean()) if bool(seen.any()) else math.nan


def paired_drop_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of first accuracy - second accuracy on the same n samples (Wald).

    From the discordant pairs alone, as `mcnemar` counts them.
    """
    difference = (only_first - only_second) / n
    variance = (only_first + only_second - (only_first - only_second) ** 2 / n) / n**2
    half = _Z95 * math.sqrt(max(variance, 0.0))
    return difference - half, difference + half


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    scale = 1.0 + _Z95**2 / n
    centre = (p + _Z95**2 / (2 * n)) / scale
    half = _Z95 * math.sqrt(p * (1.0 - p) / n + _Z95**2 / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Paired comparison of two classifiers on the same samples (McNemar's test).

    `first`, `second`: bool (n,), whether each sample was classified correctly. Returns the number
    only the first got right, the number only the second did, and the two-sided exact binomial
    p-value.
    """
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 0, 0, 1.0
    log_half = n * math.log(0.5)
    terms = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half
        for i in range(k + 1)
    )
    return only_first, only_second, min(1.0, 2.0 * math.fsum(map(math.exp, terms)))


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of samples on which two predictions, (n,) int64, are the same."""
    return float((first == second).double().mean()) if len(first) else math.nan


def normalized(features: Tensor) -> Tensor:
    """Features divided by their L2 norm along the last dimension."""
    return torch.nn.functional.normalize(features, dim=-1)


def first_of_each(ids: Tensor) -> Tensor:
    """Indices of the first row of each different text. ids (n, context) int64 -> (m,) int64."""
    _, inverse = torch.unique(ids, dim=0, return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    fresh = torch.ones(len(order), dtype=torch.bool, device=ids.device)
    fresh[1:] = inverse[order][1:] != inverse[order][:-1]
    return order[fresh].sort().values


class NearestCaption:
    """Judges embeddings by the floating-point model's nearest captions.

    images (n, e), texts (n, e) float32, the floating-point embeddings of n pairs; ids (n, context)
    their token ids: of equal captions the first counts.
    """

    def __init__(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        self._kept = first_of_each(ids)
        self._images, self._texts = images, texts
        self._exact = self._nearest(images, texts)

    def _nearest(self, images: Tensor, texts: Tensor) -> Tensor:
        gallery = normalized(texts.float())[self._kept]
        return (normalized(images.float()) @ gallery.T).argmax(dim=1)

    def of_images(self, images: Tensor) -> float:
        """Share of the images that keep their caption, the captions' embeddings being exact."""
        return agreement(self._exact, self._nearest(images, self._texts))

    def of_texts(self, texts: Tensor) -> float:
        """Share of the images that keep their caption, their own embeddings being exact."""
        return agreement(self._exact, self._nearest(self._images, texts))

    def of_both(self, images: Tensor, texts: Tensor) -> float:
        """Share of the images that keep their caption."""
        return agreement(self._exact, self._nearest(images, texts))
