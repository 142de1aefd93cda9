"""Scales and shifts of channels moved between layers, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from built_graph import Built
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_of
from qwt_fx.quant.rescale import (
    divide_constants,
    divide_input,
    divide_norm,
    divide_rows,
    set_layer,
    undo_in_columns,
    weight_and_bias,
)

aten = torch.ops.aten
SCALE = torch.tensor([2.0, 10.0], dtype=torch.float64)
SHIFT = torch.tensor([1.0, -1.0], dtype=torch.float64)
NO_SHIFT = torch.zeros(2, dtype=torch.float64)
W, B = [[1.0, 2.0], [3.0, 4.0], [-5.0, 6.0]], [10.0, 20.0, 30.0]
X = torch.tensor([[4.0, 30.0], [-2.0, 50.0]])


def _linear(bias: bool = True) -> tuple[GraphModule, Node]:
    built = Built()
    weight = built.tensor("w", W)
    node = built.linear(built.x, weight, built.tensor("b", B) if bias else None)
    return built.done(node), node


def _run(gm: GraphModule, x: Tensor = X) -> Any:
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        return gm(x)


def _coarse() -> FakeQuant:
    """Rows of three: steps of 1, 2 and 0.5, codes 0..15 around 8."""
    module = FakeQuant(QuantSpec(4, ch_axis=0), "fc.weight")
    module.set_qparams(torch.tensor([1.0, 2.0, 0.5]), torch.full((3,), 8.0))
    return module


def _values(gm: GraphModule, layer: Node) -> tuple[Any, Any]:
    weight, bias = weight_and_bias(gm, layer)
    return weight.tolist(), None if bias is None else bias.tolist()


def test_columns_take_back_what_was_done_to_the_input() -> None:
    gm, layer = _linear()
    before = _run(gm)
    undo_in_columns(gm, layer, SCALE, SHIFT)
    # b' = b + W' t with W' = W diag(2, 10): 10 + 2 - 20, 20 + 6 - 40, 30 - 10 - 60
    assert _values(gm, layer) == ([[2.0, 20.0], [6.0, 40.0], [-10.0, 60.0]], [-8.0, -14.0, -40.0])
    assert torch.equal(_run(gm, X / SCALE.float() - SHIFT.float()), before)
    assert set(dict(gm.named_parameters())) == {"fc_weight", "fc_bias"}  # the old ones are gone


def test_a_bias_appears_only_where_a_shift_needs_one() -> None:
    gm, layer = _linear(bias=False)
    before = _run(gm)
    undo_in_columns(gm, layer, SCALE, NO_SHIFT)
    assert _values(gm, layer) == ([[2.0, 20.0], [6.0, 40.0], [-10.0, 60.0]], None)
    undo_in_columns(gm, layer, torch.ones(2, dtype=torch.float64), SHIFT)
    assert _values(gm, layer)[1] == [2.0 - 20.0, 6.0 - 40.0, -10.0 - 60.0]
    assert torch.equal(_run(gm, X / SCALE.float() - SHIFT.float()), before)


def test_rows_are_divided_and_shifted_where_they_are_named() -> None:
    gm, layer = _linear()
    before = _run(gm)
    divide_rows(gm, layer, torch.tensor([2, 0]), SCALE, SHIFT)  # row 2 by 2, row 0 by 10
    weight, bias = _values(gm, layer)
    np.testing.assert_allclose(weight, [[0.1, 0.2], [3.0, 4.0], [-2.5, 3.0]], rtol=1e-6)
    assert bias == [2.0, 20.0, 14.0]
    after = _run(gm)
    assert torch.equal(after[:, 1], before[:, 1])
    torch.testing.assert_close(after[:, 2], before[:, 2] / 2.0 - 1.0)
    torch.testing.assert_close(after[:, 0], before[:, 0] / 10.0 + 1.0)


def test_rows_without_a_bias_stay_without_one_unless_they_are_shifted() -> None:
    rows = torch.tensor([0, 1])
    gm, layer = _linear(bias=False)
    divide_rows(gm, layer, rows, SCALE, NO_SHIFT)
    assert _values(gm, layer)[1] is None
    divide_rows(gm, layer, rows, torch.ones(2, dtype=torch.float64), SHIFT)
    assert _values(gm, layer)[1] == [-1.0, 1.0, 0.0]


def test_rounded_rows_keep_their_codes() -> None:
    built = Built()
    weight = built.quantizer(
        "q", built.tensor("w", [[1.4, 2.0], [3.1, 9.0], [-1.2, 2.6]]), _coarse()
    )
    layer = built.linear(built.x, weight)
    gm = built.done(layer)
    before = _run(gm)
    divide_rows(gm, layer, torch.tensor([0, 2]), SCALE, NO_SHIFT)
    module = fake_quant_of(gm, layer.args[1])
    assert module.scale.tolist() == pytest.approx([0.5, 2.0, 0.05])
    assert module.zero_point.tolist() == [8.0, 8.0, 8.0]
    assert module.mode is Mode.ON
    # Rounded: (1, 2), (4, 8) with 3.1 / 2 -> 2 and 9 / 2 -> 4 (half to even), (-1, 2.5).
    by_hand = np.array([[1.0, 2.0], [4.0, 8.0], [-1.0, 2.5]]) / [[2.0], [1.0], [10.0]]
    np.testing.assert_allclose(_run(gm).numpy(), X.numpy() @ by_hand.T, rtol=1e-6)
    torch.testing.assert_close(_run(gm), before / torch.tensor([2.0, 1.0, 10.0]))


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_a_layer_norm_returns_what_is_divided_and_shifted(affine: str) -> None:
    built = Built()
    gamma = None if affine == "none" else built.tensor("g", [3.0, -4.0])
    beta = built.tensor("b", [0.5, 7.0]) if affine == "both" else None
    norm = built.graph.call_function(aten.layer_norm.default, (built.x, [2], gamma, beta, 0.25))
    norm.meta["val"] = X
    gm = built.done(norm)
    divide_norm(gm, norm, SCALE, SHIFT)
    x = X.double().numpy()
    centred = x - x.mean(axis=1, keepdims=True)
    value = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 0.25)
    value = value * ([1.0, 1.0] if affine == "none" else [3.0, -4.0])
    value = value + ([0.5, 7.0] if affine == "both" else [0.0, 0.0])
    np.testing.assert_allclose(_run(gm).numpy(), value / [2.0, 10.0] - [1.0, -1.0], rtol=1e-6)


def test_an_rms_norm_is_divided() -> None:
    built = Built()
    norm = built.graph.call_function(
        aten.rms_norm.default, (built.x, [2], built.tensor("g", [3.0, -4.0]), 0.25)
    )
    gm = built.done(norm)
    divide_norm(gm, norm, SCALE, NO_SHIFT)
    x = X.double().numpy()
    value = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 0.25) * [3.0, -4.0]
    np.testing.assert_allclose(_run(gm).numpy(), value / [2.0, 10.0], rtol=1e-6)


@pytest.mark.parametrize("shift", [SHIFT, NO_SHIFT])
def test_an_input_gets_a_product_in_front_of_its_quantizer(shift: Tensor) -> None:
    built = Built()
    source = built.graph.call_function(aten.neg.default, (built.x,))
    module = FakeQuant(QuantSpec(8), "fc.input")
    module.set_qparams(torch.tensor(0.5), torch.tensor(128.0))
    quantizer = built.quantizer("q", source, module)
    gm = built.done(quantizer, source)
    new = divide_input(gm, quantizer, SCALE, shift)
    assert quantizer.args[0] is new and Correspondence.name_of(new) == source.name
    rounded, untouched = _run(gm)
    # -X / (2, 10) is (-2, -3), (1, -5): multiples of the step, with the shift or without.
    wanted = np.array([[-2.0, -3.0], [1.0, -5.0]]) - shift.numpy()
    np.testing.assert_array_equal(rounded.numpy(), wanted)
    assert torch.equal(untouched, -X)  # other readers of the value see no difference
    assert len(gm.graph.find_nodes(op="call_function", target=aten.sub.Tensor)) == bool(shift.any())


def test_a_second_product_stands_for_what_the_first_one_did() -> None:
    built = Built()
    module = FakeQuant(QuantSpec(8), "fc.input")
    module.set_qparams(torch.tensor(0.5), torch.tensor(128.0))
    quantizer = built.quantizer("q", built.x, module)
    gm = built.done(quantizer)
    divide_input(gm, quantizer, SCALE, NO_SHIFT)
    last = divide_input(gm, quantizer, torch.tensor([0.5, 0.1], dtype=torch.float64), NO_SHIFT)
    assert Correspondence.name_of(last) == "x"
    np.testing.assert_allclose(_run(gm).numpy(), np.round(X.numpy() * 2) / 2)


def test_constants_that_stand_in_for_rows_move_with_them() -> None:
    built = Built()
    mask = built.graph.call_function(aten.gt.Scalar, (built.x, 0.0))
    constant = built.tensor("start", [8.0, 9.0])
    node = built.graph.call_function(aten.where.self, (mask, constant, built.x))
    gm = built.done(node)
    divide_constants(gm, (node,), torch.tensor([1]), SCALE[:1], SHIFT[:1])
    # The second channel only: 9 / 2 - 1.
    assert _run(gm).tolist() == [[8.0, 3.5], [-2.0, 3.5]]


def test_a_tied_weight_is_left_to_the_layers_that_share_it() -> None:
    built = Built()
    weight = built.tensor("w", W)
    first, second = built.linear(built.x, weight), built.linear(built.x, weight)
    gm = built.done(first, second)
    set_layer(gm, first, 2.0 * torch.tensor(W, dtype=torch.float64), None)
    changed, kept = _run(gm)
    assert torch.equal(changed, 2.0 * kept)
    assert torch.equal(kept, X @ torch.tensor(W).T)
    set_layer(gm, second, torch.tensor(W), torch.tensor(B))
    changed, kept = _run(gm)
    assert torch.equal(kept, X @ torch.tensor(W).T + torch.tensor(B))
    assert sorted(dict(gm.named_parameters())) == ["fc_bias", "fc_weight", "fc_weight_1"]


def test_a_tied_quantizer_is_left_to_the_layers_that_share_it() -> None:
    built = Built()
    weight = built.quantizer("q", built.tensor("w", W), _coarse())
    first, second = built.linear(built.x, weight), built.linear(built.x, weight)
    gm = built.done(first, second)
    fine = (torch.full((3,), 0.25), torch.full((3,), 8.0))
    set_layer(gm, first, torch.tensor([[0.3, 0.0], [0.0, 1.0], [9.0, 0.0]]), None, fine)
    changed, kept = _run(gm)
    # 0.25, 1 and, clipped to code 15, 7 steps of 0.25
    by_hand = np.array([[0.25, 0.0], [0.0, 1.0], [1.75, 0.0]])
    np.testing.assert_allclose(changed.numpy(), X.numpy() @ by_hand.T)
    # The coarse one: 3 / 2 -> 2 steps of 2; -5 and 6 are clipped to codes 0 and 15 of step 0.5.
    by_hand = np.array([[1.0, 2.0], [4.0, 4.0], [-4.0, 3.5]])
    np.testing.assert_allclose(kept.numpy(), X.numpy() @ by_hand.T)
    assert fake_quant_of(gm, second.args[1]).scale.tolist() == [1.0, 2.0, 0.5]


def test_a_layer_keeps_its_precision_whatever_it_is_given() -> None:
    gm, layer = _linear()
    set_layer(gm, layer, torch.tensor(W, dtype=torch.float64), torch.tensor(B, dtype=torch.float64))
    assert {p.dtype for p in gm.parameters()} == {torch.float32}


def test_a_bias_given_by_keyword_is_replaced() -> None:
    built = Built()
    layer = built.linear(built.x, built.tensor("w", W))
    layer.kwargs = {"bias": built.tensor("b", B)}
    layer.prepend(layer.kwargs["bias"])
    gm = built.done(layer)
    set_layer(gm, layer, torch.tensor(W), torch.tensor([1.0, 1.0, 1.0]))
    assert torch.equal(_run(gm), X @ torch.tensor(W).T + 1.0)
