"""ViT-B/32 at its real size with random weights: captured, rewritten, function unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qwt_fx
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.passes import (
    DecomposeAttention,
    FoldChannelWise,
    InsertLogSqrt2Softmax,
    InsertObservers,
    ReparameterizeLayerNorm,
)
from qwt_fx.quant.fake_quant import Mode, set_mode


def _inputs(tower: str, model: qwt_fx.clip.ClipModel) -> Tensor:
    if tower == "image":
        return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).double()
    return model.tokenizer(["a photo of a cat", "two dogs that run over a meadow"])


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["image", "text"])
def test_every_function_preserving_pass_keeps_both_towers(tower: str) -> None:
    torch.manual_seed(0)
    model = qwt_fx.clip.load("ViT-B-32", allow_random=True)
    module = getattr(model, tower).double()
    x = _inputs(tower, model)
    expected = module(x)
    gm = qwt_fx.capture(module, (x,))
    assert [b.name.rsplit(".", 1)[1] for b in graph_info(gm).blocks] == [str(i) for i in range(12)]
    torch.testing.assert_close(gm(x), expected, rtol=1e-9, atol=1e-9)
    passes = (
        DecomposeAttention(),
        InsertLogSqrt2Softmax(bits=8),
        InsertObservers(QuantConfig(attention="log2")),
    )
    for step in passes:
        assert step(gm).modified
        torch.testing.assert_close(gm(x), expected, rtol=1e-9, atol=1e-9)
    observe(gm, [x])
    for step in (ReparameterizeLayerNorm(), FoldChannelWise()):
        assert len(step(gm).changes) == 24
        set_mode(gm, Mode.OFF)
        torch.testing.assert_close(gm(x), expected, rtol=1e-9, atol=1e-9)
        set_mode(gm, Mode.ON)
