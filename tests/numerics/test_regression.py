from __future__ import annotations

import numpy as np
import pytest
import torch

from qwt_fx.numerics.regression import Moments, fit_held_out, fit_original
from qwt_fx.numerics.stored_weight import Dense, Int8, LowRank, int8_scale


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


def _anisotropic() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose large directions are not those of the largest weights."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(1, -2, 12, dtype=torch.float64)
    x = torch.randn(4000, 12, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(12, 10, generator=generator, dtype=torch.float64) / scale[:, None].sqrt()
    return x, weight


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_is_the_truncated_svd_of_the_outputs_and_beats_that_of_the_weight(
    rank: int,
) -> None:
    x, weight = _anisotropic()
    down, up = LowRank(rank)(weight, x.T @ x)
    assert (down.shape, up.shape) == ((12, rank), (rank, 10))
    error = float((x @ (weight - down @ up)).norm())
    singular = np.linalg.svd((x @ weight).numpy(), compute_uv=False)
    assert error == pytest.approx(float(np.sqrt((singular[rank:] ** 2).sum())), rel=1e-6)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    assert error < 0.9 * float((x @ (weight - plain)).norm())


def test_low_rank_ridge_fit_minimizes_the_ridge_objective_among_its_rank() -> None:
    x, weight = _anisotropic()
    generator = torch.Generator().manual_seed(3)
    y = x @ weight + torch.randn(len(x), 10, generator=generator, dtype=torch.float64)
    fit = fit_held_out(_moments(x[:3000], y[:3000]), _moments(x[3000:], y[3000:]), LowRank(3))
    centred, target = x - x.mean(dim=0), y - y.mean(dim=0)
    assert fit.ridge is not None
    added = fit.ridge * float((centred.T @ centred).diagonal().mean())

    def objective(down: torch.Tensor, up: torch.Tensor) -> float:
        left = target - centred @ down @ up
        return float(left.square().sum() + added * (down @ up).square().sum())

    best = objective(*fit.factors)
    for _ in range(20):
        nudged = [
            f + 1e-3 * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in fit.factors
        ]
        assert objective(*nudged) > best
    torch.testing.assert_close(fit.bias, y.mean(dim=0) - x.mean(dim=0) @ fit.weight)


def test_int8_weight_lies_on_its_grid_and_rounds_to_nearest() -> None:
    _, weight = _anisotropic()
    weight[:, 4] = 0.0
    (rounded,) = Int8()(weight, torch.eye(12))
    scale = int8_scale(weight).double()
    codes = rounded / scale
    torch.testing.assert_close(codes, codes.round())
    assert float(codes.abs().max()) <= 127.0
    assert bool(((rounded - weight).abs() <= scale / 2 * (1 + 1e-6)).all())
    assert not bool(rounded[:, 4].any())
    torch.testing.assert_close(int8_scale(rounded), int8_scale(weight))


def test_half_precision_is_kept_only_where_it_holds_the_weight() -> None:
    weight = torch.tensor([[1.0, 0.1]], dtype=torch.float64)
    (rounded,) = Dense(half=True)(weight, torch.eye(1))
    assert rounded.dtype is torch.float64
    assert torch.equal(rounded, weight.half().double())
    large = 1e6 * weight
    assert torch.equal(Dense(half=True)(large, torch.eye(1))[0], large)


def test_fit_is_judged_as_it_is_stored() -> None:
    x, y = _problem()
    train, held_out = _moments(x[:200], y[:200]), _moments(x[200:], y[200:])
    fit = fit_held_out(train, held_out, Int8())
    exact = fit_held_out(train, held_out)
    left = y.double() - x.double() @ fit.weight - fit.bias
    total = (y.double() - y.double().mean(dim=0)).square().sum()
    assert fit.r2 == pytest.approx(1.0 - float(left.square().sum() / total), abs=1e-9)
    assert fit.r2 < exact.r2
    torch.testing.assert_close(
        left.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0
    )
