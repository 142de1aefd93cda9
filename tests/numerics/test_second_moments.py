from __future__ import annotations

import torch
from torch import Tensor

from qwt_fx.numerics.second_moments import CHUNK, LayerSums, choose_refit, refit


def _tokens(seed: int, n: int = 600, d: int = 12, o: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + 2.0
    change = torch.randn(o, d, generator=generator)
    return x, x @ change.T + 3.0, change


def _sums(x: Tensor, t: Tensor) -> LayerSums:
    sums = LayerSums.empty(x.shape[1], t.shape[1], x.device)
    sums.add(x, t)
    return sums


def test_residual_is_the_direct_sum() -> None:
    x, t, change = _tokens(0)
    change, bias = 0.5 * change, torch.arange(5.0)
    direct = (t.double() - x.double() @ change.double().T - bias).square().sum()
    found = _sums(x, t).residual(change, bias)
    torch.testing.assert_close(found, float(direct), rtol=1e-5, atol=0)


def test_bias_leaves_no_mean_error() -> None:
    x, t, change = _tokens(1)
    sums = _sums(x, t)
    bias = sums.bias(0.3 * change)
    left = t.double() - x.double() @ (0.3 * change).double().T - bias
    torch.testing.assert_close(left.mean(dim=0), torch.zeros(5).double(), atol=1e-5, rtol=0)


def test_refit_finds_a_linear_change() -> None:
    x, t, change = _tokens(2)
    found = refit(_sums(x, t).centred(), 1e-9)
    assert found is not None
    torch.testing.assert_close(found.float(), change, rtol=1e-3, atol=1e-3)


def test_a_strong_ridge_changes_little() -> None:
    x, t, change = _tokens(3)
    found = refit(_sums(x, t).centred(), 1e6)
    assert found is not None
    assert float(found.norm()) < 1e-3 * float(change.norm())


def test_noise_is_not_fitted() -> None:
    generator = torch.Generator().manual_seed(4)
    x, noise = torch.randn(40, 30, generator=generator), torch.randn(40, 5, generator=generator)
    judge = torch.randn(200, 30, generator=generator), torch.randn(200, 5, generator=generator)
    chosen, ridge = choose_refit(_sums(x, noise), _sums(*judge), (1e-6, 1e-3))
    assert chosen is None
    assert ridge is None


def test_fewer_tokens_than_channels_need_a_ridge() -> None:
    x, t, _ = _tokens(5, n=6)
    sums, judge = _sums(x, t), _sums(*_tokens(6)[:2])
    assert refit(sums.centred(), 1e-2) is not None
    chosen, ridge = choose_refit(sums, judge, (1e-2, 1.0))
    assert (chosen is None) == (ridge is None)


def test_constant_input_is_refused() -> None:
    x = torch.ones(50, 4)
    assert refit(_sums(x, torch.randn(50, 2)).centred(), 1e-2) is None


def test_long_inputs_are_summed_in_chunks_of_the_same_total() -> None:
    x, t, _ = _tokens(7, n=CHUNK + 100)
    whole, parts = _sums(x, t), LayerSums.empty(12, 5, x.device)
    parts.add(x[:CHUNK], t[:CHUNK])
    parts.add(x[CHUNK:], t[CHUNK:])
    assert torch.equal(whole.gram, parts.gram)
    assert torch.equal(whole.cross, parts.cross)
    first, second = _sums(x[:10], t[:10]), _sums(x[10:], t[10:])
    first.absorb(second)
    torch.testing.assert_close(first.gram, whole.gram, rtol=1e-6, atol=1e-6)
    assert (first.count, second.count) == (whole.count, 0)


def test_a_wide_second_moment_is_made_of_blocks_and_symmetric() -> None:
    x = torch.randn(300, 514)
    gram = _sums(x, torch.randn(300, 2)).gram
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, x.double().T @ x.double(), rtol=1e-4, atol=1e-3)


def test_a_refit_of_huge_sums_does_not_overflow_float32() -> None:
    x = torch.randn(200, 6) * 1e12
    t = x @ torch.randn(6, 3)
    sums = _sums(x[:150], t[:150])
    change, ridge = choose_refit(sums, _sums(x[150:], t[150:]), (1e-3, 1e-2))
    assert change is not None and ridge == 1e-3
    centred, target = (v.double() - v.double().mean(dim=0) for v in (x, t))
    gram = centred.T @ centred
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    wanted = torch.linalg.solve(gram, centred.T @ target)
    torch.testing.assert_close(change.T, wanted, rtol=1e-4, atol=1e-5)
