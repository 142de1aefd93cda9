"""The fast ways of the range search find what the plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwt_fx.numerics.percentile_search import PERCENTILES, _outermost, search_affine
from qwt_fx.numerics.qparams import QuantSpec, fake_quantize_affine, qparams_from_range
from qwt_fx.quant.fake_quant import FakeQuant, Mode

LARGE = 1_200_037


def _values(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(LARGE, generator=generator)
    if kind == "sorted":
        return normal.sort().values
    if kind == "ties":
        return normal.round()
    if kind == "constant":
        return torch.full((LARGE,), 2.0)
    if kind == "one block":  # holds the whole tail
        normal[64:96] *= 50.0
    return normal


@pytest.mark.parametrize("kind", ["normal", "sorted", "ties", "constant", "one block"])
@pytest.mark.parametrize("largest", [True, False])
def test_the_tail_found_by_blocks_is_the_tail(kind: str, largest: bool) -> None:
    x = _values(kind)
    for rows in (x[None], x[:1_200_000].view(150, 8000), x[: LARGE // 7 * 7].view(7, -1)):
        for keep in (1, 14, 1202):
            expected = rows.topk(keep, dim=1, largest=largest).values
            assert torch.equal(_outermost(rows, keep, largest=largest), expected)


@pytest.mark.parametrize(("shape", "axis"), [((3, 700), 0), ((5, 9, 40), -1), ((300, 500), None)])
def test_the_range_is_the_one_of_least_error(shape: tuple[int, ...], axis: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) ** 3
    spec = QuantSpec(4, ch_axis=axis)
    scale, zero_point = search_affine(x, spec)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    for row, s, z in zip(rows, scale.reshape(-1), zero_point.reshape(-1), strict=True):
        found = []
        for p in PERCENTILES:
            qparams = qparams_from_range(row.quantile(1 - p), row.quantile(p), spec)
            error = fake_quantize_affine(row, *qparams, 0, 15).sub_(row).double().square().mean()
            found.append((float(error), *map(float, qparams)))
        _, s_expected, z_expected = min(found)
        assert float(s) == pytest.approx(s_expected, rel=1e-4)
        assert float(z) == z_expected


def test_large_activations_are_rounded_in_parts_to_the_same_bits() -> None:
    x = torch.randn(7, 301, 64)  # more than one part, and none that is full at the end
    module = FakeQuant(QuantSpec(6), "some")
    module.set_qparams(torch.tensor(0.07), torch.tensor(30.0))
    module.mode = Mode.ON
    expected = torch.stack([module(sample) for sample in x.unbind(0)])
    assert x[0].numel() < 1 << 16 < x.numel()
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x.transpose(0, 1)), expected.transpose(0, 1))
