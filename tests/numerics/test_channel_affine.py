from __future__ import annotations

import numpy as np
import torch

from qwt_fx.numerics.channel_affine import ChannelMoments, fit_affine


def _sums(m: torch.Tensor, e: torch.Tensor, parts: int = 1) -> ChannelMoments:
    sums = ChannelMoments.empty(m.shape[1], torch.device("cpu"))
    for a, b in zip(m.chunk(parts), e.chunk(parts), strict=True):
        sums.add(a, b)
    return sums


def _problem(noise: float = 0.1, n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    m = 3.0 * torch.randn(n, 4, generator=generator) + 1.0
    e = m * torch.tensor([0.5, -0.2, 0.0, 0.1]) + torch.tensor([1.0, 0.0, -2.0, 0.3])
    return m, e + noise * torch.randn(n, 4, generator=generator)


def test_scale_and_shift_equal_numpy_line_fits_in_any_split() -> None:
    m, e = _problem()
    lines = [np.polyfit(a, b, 1) for a, b in zip(m.T.double(), e.T.double(), strict=True)]
    for parts in (1, 5):
        scale, shift = _sums(m, e, parts).solve(0.0)
        np.testing.assert_allclose(scale.numpy() - 1.0, [s for s, _ in lines], atol=1e-9)
        np.testing.assert_allclose(shift.numpy(), [c for _, c in lines], atol=1e-9)


def test_residual_and_r2_equal_their_definitions() -> None:
    m, e = _problem()
    fit = fit_affine(_sums(m[:300], e[:300]), _sums(m[300:], e[300:]))
    left = e.double() - fit.correction(m.double())
    squares = float(left.square().sum())
    np.testing.assert_allclose(_sums(m, e).residual(fit.scale, fit.shift), squares, rtol=1e-9)
    total = float((e.double() - e.double().mean(dim=0)).square().sum())
    np.testing.assert_allclose(fit.r2, 1.0 - squares / total, rtol=1e-9)


def test_a_scale_that_would_not_be_positive_stays_1() -> None:
    m, _ = _problem()
    e = torch.stack([-1.5 * m[:, 0], -1.0 * m[:, 1], -0.9 * m[:, 2], 0.5 + 0.0 * m[:, 3]], dim=1)
    scale, shift = _sums(m, e).solve(0.0)
    np.testing.assert_allclose(scale.numpy(), [1.0, 1.0, 0.1, 1.0], atol=1e-6)
    # The shift of such a channel is the mean error that is left.
    np.testing.assert_allclose(shift.numpy(), e.mean(dim=0).numpy() * [1, 1, 0, 1], atol=1e-5)


def test_constant_channel_gets_a_shift_alone() -> None:
    m, e = _problem()
    m[:, 1] = 7.25
    scale, shift = _sums(m, e).solve(0.0)
    assert scale[1] == 1.0
    np.testing.assert_allclose(float(shift[1]), float(e[:, 1].mean()), atol=1e-5)


def test_noise_has_no_positive_held_out_r2_and_is_shrunk() -> None:
    generator = torch.Generator().manual_seed(1)
    m, e = torch.randn(60, 30, generator=generator), torch.randn(60, 30, generator=generator)
    fit = fit_affine(_sums(m[:30], e[:30]), _sums(m[30:], e[30:]))
    assert fit.r2 > 0.0
    assert fit.r2_held_out is not None
    assert fit.r2_held_out < 0.0
    assert fit.ridge == 3.0
