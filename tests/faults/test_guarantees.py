"""Promises about numbers as properties; tests/ holds more of them next to each module."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.numerics.qparams import QuantSpec, fake_quantize_affine, qparams_from_range
from qwt_fx.numerics.regression import Moments, fit_held_out
from qwt_fx.numerics.stored_weight import Dense, Int8, LowRank

SEEDS = st.integers(0, 2**31)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=300, deadline=None)
@given(SEEDS, st.integers(2, 8), st.integers(-25, 25), st.booleans(), st.integers(0, 6))
def test_rounding_errs_by_half_a_step_at_most(
    seed: int, bits: int, exponent: int, symmetric: bool, constant: int
) -> None:
    x = noise(seed, 6, 40) * 10.0**exponent
    x[:constant] = x[:constant, :1]  # constant channels
    spec = QuantSpec(bits, ch_axis=0, symmetric=symmetric)
    scale, zero_point = qparams_from_range(x.amin(dim=1), x.amax(dim=1), spec)
    assert bool((scale > 0).all()) and torch.equal(zero_point, zero_point.round())
    assert bool(((zero_point >= 0) & (zero_point <= spec.quant_max)).all())
    s, z = scale[:, None], zero_point[:, None]
    rounded = fake_quantize_affine(x, s, z, 0, spec.quant_max)
    low, high = -z * s, (spec.quant_max - z) * s
    inside = (x >= low) & (x <= high)
    slack = 1e-5 * torch.maximum(s, x.abs())
    assert bool(((x - rounded).abs() <= s / 2 + slack)[inside].all())


@settings(max_examples=100, deadline=None)
@given(
    SEEDS, st.integers(1, 30), st.integers(1, 12), st.sampled_from(["dense", "low rank", "int8"]),
    st.sampled_from([0.0, 1e-3, 1.0]),
)  # fmt: skip
def test_what_is_said_about_held_out_tokens_is_true(
    seed: int, tokens: int, width: int, kind: str, signal: float
) -> None:
    """R^2 on held-out tokens, computed token by token; fewer tokens than channels included."""
    storage = {"dense": Dense(half=True), "low rank": LowRank(2), "int8": Int8()}[kind]
    x, judge = noise(seed, tokens, width), noise(seed + 1, 20, width)
    x[:, 0] = judge[:, 0] = 1.0  # a constant channel: the Gram is singular
    true = signal * noise(seed + 2, width, 3)
    y, wanted = x @ true + 0.1 * noise(seed + 3, tokens, 3), judge @ true
    wanted = wanted + 0.1 * noise(seed + 4, 20, 3)
    train, held_out = (Moments.empty(width, 3, torch.device("cpu")) for _ in range(2))
    train.add(x, y)
    held_out.add(judge, wanted)
    fit = fit_held_out(train, held_out, storage)
    assert bool(torch.isfinite(fit.weight).all()) and bool(torch.isfinite(fit.bias).all())
    assert fit.r2_held_out is not None and fit.r2_held_out <= 1.0
    # No ridge of the list does better, and the one chosen does as well as it says.
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    centred = x.double() - mean_x
    gram, cross = centred.T @ centred, centred.T @ (y.double() - mean_y)
    assert fit.ridge is not None
    if fit.ridge > 0.0 and kind == "dense" and float(gram.diagonal().mean()) > 1e-6:
        values, vectors = torch.linalg.eigh(gram)
        added = fit.ridge * values.clamp_min(0.0).mean()
        keep = values > values[-1] * 1e-12
        inverse = torch.where(keep, 1.0 / (values + added), torch.zeros_like(values))
        weight = (vectors @ (inverse[:, None] * (vectors.T @ cross))).half().double()
        left = wanted.double() - judge.double() @ weight - (mean_y - mean_x @ weight)
        total = (wanted.double() - wanted.double().mean(0)).square().sum()
        assert float(1.0 - left.square().sum() / total) == pytest.approx(fit.r2_held_out, abs=1e-3)


@pytest.mark.parametrize("recipe", ["best", pytest.param("repq-vit", marks=pytest.mark.slow)])
def test_lowering_to_eager_changes_no_bit(tower: GraphModule, recipe: str) -> None:
    x = toys.tokens(6)
    q = qwt_fx.quantize(tower, (x,), [x], QuantConfig(recipe=recipe, w_bits=4))
    with torch.no_grad():
        assert torch.equal(qwt_fx.lower(copy.deepcopy(q), "eager")(x), q(x))
