"""Models in half precision: the towers compute in it, statistics do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.batches.precision import to_device, wide
from qwt_fx.inspect.report import layer_rows
from qwt_fx.measure.layer_statistics import layer_statistics, weight_histograms
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.numerics.regression import Moments
from qwt_fx.numerics.second_moments import LayerSums
from qwt_fx.quant.quantizers import qparams


def test_only_half_precision_is_widened() -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        value = torch.ones(2, dtype=dtype)
        assert wide(value) is value
    assert wide(None) is None
    assert wide(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.float32


def quantized_in(dtype: torch.dtype, device: str, recipe: str) -> float:
    """SQNR in dB of a tower quantized in a precision, against the same tower in float32."""
    model = toys.randomize(toys.Tower(layers=1))
    x = toys.tokens(24)
    with torch.no_grad():
        exact = model(x)
    half = model.to(device, dtype)
    batches = [to_device(b, device).to(dtype) for b in x.split(8)]
    config = QuantConfig(recipe=recipe, compensation="qwt", hold_out=0.25)
    q = qwt_fx.quantize(half, (batches[0],), batches, config)
    with torch.no_grad():
        found = torch.cat([q(b) for b in batches])
    assert found.dtype is dtype
    assert all(torch.isfinite(p.float()).all() for p in q.parameters())
    return sqnr_db(exact, found.float().cpu())


@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
def test_quantizing_in_bf16_takes_statistics_in_float32(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    parts, part = LayerSums.parts, Moments.part

    def watched(function: Any) -> Any:
        def called(x: Tensor, y: Tensor) -> Any:
            seen.update((x.dtype, y.dtype) if function is parts else (y.dtype,))
            return function(x, y)

        return staticmethod(called)

    monkeypatch.setattr(LayerSums, "parts", watched(parts))
    monkeypatch.setattr(Moments, "part", watched(part))
    in_half = quantized_in(torch.bfloat16, "cpu", recipe)
    assert seen == {torch.float32}
    in_full = quantized_in(torch.float32, "cpu", recipe)
    assert in_half > min(in_full, 30.0) - 6.0  # bf16 itself has 8 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizers_are_found_behind_the_casts_of_half_precision(dtype: torch.dtype) -> None:
    """Reports, histograms and own errors name the same layers as in float32."""
    x = toys.tokens(8)
    config = QuantConfig(6, 6, recipe="repq-vit", attention="log2")
    found = []
    for kind in (torch.float32, dtype):
        model, batch = toys.randomize(toys.Tower(layers=1)).to(kind), x.to(kind)
        q = qwt_fx.quantize(model, (batch,), [batch], config)
        rows = [(r["name"], r["w_bits"], r["a_bits"]) for r in layer_rows(q, "tower")]
        statistics = layer_statistics(q, (batch,))
        own = {name for name, one in statistics.items() if one.error is not None}
        clipped = {name for name, one in statistics.items() if one.clipped is not None}
        steps = {name: h.levels for name, h in weight_histograms(q).items()}
        found.append((rows, qparams(q).keys(), own, clipped, steps))
    assert found[0] == found[1]
    assert found[0][2] and all(found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizing_in_half_precision_on_a_gpu(recipe: str, dtype: torch.dtype) -> None:
    in_full = quantized_in(torch.float32, "cuda", recipe)
    assert quantized_in(dtype, "cuda", recipe) > min(in_full, 30.0) - 6.0
