from __future__ import annotations

import pytest
import torch
from toys import Tower, observed, randomize, tokens

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import NotCalibratedError
from qwt_fx.passes import FoldChannelWise, InsertObservers, ReparameterizeLayerNorm
from qwt_fx.quant.fake_quant import fake_quant_nodes, fake_quant_of


def test_folds_what_reparameterization_made_equal_without_changing_a_bit() -> None:
    x = tokens()
    gm = observed(randomize(Tower()), x)
    ReparameterizeLayerNorm()(gm)
    before = gm(x)
    result = FoldChannelWise()(gm)
    assert len(result.changes) == 4
    torch.testing.assert_close(gm(x), before, rtol=1e-5, atol=1e-5)
    inputs = [fake_quant_of(gm, n) for n in fake_quant_nodes(gm) if n.args[0].op != "get_attr"]
    assert all(m.spec.ch_axis is None and m.scale.dim() == 0 for m in inputs)


def test_second_run_is_unmodified() -> None:
    gm = observed(randomize(Tower()), tokens())
    ReparameterizeLayerNorm()(gm)
    assert FoldChannelWise()(gm).modified
    assert not FoldChannelWise()(gm).modified


def test_channels_that_differ_are_skipped() -> None:
    gm = observed(randomize(Tower()), tokens())
    result = FoldChannelWise()(gm)
    assert not result.modified
    assert {s.reason for s in result.skips} == {
        "its channels differ: run ReparameterizeLayerNorm first"
    }


def test_unobserved_quantizer_is_refused() -> None:
    gm = qwt_fx.capture(Tower(), (tokens(),))
    InsertObservers(QuantConfig())(gm)
    with pytest.raises(NotCalibratedError, match="has not been observed"):
        FoldChannelWise()(gm)
