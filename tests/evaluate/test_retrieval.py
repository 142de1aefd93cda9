"""Recall at K in both directions, against an independent computation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from qwt_fx.errors import DataError
from qwt_fx.evaluate.retrieval import KS, RECALLS, recall_at, retrieval_recalls


def data(images: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random features; one to four captions an image, in shuffled order, near their image."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(images), rng.integers(1, 5, images)))
    image = rng.standard_normal((images, width))
    text = 0.7 * image[owner] + rng.standard_normal((len(owner), width))
    return torch.tensor(image).float(), torch.tensor(text).float(), torch.tensor(owner)


def by_numpy(image: Tensor, text: Tensor, owner: Tensor, k: int) -> tuple[float, float]:
    """(image_retrieval, text_retrieval) recall at k by sorting the whole matrix, no ties."""
    x, t, own = (a.numpy().astype(np.float64) for a in (image, text, owner))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    t /= np.linalg.norm(t, axis=1, keepdims=True)
    scores = t @ x.T
    images_of = np.argsort(-scores, axis=1)[:, :k]
    texts_of = np.argsort(-scores.T, axis=1)[:, :k]
    image_hits = [own[j] in row for j, row in enumerate(images_of)]
    text_hits = [any(own[j] == i for j in row) for i, row in enumerate(texts_of)]
    return float(np.mean(image_hits)), float(np.mean(text_hits))


@pytest.mark.parametrize("seed", range(4))
def test_recalls_equal_sorting_the_whole_matrix(seed: int) -> None:
    image, text, owner = data(60, seed=seed)
    found = retrieval_recalls(image, text, owner)
    assert tuple(found) == RECALLS
    for k in KS:
        expected = by_numpy(image, text, owner, k)
        got = found[f"image_retrieval_recall@{k}"], found[f"text_retrieval_recall@{k}"]
        assert got == pytest.approx(expected, abs=1e-12)
    assert 0.1 < found["image_retrieval_recall@1"] < found["text_retrieval_recall@5"] < 1.0


def test_the_result_is_the_same_bits_for_every_chunk() -> None:
    image, text, owner = data(50)
    # Repeated rows, so that ties are there to be broken by a rounding that depends on the chunk.
    image, text = image[torch.arange(50) % 20], text[torch.arange(len(text)) % 40]
    whole = retrieval_recalls(image, text, owner)
    for held in (1, 51, 700, 1234):
        assert retrieval_recalls(image, text, owner, held=held) == whole


def by_enumeration(scores: list[int], own: list[bool], k: int) -> float:
    """Share of the orders of tied items in which an own item is among the first k."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return float(np.mean([any(own[i] for i in order[:k]) for order in orders]))


@pytest.mark.parametrize("seed", range(6))
def test_ties_count_by_the_share_of_their_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2 * s] for s in range(3)]))
    scores = rng.integers(0, 3, 6)  # few levels, many ties
    own = rng.permutation([True, True, False, False, False, False])
    gallery = levels[torch.tensor(2 - scores)]  # level 0 is the query itself
    found = recall_at(levels[:1], gallery, torch.tensor([1]), torch.tensor(own).long(), (1, 2, 4))
    for k, value in found.items():
        assert value == pytest.approx(by_enumeration(list(scores), list(own), k), abs=1e-12)


def test_equal_captions_of_two_images_are_no_matches_of_each_other() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # one caption, both images
    found = retrieval_recalls(image, text, torch.tensor([0, 1]), (1, 2))
    assert found["image_retrieval_recall@1"] == found["text_retrieval_recall@1"] == 0.5
    assert found["image_retrieval_recall@2"] == found["text_retrieval_recall@2"] == 1.0


def test_a_small_gallery_is_found_whole() -> None:
    image, text, owner = data(3)
    assert retrieval_recalls(image, text, owner)["image_retrieval_recall@5"] == 1.0


def test_sizes_that_do_not_fit_are_refused() -> None:
    image, text, owner = data(5)
    with pytest.raises(DataError, match="owners"):
        retrieval_recalls(image, text[1:], owner)
    with pytest.raises(DataError, match="6 images, but texts of 5"):
        retrieval_recalls(torch.cat([image, image[:1]]), text, owner)
    with pytest.raises(DataError, match="NaN"):
        retrieval_recalls(image * torch.nan, text, owner)
    with pytest.raises(DataError, match="0 queries"):
        recall_at(image[:0], image, owner[:0], owner)
