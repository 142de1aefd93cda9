from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import Sequence, Tower, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.passes import DecomposeAttention, InsertObservers
from qwt_fx.quant.fake_quant import fake_quant_nodes, fake_quant_of


def test_prepared_graph_computes_the_very_same_floats() -> None:
    model, x = randomize(Tower()), tokens()
    prepared = qwt_fx.prepare(qwt_fx.capture(model, (x,)), QuantConfig(4, 4))
    assert torch.equal(prepared(x), model(x))


def test_second_run_is_unmodified() -> None:
    gm = qwt_fx.capture(Tower(), (tokens(),))
    assert InsertObservers(QuantConfig())(gm).modified
    code = gm.code
    assert not InsertObservers(QuantConfig())(gm).modified
    assert gm.code == code


def test_one_fake_quant_serves_every_reader_of_a_value() -> None:
    gm = qwt_fx.capture(Tower(1), (tokens(),))
    InsertObservers(QuantConfig())(gm)
    modules = [fake_quant_of(gm, n) for n in fake_quant_nodes(gm)]
    # inputs: norm1 (shared by q, k, v), out, norm2, fc2; weights: 6
    assert len(modules) == 4 + 6
    assert sum(m.spec.ch_axis == -1 for m in modules) == 2
    assert sum(m.spec.ch_axis == 0 for m in modules) == 6


def test_op_sequence_before_and_after() -> None:
    class Model(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.linear(x)))

    gm = qwt_fx.capture(Model(), (tokens(),))
    assert op_sequence(gm) == ["linear", "relu", "linear"]
    InsertObservers(QuantConfig())(gm)
    assert sorted(op_sequence(gm)) == sorted(["fake_quant"] * 4 + ["linear", "relu", "linear"])


def test_image_input_of_a_convolution_keeps_8_bits() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x))

    gm = qwt_fx.capture(Model(), (torch.randn(2, 3, 8, 8),))
    InsertObservers(QuantConfig(4, 4))(gm)
    bits = {m.name: m.spec.bits for m in (fake_quant_of(gm, n) for n in fake_quant_nodes(gm))}
    assert bits == {"conv1.input": 8, "conv1.weight": 4, "conv2.input": 4, "conv2.weight": 4}


def test_last_override_wins_and_skip_leaves_floats() -> None:
    gm = qwt_fx.capture(Tower(1), (tokens(),))
    overrides = {"*.fc?": "w8a8", "*.fc2": "skip", "*.q": "w3a16"}
    result = InsertObservers(QuantConfig(4, 4, overrides=overrides))(gm)
    names = {
        fake_quant_of(gm, n).name: fake_quant_of(gm, n).spec.bits for n in fake_quant_nodes(gm)
    }
    assert names["blocks.0.fc1.weight"] == 8
    assert names["blocks.0.q.weight"] == 3
    assert not any(n.startswith("blocks.0.fc2") for n in names)
    reasons = {s.node: s.reason for s in result.skips}
    assert reasons["blocks.0.fc2"] == "left in floating point by the configuration"


def test_override_that_matches_nothing_is_an_error() -> None:
    gm = qwt_fx.capture(Tower(1), (tokens(),))
    with pytest.raises(ConfigError, match=r"'visual\.\*' matches no layer"):
        InsertObservers(QuantConfig(overrides={"visual.*": "w8a8"}))(gm)


def test_computed_weight_is_skipped_with_its_reason() -> None:
    class Model(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.linear.weight * 2.0)

    gm = qwt_fx.capture(Model(), (tokens(),))
    code = gm.code
    (skip,) = InsertObservers(QuantConfig())(gm).skips
    assert skip.reason == "its weight is computed, not a parameter"
    assert gm.code == code


def test_attention_is_quantized_only_when_asked_and_decomposed() -> None:
    gm = qwt_fx.capture(Tower(1), (tokens(),))
    (skip,) = InsertObservers(QuantConfig(attention="uniform"))(gm).skips
    assert skip.reason == "is not decomposed: run DecomposeAttention first"
    gm = qwt_fx.capture(Tower(1), (tokens(),))
    DecomposeAttention()(gm)
    result = InsertObservers(QuantConfig(attention="uniform"))(gm)
    assert not result.skips
    names = {fake_quant_of(gm, n).name for n in fake_quant_nodes(gm)}
    assert {"blocks.0.matmul1.operand 0", "blocks.0.matmul2.probabilities"} <= names
