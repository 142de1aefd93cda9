from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwt_fx.config.layer_settings import STRENGTHS
from qwt_fx.numerics.histogram import Histogram
from qwt_fx.numerics.qparams import QuantSpec, fake_quantize_affine
from qwt_fx.numerics.range_search import search_range
from qwt_fx.numerics.rescale_search import Rescale, choose_rescale
from qwt_fx.numerics.split_histogram import SplitHistogram

CHANNELS = 48
WEIGHTS = [torch.ones(1, CHANNELS)]


def _histogram(x: Tensor) -> Histogram:
    histogram = Histogram(x.shape[1])
    histogram.add(x)
    return histogram


def _samples(count: int, seed: int, rows: int = 50) -> Tensor:
    """Rows (count * rows, CHANNELS) that hardly differ within a sample, as attention's output does."""
    generator = torch.Generator().manual_seed(seed)
    each = torch.randn(count, 1, CHANNELS, generator=generator)
    each *= torch.linspace(0.2, 2.0, CHANNELS)
    within = 0.01 * torch.randn(count, rows, CHANNELS, generator=generator)
    return (each + within).flatten(0, 1) + torch.linspace(-3.0, 3.0, CHANNELS)


def _chosen(
    first: Tensor, second: Tensor | None = None, bits: int = 8
) -> tuple[SplitHistogram, Rescale]:
    values = SplitHistogram(_histogram(first), _histogram(first[:0] if second is None else second))
    return values, choose_rescale(values, WEIGHTS, QuantSpec(bits), 8, STRENGTHS, shifts=True)


def _error(x: Tensor, values: SplitHistogram, chosen: Rescale, bits: int = 8) -> float:
    """Mean squared error of new values x, as the rescale and range of these halves quantize them."""
    importance = [chosen.scale.square()] * len(chosen.apart)
    spec = QuantSpec(bits)
    found = search_range(values.mass(importance, chosen.apart), spec)
    moved = (x / chosen.scale - chosen.shift).float()
    limits = (spec.quant_min, spec.quant_max)
    again = fake_quantize_affine(moved, found.scale, found.zero_point, *limits)
    return float(((again - moved).double() * chosen.scale).square().mean())


def test_whole_is_the_histogram_of_all_rows() -> None:
    x = _samples(6, seed=0)
    whole, direct = SplitHistogram(_histogram(x[:100]), _histogram(x[100:])).whole, _histogram(x)
    assert torch.equal(whole.counts, direct.counts)
    assert torch.equal(whole.low, direct.low)
    assert torch.equal(whole.high, direct.high)
    assert whole.rows == direct.rows == len(x)
    torch.testing.assert_close(whole.variance, direct.variance, rtol=1e-4, atol=1e-8)


def test_each_half_is_moved_as_the_other_says() -> None:
    values = SplitHistogram(
        _histogram(torch.full((3, 1), 4.0)), _histogram(torch.full((2, 1), 8.0))
    )
    one, two = torch.tensor([1.0]).double(), torch.tensor([2.0]).double()
    mass = values.mass([one, 10.0 * one], [(two, one), (one, two)])
    # The second half has 2 rows of 8, moved by the first one's (2, 1): 8 / 2 - 1.
    moved = dict(zip(mass.value.tolist(), mass.weight.tolist(), strict=True))
    assert moved == {3.0: 2.0, 2.0: 30.0}
    assert values.mass([one]).weight.tolist() == [3.0, 2.0]


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_half_leaves_the_whole_to_judge_itself(empty: int) -> None:
    full, nothing = _histogram(_samples(4, seed=1)), Histogram(CHANNELS)
    values = SplitHistogram(nothing, full) if empty == 0 else SplitHistogram(full, nothing)
    assert len(values.fits) == 1
    chosen = choose_rescale(values, WEIGHTS, QuantSpec(8), None, (1.0,), shifts=True)
    (own,) = chosen.apart
    assert torch.equal(own[0], chosen.scale)
    assert torch.equal(own[1], chosen.shift)


@pytest.mark.parametrize("samples", [2, 4, 8, 16, 32])
def test_new_samples_are_not_clipped_where_few_were_seen(samples: int) -> None:
    x, fresh = _samples(samples, seed=2), _samples(400, seed=3)
    rows = len(x) // 2
    apart, alone = _error(fresh, *_chosen(x[:rows], x[rows:])), _error(fresh, *_chosen(x))
    assert apart < 0.5 * alone


def test_with_many_samples_the_halves_say_the_same() -> None:
    x, fresh = _samples(2_000, seed=4), _samples(400, seed=3)
    rows = len(x) // 2
    apart, alone = _chosen(x[:rows], x[rows:], bits=4), _chosen(x, bits=4)
    assert apart[1].strength == alone[1].strength
    assert torch.equal(apart[1].scale, alone[1].scale)
    assert _error(fresh, *apart, bits=4) < 1.05 * _error(fresh, *alone, bits=4)
