"""Accuracy figures against scikit-learn and direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from qwt_fx.evaluate.evaluate import (
    Features,
    ZeroShot,
    compare,
    image_features,
    text_features,
    zero_shot,
)
from qwt_fx.evaluate.metrics import mcnemar, mean_per_class_recall, paired_drop_interval
from qwt_fx.evaluate.retrieval import recall_at, retrieval_recalls


def test_mean_per_class_recall_is_balanced_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (200,), generator=generator) ** 2  # some classes are empty
    noise = torch.rand(200, generator=generator) < 0.4
    predictions = torch.where(noise, labels.roll(1), labels)
    expected = balanced_accuracy_score(labels.numpy(), predictions.numpy())
    assert mean_per_class_recall(predictions == labels, labels) == pytest.approx(expected)


def test_paired_interval_is_that_of_the_mean_difference() -> None:
    first = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 1, 1]).bool()
    second = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 1, 0]).bool()
    difference = first.double() - second.double()
    half = 1.959963984540054 * float(difference.std(correction=0)) / math.sqrt(10)
    only_first, only_second, _ = mcnemar(first, second)
    low, high = paired_drop_interval(only_first, only_second, 10)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half))


def test_the_paired_test_is_part_of_the_comparison() -> None:
    labels = torch.zeros(8, dtype=torch.long)
    exact = ZeroShot(torch.tensor([0, 0, 0, 0, 0, 0, 0, 1]), *([torch.ones(8) > 0] * 2), labels)
    exact = ZeroShot(exact.predictions, exact.predictions == labels, exact.correct5, labels)
    rounded = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0])
    quantized = ZeroShot(rounded, rounded == labels, exact.correct5, labels)
    features = Features(torch.ones(8, 2), torch.ones(2, 2), labels)
    found = compare(features, features, exact, quantized, ("image",))
    # 6 discordant samples, 5 to 1: 2 * (1 + 6) / 2^6 by the binomial distribution.
    assert found["mcnemar"] == {
        "only_fp32": 5, "only_quantized": 1, "p": pytest.approx(2 * 7 / 64)
    }  # fmt: skip
    assert found["agreement"] == 2 / 8


def test_the_callers_autocast_changes_nothing() -> None:
    """Embeddings, similarities and what is counted of them: in the towers' own precision."""
    generator = torch.Generator().manual_seed(0)
    images, tower = torch.randn(40, 16, generator=generator), torch.nn.Linear(16, 8)
    words, labels = torch.nn.Embedding(50, 8), torch.arange(40)
    text = torch.nn.Sequential(words, torch.nn.Flatten(1), torch.nn.Linear(24, 8))
    ids = torch.randint(0, 50, (40, 3), generator=generator)

    def evaluated() -> list[object]:
        image, _ = image_features(tower, [(images, labels)])
        prompts = text_features(text, ids)
        outcome = zero_shot(Features(image, prompts, labels), 1)
        recalls = retrieval_recalls(image, prompts, labels)
        return [image.tolist(), prompts.tolist(), outcome.predictions.tolist(), recalls,
                recall_at(image, prompts, labels, labels)]  # fmt: skip

    wanted = evaluated()
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluated() == wanted
