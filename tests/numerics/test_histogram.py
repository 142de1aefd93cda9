from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwt_fx.numerics.histogram import BINS, Histogram, bin_of, gather_mass


def _values(seed: int, rows: int = 500, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e-3, 1.0, 40.0])[:channels]
    return torch.randn(rows, channels, generator=generator) * sizes


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=50))
def test_bins_rise_with_the_value(values: list[float]) -> None:
    ordered = torch.tensor(sorted(values))
    bins = bin_of(ordered)
    assert bool((bins[1:] >= bins[:-1]).all())
    assert 0 <= int(bins.min()) <= int(bins.max()) < BINS


@given(st.integers(0, 1000), st.integers(1, 499))
@settings(max_examples=20)
def test_any_split_gives_the_same_histogram(seed: int, at: int) -> None:
    x = _values(seed)
    whole, parts = Histogram(3), Histogram(3)
    whole.add(x)
    parts.add(x[at:])
    parts.add(x[:at])
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.low, parts.low)
    assert torch.equal(whole.high, parts.high)


def test_moments_and_extremes_are_exact() -> None:
    x = _values(1)
    histogram = Histogram(3)
    histogram.add(x)
    torch.testing.assert_close(histogram.mean, x.double().mean(dim=0))
    torch.testing.assert_close(histogram.variance, x.double().var(dim=0, correction=0))
    assert torch.equal(histogram.high, x.amax(dim=0))


def test_quantiles_are_right_up_to_half_a_bin() -> None:
    x = _values(2, rows=5000)
    histogram = Histogram(3)
    histogram.add(x)
    ((low, high),) = histogram.quantiles([0.99])
    exact = torch.quantile(x.double(), 0.99, dim=0)
    torch.testing.assert_close(high, exact, rtol=0.04, atol=0.0)
    torch.testing.assert_close(low, torch.quantile(x.double(), 0.01, dim=0), rtol=0.04, atol=0.0)


def test_mass_keeps_weight_and_moves_values() -> None:
    x = _values(3)
    histogram = Histogram(3)
    histogram.add(x)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    scale = torch.tensor([1e-3, 1.0, 40.0], dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    mass = gather_mass(histogram.entries(), weight, scale, shift)
    assert float(mass.weight.sum()) == 500 * 3.5
    moved = ((x.double() / scale - shift) * weight).sum()
    torch.testing.assert_close((mass.value * mass.weight).sum(), moved, rtol=0.0, atol=10.0)
    spread = ((x.double() / scale - shift).square() * weight).sum()
    torch.testing.assert_close((mass.value.square() * mass.weight).sum(), spread, rtol=0.02, atol=0)
