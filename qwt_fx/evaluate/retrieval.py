"""Cross-modal retrieval: recall at K in both directions, as CLIP_benchmark defines and names it.

`image_retrieval_recall@K`: the share of texts whose own image is among the K images most similar to
the text. `text_retrieval_recall@K`: the share of images that have at least one of their own texts
among the K most similar texts. "Own" means the pair in the data: an equal caption of another image
is not one's own.

Ties. Items of exactly equal similarity (equal captions, repeated images) have no order, and an order
by position would reward the data's. A query counts with its probability to be right when the tied
items are put in a uniformly random order, so the recall is the expected one; without ties each query
counts 0 or 1. To make "exactly equal" mean the same for every chunk, thread count and machine,
normalized features are rounded to multiples of 2^-25 and multiplied in float64: every product and
every partial sum is then a multiple of 2^-50 below 2, which float64 holds without rounding. A
similarity moves by about 1e-8, a sixth of float32's own step at 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwt_fx.errors import DataError
from qwt_fx.graph.conditions import plain_conditions

KS = (1, 5, 10)
IMAGE_RETRIEVAL, TEXT_RETRIEVAL = "image_retrieval_recall", "text_retrieval_recall"
RECALLS = tuple(f"{name}@{k}" for name in (IMAGE_RETRIEVAL, TEXT_RETRIEVAL) for k in KS)
CROSS_SIDES = ("quantized_queries", "fp32_queries")
CROSS_RECALLS = (*RECALLS, "image_self_recall@1", "text_self_recall@1")
RETRIEVAL_COUNTS = ("images", "texts", "skipped_samples", "shared_captions")

# Similarities held at once: 32 MB in float64.
_HELD = 1 << 22
_GRID = 2.0**25


@plain_conditions()
def retrieval_recalls(
    image: Tensor, text: Tensor, owner: Tensor, ks: Sequence[int] = KS, held: int = _HELD
) -> dict[str, float]:
    """Recall at each K in both directions, fractions in [0, 1].

    Args:
        image: embeddings (n, e), not normalized.
        text: embeddings (m, e), not normalized.
        owner: (m,) int64, the image of each text; every image has at least one.
        ks: how many of the most similar items count.
        held: similarities computed at once; the result does not depend on it.

    Raises:
        DataError: sizes that do not fit, features that are not finite, or an image without text.
    """
    check_owners(len(image), text, owner)
    images = torch.arange(len(image))
    by_text = recall_at(text, image, owner, images, ks, held)
    by_image = recall_at(image, text, images, owner, ks, held)
    recalls = {f"{IMAGE_RETRIEVAL}@{k}": value for k, value in by_text.items()}
    return recalls | {f"{TEXT_RETRIEVAL}@{k}": value for k, value in by_image.items()}


def check_owners(images: int, text: Tensor, owner: Tensor) -> None:
    """Raise `DataError` unless each text (m, e) has an image, and each of the images a text."""
    if len(text) != len(owner):
        raise DataError(f"retrieval: {len(text)} texts, but {len(owner)} owners")
    counts = torch.bincount(owner, minlength=images)
    if len(counts) != images or not bool((counts > 0).all()):
        raise DataError(f"retrieval: {images} images, but texts of {int((counts > 0).sum())}")


@plain_conditions()
def recall_at(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int] = KS,
    held: int = _HELD,
) -> dict[int, float]:
    """Mean over the queries of "an item of the query's label is among the K most similar".

    Args:
        queries: (q, e), not normalized.
        gallery: (g, e), not normalized.
        query_labels, gallery_labels: (q,) and (g,) int64; each query's label occurs in the gallery.
        ks, held: as `retrieval_recalls`.

    Raises:
        DataError: nothing to look for, or features that are not finite.
    """
    if not len(queries) or not len(gallery):
        raise DataError(f"retrieval: {len(queries)} queries in a gallery of {len(gallery)}")
    left, right = _on_grid(queries), _on_grid(gallery)
    chances: dict[int, list[float]] = {k: [] for k in ks}
    step = max(1, held // len(gallery))
    for begin in range(0, len(left), step):
        scores = left[begin : begin + step] @ right.T
        own = query_labels[begin : begin + step, None] == gallery_labels[None, :]
        best = scores.masked_fill(~own, -2.0).amax(dim=1, keepdim=True)
        ahead = (scores > best).sum(dim=1)
        tied = scores == best
        right_ones, wrong_ones = (tied & own).sum(dim=1), (tied & ~own).sum(dim=1)
        for k in ks:
            chances[k] += _chance(k - ahead, right_ones, wrong_ones).tolist()
    return {k: math.fsum(values) / len(left) for k, values in chances.items()}


def _chance(places: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Probability that one of `right` items is among the first `places` of a random order.

    All (q,) int64; `right` + `wrong` items are ordered at random. Returns (q,) float64.
    """
    missed = torch.ones(len(places), dtype=torch.float64)
    for taken in range(int(places.max().clamp(min=0))):
        left = (right + wrong - taken).clamp(min=1)
        factor = (wrong - taken).clamp(min=0).double() / left.double()
        missed = torch.where(places > taken, missed * factor, missed)
    return 1.0 - missed


def _on_grid(features: Tensor) -> Tensor:
    """Normalized features as float64 multiples of 2^-25."""
    features = features.detach().double().cpu()
    if not bool(torch.isfinite(features).all()):
        raise DataError("retrieval: features are NaN or infinite")
    unit = torch.nn.functional.normalize(features, dim=-1)
    return torch.round(unit * _GRID) / _GRID
