from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.numerics.weight_rounding import gptq, round_codes, round_to_nearest, row_qparams


def _problem(seed: int, inputs: int = 40, outputs: int = 12) -> tuple[Tensor, Tensor]:
    """Weights (o, i) and a Gram of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(400, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), (x.T @ x / 400).double()


def _error(change: Tensor, gram: Tensor) -> float:
    change = change.double()
    return float((change @ gram * change).sum())


@given(st.integers(0, 200), st.sampled_from([2, 3, 4, 8]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_gptq_disturbs_the_output_less_than_nearest(seed: int, bits: int, symmetric: bool) -> None:
    weight, gram = _problem(seed)
    spec = QuantSpec(bits, ch_axis=0)
    qparams = row_qparams(weight, gram.diagonal(), spec, symmetric=symmetric)
    nearest = round_to_nearest(weight, *qparams, spec)
    ours = gptq(weight, gram, *qparams, spec)
    assert _error(ours - weight, gram) < _error(nearest - weight, gram)
    codes = ours / qparams[0][:, None] + qparams[1][:, None]
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert float(codes.min()) > -0.5
    assert float(codes.max()) < spec.quant_max + 0.5


def test_uncorrelated_inputs_leave_nearest_rounding() -> None:
    weight = torch.randn(5, 9)
    spec = QuantSpec(4, ch_axis=0)
    qparams = row_qparams(weight, torch.ones(9), spec, symmetric=False)
    gram = torch.eye(9, dtype=torch.float64)
    assert torch.equal(gptq(weight, gram, *qparams, spec), round_to_nearest(weight, *qparams, spec))


def test_dead_inputs_are_no_problem() -> None:
    weight, gram = _problem(0)
    gram[3], gram[:, 3] = 0.0, 0.0
    spec = QuantSpec(4, ch_axis=0)
    qparams = row_qparams(weight, gram.diagonal(), spec, symmetric=True)
    assert bool(torch.isfinite(gptq(weight, gram, *qparams, spec)).all())
    nothing = torch.zeros_like(gram)
    assert torch.equal(
        gptq(weight, nothing, *qparams, spec), round_to_nearest(weight, *qparams, spec)
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_rows_have_the_middle_zero_point_and_reach_their_extremes(bits: int) -> None:
    weight = torch.tensor([[-1.0, 0.2, 0.9], [0.1, -0.3, 2.0], [0.0, 0.0, 0.0]])
    spec = QuantSpec(bits, ch_axis=0)
    scale, zero = row_qparams(weight, torch.tensor([1.0, 0.0, 1.0]), spec, symmetric=True)
    assert zero.tolist() == [2.0 ** (bits - 1)] * 3
    assert bool((scale > 0).all())
    if bits == 8:
        restored = round_to_nearest(weight, scale, zero, spec)
        torch.testing.assert_close(restored, weight, atol=2.0 / 120, rtol=0)


def test_importance_decides_what_is_clipped() -> None:
    weight = torch.tensor([[8.0, 0.4, -0.3, 0.2]])
    spec = QuantSpec(3, ch_axis=0)
    large = row_qparams(weight, torch.tensor([1.0, 0.0, 0.0, 0.0]), spec, symmetric=False)
    small = row_qparams(weight, torch.tensor([0.0, 1.0, 1.0, 1.0]), spec, symmetric=False)
    assert float(small[0]) < float(large[0])
    assert round_codes(weight, *small, spec).max() <= 7
