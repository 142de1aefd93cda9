"""Losses at each width: equal to a direct computation, passed on when known, agreement by captions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import Tower, randomize

import qwt_fx
from qwt_fx import QuantConfig, api
from qwt_fx.evaluate.metrics import NearestCaption, first_of_each
from qwt_fx.measure.bit_losses import INPUT, WEIGHT, BitLoss, measure_bits
from qwt_fx.numerics.percentile_search import search
from qwt_fx.numerics.qparams import QuantSpec, fake_quantize_affine

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
CONFIG = QuantConfig(w_bits=4, a_bits=4, recipe="repq-vit")
WIDTHS = {WEIGHT: [4, 8], INPUT: [4, 6]}


@pytest.fixture(scope="module")
def tower() -> Tower:
    return randomize(Tower(2))


def _losses(tower: Tower, **options: object) -> list[BitLoss]:
    prepared = api.prepare(qwt_fx.capture(tower, (X,)), CONFIG)
    return list(measure_bits(prepared, (X,), WIDTHS, **options))


def test_a_weight_loss_is_the_output_error_with_that_weight_alone_rounded(tower: Tower) -> None:
    found = {loss.key: loss for loss in _losses(tower)}
    model = randomize(Tower(2))
    with torch.no_grad():
        exact = model(X)
        weight = model.blocks[0].fc2.weight
        for bits in WIDTHS[WEIGHT]:
            saved = weight.clone()
            scale, zero = search(weight, QuantSpec(bits, ch_axis=0))
            weight.copy_(
                fake_quantize_affine(weight, scale[:, None], zero[:, None], 0, 2**bits - 1)
            )
            error = float((model(X) - exact).square().sum() / exact.square().sum())
            weight.copy_(saved)
            loss = found[("blocks.0.fc2",), WEIGHT, bits]
            assert loss.error == pytest.approx(error, rel=1e-4)
            assert loss.elements == weight.numel()


def test_layers_that_read_one_value_are_one_group_and_wider_is_better(tower: Tower) -> None:
    losses = _losses(tower)
    groups = list(dict.fromkeys(loss.layers for loss in losses))
    assert groups[0] == ("blocks.0.q", "blocks.0.k", "blocks.0.v")
    assert len(groups) == 2 * 4
    by_key = {loss.key: loss.error for loss in losses}
    for layers in groups:
        assert by_key[layers, WEIGHT, 8] < by_key[layers, WEIGHT, 4]
        assert by_key[layers, INPUT, 6] < by_key[layers, INPUT, 4]
        assert (layers, INPUT, 8) not in by_key


def test_fixed_layers_are_left_out_and_known_losses_are_not_measured_again(tower: Tower) -> None:
    losses = _losses(tower)
    known = [replace(loss, error=42.0) for loss in losses[:3]]
    calls = []

    def judge(output: torch.Tensor) -> float:
        calls.append(output.shape)
        return 0.5

    again = _losses(tower, known=known, judge=judge, fixed=lambda name: name == "blocks.1.fc2")
    assert again[:3] == known
    assert all(loss.agreement == 0.5 for loss in again[3:])
    assert len(calls) == len(again) - 3
    assert {loss.layers for loss in losses} - {loss.layers for loss in again} == {("blocks.1.fc2",)}


def test_a_loss_survives_json() -> None:
    loss = BitLoss(("a", "b"), WEIGHT, 4, 12, 0.25, 0.5)
    assert BitLoss.from_dict(loss.to_dict()) == loss


def test_nearest_captions_agree_as_numpy_counts_them() -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    ids = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [7, 8], [9, 9]])
    texts[2], texts[4] = texts[0], texts[1]
    moved = images + rng.normal(size=(7, 5))
    kept = [0, 1, 3, 5, 6]
    assert first_of_each(torch.tensor(ids)).tolist() == kept

    def nearest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        y = y[kept]
        cosine = (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
        return cosine.argmax(axis=1)

    judge = NearestCaption(*(torch.tensor(v) for v in (images, texts, ids)))
    wanted = float((nearest(moved, texts) == nearest(images, texts)).mean())
    assert 0.0 < wanted < 1.0
    assert judge.of_images(torch.tensor(moved)) == pytest.approx(wanted)
    wanted = float((nearest(images, moved) == nearest(images, texts)).mean())
    assert judge.of_texts(torch.tensor(moved)) == pytest.approx(wanted)
    assert judge.of_both(torch.tensor(images), torch.tensor(texts)) == 1.0
