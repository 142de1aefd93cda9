from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwt_fx.numerics.histogram import Histogram, gather_mass
from qwt_fx.numerics.qparams import QuantSpec, fake_quantize_affine, qparams_from_range
from qwt_fx.numerics.range_search import channel_ranges, search_range, squared_error


def _histogram(x: Tensor) -> Histogram:
    histogram = Histogram(x.shape[1])
    histogram.add(x)
    return histogram


def _true_error(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, weight: Tensor) -> float:
    restored = fake_quantize_affine(x, scale, zero, spec.quant_min, spec.quant_max)
    return float(((restored - x).double().square() * weight).sum())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_error_from_the_histogram_is_the_true_error(bits: int) -> None:
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(bits))
    weight, spec = torch.tensor([1.0, 3.0], dtype=torch.float64), QuantSpec(bits)
    mass = gather_mass(_histogram(x).entries(), weight)
    for reach in (1.5, 3.0, 6.0):
        scale, zero = qparams_from_range(torch.tensor(-reach), torch.tensor(reach), spec)
        estimate = squared_error(mass, scale[None], zero[None], spec.quant_max)
        assert float(estimate) == pytest.approx(_true_error(x, scale, zero, spec, weight), rel=0.06)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_search_beats_the_extremes_and_the_percentiles(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(30_000, 1, generator=generator)
    x[:3] = 40.0  # three outliers
    spec, weight = QuantSpec(bits), torch.ones(1, dtype=torch.float64)
    found = search_range(gather_mass(_histogram(x).entries(), weight), spec)
    ours = _true_error(x, found.scale, found.zero_point, spec, weight)
    for p in (0.999, 0.9999, 0.99999, 1.0):
        low, high = torch.quantile(x, 1 - p), torch.quantile(x, p)
        scale, zero = qparams_from_range(low, high, spec)
        assert ours <= 1.02 * _true_error(x, scale, zero, spec, weight)


def test_a_heavy_channel_decides_the_range() -> None:
    x = torch.cat([torch.randn(4000, 1), 20 * torch.randn(4000, 1)], dim=1)
    entries, spec = _histogram(x).entries(), QuantSpec(4)
    small = search_range(gather_mass(entries, torch.tensor([1.0, 1e-9]).double()), spec)
    large = search_range(gather_mass(entries, torch.tensor([1e-9, 1.0]).double()), spec)
    assert float(large.scale) > 8 * float(small.scale)


def test_one_sided_values_get_every_code() -> None:
    x = torch.rand(5000, 1)
    found = search_range(gather_mass(_histogram(x).entries(), torch.ones(1).double()), QuantSpec(4))
    assert float(found.zero_point) == 0.0
    assert float(found.scale) == pytest.approx(1 / 15, rel=0.1)


def test_constant_zero_has_a_finite_scale() -> None:
    x = torch.zeros(50, 2)
    found = search_range(gather_mass(_histogram(x).entries(), torch.ones(2).double()), QuantSpec(8))
    assert bool(torch.isfinite(found.scale)) and float(found.scale) > 0


def test_channel_ranges_cut_an_outlier_at_few_levels_only() -> None:
    x = torch.randn(20_000, 1)
    x[0] = 60.0
    few, many = (channel_ranges(_histogram(x), levels)[1] for levels in (15, 100_000))
    assert float(few) < 6.0
    assert float(many) == 60.0
