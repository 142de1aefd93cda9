from __future__ import annotations

import torch
from toys import Tower, observed, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx.passes import RemoveObservers, ReparameterizeLayerNorm


def test_insert_and_remove_leave_the_graph_as_it_was() -> None:
    model, x = randomize(Tower()), tokens()
    plain, gm = qwt_fx.capture(model, (x,)), observed(model, x)
    assert "fake_quant" in op_sequence(gm)
    result = RemoveObservers()(gm)
    assert {c.what for c in result.changes} == {"removed"}
    assert op_sequence(gm) == op_sequence(plain)
    assert torch.equal(gm(x), model(x))
    assert not RemoveObservers()(gm).modified


def test_a_reparameterization_stays() -> None:
    model, x = randomize(Tower()).double(), tokens().double()
    gm = observed(model, x)
    ReparameterizeLayerNorm()(gm)
    RemoveObservers()(gm)
    assert torch.allclose(gm(x), model(x), rtol=1e-10, atol=1e-10)
    # The pass gives the norms it changed new parameters; removing observers does not undo it.
    assert "blocks.0.norm1.weight" in model.state_dict()
    assert "blocks.0.norm1.weight" not in gm.state_dict()
