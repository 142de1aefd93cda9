from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qwt_fx.numerics.histogram import Histogram
from qwt_fx.numerics.product_search import (
    ProbabilityRange,
    balanced_ranges,
    choose_balance,
    least_error,
    probability_ranges,
    product_errors,
)
from qwt_fx.numerics.qparams import AFFINE, LOG_SQRT2, QuantSpec
from qwt_fx.numerics.range_search import Range
from qwt_fx.numerics.split_histogram import SplitHistogram

SPEC = QuantSpec(4)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def _split(rows: Tensor) -> SplitHistogram:
    halves = [Histogram(rows.shape[1]) for _ in range(2)]
    for half, part in zip(halves, (rows[::2], rows[1::2]), strict=True):
        half.add(part)
    return SplitHistogram(*halves)


def _quantized(x: Tensor, found: Range) -> Tensor:
    codes = (x / found.scale).round() + found.zero_point
    return (codes.clamp(0, SPEC.quant_max) - found.zero_point) * found.scale


def _error_of_scores(q: Tensor, k: Tensor, *, balanced: bool) -> float:
    """Mean squared error of scores less their mean over the keys, computed as a model would."""
    counted = (_split(q), _split(k))
    balance = None
    if balanced:
        balance = choose_balance(*counted, (SPEC, SPEC), STRENGTHS, shifts=True)
        moved = (q.double() / balance.scale, k.double() * balance.scale - balance.shift)
    else:
        moved = (q.double(), k.double())
    ranges = balanced_ranges(*counted, (SPEC, SPEC), balance)
    rounded = [_quantized(x, r) for x, r in zip(moved, ranges, strict=True)]

    def scores(a: Tensor, b: Tensor) -> Tensor:
        product = a.double() @ b.double().T
        return product - product.mean(dim=1, keepdim=True)

    exact = scores(q, k)
    if balanced:  # the move alone changes no score, but for what all keys share
        torch.testing.assert_close(scores(*moved), exact, rtol=1e-6, atol=1e-6)
    return float((scores(*rounded) - exact).square().mean())


def test_a_planted_difference_between_queries_and_keys_costs_nothing() -> None:
    q, k = torch.randn(400, 16), torch.randn(400, 16)
    factor = torch.logspace(-1.5, 1.5, 16)
    plain = _error_of_scores(q, k, balanced=True)
    planted = _error_of_scores(q * factor, k / factor, balanced=True)
    assert planted == pytest.approx(plain, rel=0.15)
    assert _error_of_scores(q * factor, k / factor, balanced=False) > 20 * planted


def test_what_all_keys_share_costs_nothing() -> None:
    q, k = torch.randn(400, 16), torch.randn(400, 16)
    offset = torch.linspace(-20.0, 20.0, 16)
    plain = _error_of_scores(q, k, balanced=True)
    assert _error_of_scores(q, k + offset, balanced=True) == pytest.approx(plain, rel=0.15)
    assert _error_of_scores(q, k + offset, balanced=False) > 20 * plain


def test_channels_that_never_vary_are_no_obstacle() -> None:
    q, k = torch.randn(100, 4), torch.randn(100, 4)
    q[:, 0], k[:, 1], k[:, 2] = 0.0, 3.0, 0.0
    assert np.isfinite(_error_of_scores(q, k, balanced=True))


def _oracle(p: np.ndarray, v: np.ndarray, scheme: str, scale: float) -> float:
    if scheme == AFFINE:
        rounded = np.clip(np.rint(p / scale), 0, 15) * scale
    else:
        codes = np.clip(np.rint(-2.0 * np.log2(np.maximum(p, 1e-300) / scale)), 0, 15)
        rounded = np.where(codes == 15, 0.0, scale * 2.0 ** (-codes / 2.0))
    return float((((rounded - p) @ v) ** 2).sum())


def search_probabilities(
    samples: list[tuple[torch.Tensor, torch.Tensor]], spec: QuantSpec, schemes: list[str]
) -> ProbabilityRange:
    candidates = probability_ranges(max(float(p.max()) for p, _ in samples), spec, schemes)
    errors = [product_errors(p, v, candidates, spec) for p, v in samples]
    return least_error(candidates, torch.stack(errors).sum(0))


@pytest.mark.parametrize("sharpness", [0.02, 1.0, 6.0])
def test_probabilities_get_the_scheme_and_scale_of_the_least_error_of_their_product(
    sharpness: float,
) -> None:
    p = torch.softmax(sharpness * torch.randn(2, 3, 20, 20), dim=-1)
    v = torch.randn(2, 3, 20, 8)
    halves = [(p[:1], v[:1]), (p[1:], v[1:])]
    found = {s: search_probabilities(halves, SPEC, [s]) for s in (AFFINE, LOG_SQRT2)}
    largest = float(p.max())
    for scheme, best in found.items():
        exact = _oracle(p.double().numpy(), v.double().numpy(), scheme, float(best.scale))
        assert best.error == pytest.approx(exact, rel=2e-2)
        # A range that ends at the largest probability is among the candidates, and no better.
        whole = largest / (15 if scheme == AFFINE else 1)
        at_most = _oracle(p.double().numpy(), v.double().numpy(), scheme, whole)
        assert best.error <= at_most * 1.02
    both = search_probabilities(halves, SPEC, [LOG_SQRT2, AFFINE])
    assert both == min(found.values(), key=lambda f: f.error)
    # Nearly even probabilities want uniform steps, sharp ones steps that grow.
    if sharpness == 0.02:
        assert both.scheme == AFFINE
    if sharpness == 1.0:
        assert both.scheme == LOG_SQRT2


def test_probabilities_of_zero_have_a_scale() -> None:
    found = search_probabilities([(torch.zeros(1, 2, 2), torch.ones(1, 2, 3))], SPEC, [AFFINE])
    assert float(found.scale) > 0.0
    assert replace(found, error=0.0).error == found.error
