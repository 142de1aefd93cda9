"""Laws of the quantizers, and hand-worked values."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwt_fx.numerics.percentile_search import search_affine
from qwt_fx.numerics.qparams import (
    QuantSpec,
    dequantize_log_sqrt2,
    fake_quantize_affine,
    qparams_from_range,
    quantize_log_sqrt2,
)
from qwt_fx.quant.fake_quant import FakeQuant

BITS = st.integers(2, 8)


def _data(seed: int, scale: float, shift: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 6, generator=generator) * scale + shift


@given(st.integers(0, 999), BITS, st.floats(1e-3, 1e3), st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_error_is_half_a_step_in_range_and_zero_is_exact(
    seed: int, bits: int, scale: float, shift: float
) -> None:
    x = _data(seed, scale, shift)
    spec = QuantSpec(bits)
    s, z = qparams_from_range(x.min(), x.max(), spec)
    assert 0 <= float(z) <= spec.quant_max
    low, high = (0 - z) * s, (spec.quant_max - z) * s
    inside = (x >= low) & (x <= high)
    restored = fake_quantize_affine(x, s, z, 0, spec.quant_max)
    assert float((restored - x)[inside].abs().max()) <= float(s) * 0.5001 + 1e-6 * scale
    assert float(fake_quantize_affine(torch.zeros(()), s, z, 0, spec.quant_max)) == 0.0


@given(st.integers(0, 999), BITS)
@settings(max_examples=40, deadline=None)
def test_fake_quantization_is_idempotent(seed: int, bits: int) -> None:
    module = FakeQuant(QuantSpec(bits, ch_axis=-1), "x")
    x = _data(seed, 3.0, 0.5)
    module.observe(x)
    once = module.fake_quantize(x)
    torch.testing.assert_close(module.fake_quantize(once), once, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 999), BITS)
@settings(max_examples=40, deadline=None)
def test_per_channel_is_a_loop_of_per_tensor(seed: int, bits: int) -> None:
    x = _data(seed, 1.0, 0.0) * torch.logspace(-2, 2, 6)
    scales, zeros = search_affine(x, QuantSpec(bits, ch_axis=-1))
    for channel in range(6):
        scale, zero = search_affine(x[:, channel], QuantSpec(bits))
        assert torch.equal(scales[channel], scale)
        assert torch.equal(zeros[channel], zero)


def test_search_equals_a_plain_loop_over_quantiles() -> None:
    x = _data(3, 2.0, 0.3)[:, 0].repeat(50) * torch.linspace(0.1, 4.0, 2000)
    spec = QuantSpec(8, integer_zero_point=False, include_zero=False)
    best, expected = float("inf"), None
    for p in (0.999, 0.9999, 0.99999):
        high, low = torch.quantile(x, p), torch.quantile(x, 1 - p)
        scale = (high - low) / 255
        zero = (-low / scale).round()
        codes = ((x / scale).round() + zero).clamp(0, 255)
        error = float((((codes - zero) * scale) - x).square().mean())
        if error < best:
            best, expected = error, (scale, zero)
    assert expected is not None
    scale, zero = search_affine(x, spec)
    torch.testing.assert_close(scale, expected[0], rtol=1e-6, atol=0.0)
    assert torch.equal(zero, expected[1])


def test_worked_affine_example() -> None:
    """Range [-1, 2] at 2 bits: s = 1, z = 1; 0.4 -> 1 -> 0, 1.6 -> 3 -> 2, 9 -> 3 -> 2."""
    scale, zero = qparams_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(2))
    assert (float(scale), float(zero)) == (1.0, 1.0)
    x = torch.tensor([-3.0, 0.4, 1.6, 9.0])
    assert fake_quantize_affine(x, scale, zero, 0, 3).tolist() == [-1.0, 0.0, 2.0, 2.0]


def test_range_without_width_is_neutral() -> None:
    low, high = torch.tensor([0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])
    scale, zero = qparams_from_range(low, high, QuantSpec(2, ch_axis=0))
    assert scale.tolist() == torch.tensor([2 / 3, 2 / 3, 1.0]).tolist()
    assert bool(torch.isfinite(zero).all())


def test_worked_log_sqrt2_example() -> None:
    """s = 1 at 3 bits: 1 -> 0, 0.5 -> 2, 0.354 -> 3, 2^-3 -> 6, below -> 7 = zero."""
    x = torch.tensor([1.0, 0.5, 0.5**1.5, 0.125, 0.01, 0.0])
    codes = quantize_log_sqrt2(x, 1.0, 3)
    assert codes.tolist() == [0, 2, 3, 6, 7, 7]
    values = dequantize_log_sqrt2(codes, 1.0, 3)
    torch.testing.assert_close(values, torch.tensor([1.0, 0.5, 0.5**1.5, 0.125, 0.0, 0.0]))


@given(st.integers(0, 999), BITS)
@settings(max_examples=30, deadline=None)
def test_log_sqrt2_is_monotone_and_fits_its_bits(seed: int, bits: int) -> None:
    x = torch.rand(200, generator=torch.Generator().manual_seed(seed)).sort().values
    codes = quantize_log_sqrt2(x, float(x.max()), bits)
    assert int(codes.max()) < 2**bits
    values = dequantize_log_sqrt2(codes, float(x.max()), bits)
    assert bool((values[1:] >= values[:-1] - 1e-7).all())
