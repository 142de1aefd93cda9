from __future__ import annotations

import numpy as np
import pytest
import torch

from qwt_fx.regression import Moments, fit_held_out, fit_original


def _moments(x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> Moments:
    moments = Moments.empty(x.shape[1], y.shape[1], torch.device("cpu"))
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        moments.add(a, b)
    return moments


def _problem(noise: float = 0.1, n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator)
    y = x @ torch.randn(5, 3, generator=generator) + 2.0
    return x, y + noise * torch.randn(n, 3, generator=generator)


def test_fit_equals_numpy_least_squares_in_any_split() -> None:
    x, y = _problem()
    z = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], axis=1)
    expected = np.linalg.lstsq(z, y.double().numpy(), rcond=None)[0]
    for parts in (1, 7):
        fit = fit_original(_moments(x, y, parts))
        np.testing.assert_allclose(fit.weight.numpy(), expected[:-1], atol=1e-10)
        np.testing.assert_allclose(fit.bias.numpy(), expected[-1], atol=1e-10)


def test_singular_problem_is_solved_and_judged() -> None:
    x, y = _problem()
    tied = torch.cat([x, -x.sum(dim=1, keepdim=True) + 1.0], dim=1)  # as a LayerNorm ties channels
    fit = fit_held_out(_moments(tied[:200], y[:200]), _moments(tied[200:], y[200:]))
    assert bool(torch.isfinite(fit.weight).all())
    assert fit.r2_held_out is not None
    assert fit.r2_held_out > 0.95
    assert fit.r2 == pytest.approx(fit_original(_moments(x, y)).r2, abs=1e-3)


def test_noise_has_no_positive_held_out_r2() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(60, 20, generator=generator), torch.randn(60, 3, generator=generator)
    fit = fit_held_out(_moments(x[:40], y[:40]), _moments(x[40:], y[40:]))
    assert fit.r2 > 0.0
    assert fit.r2_held_out is not None
    assert fit.r2_held_out < 0.05
