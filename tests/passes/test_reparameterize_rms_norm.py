"""RMSNorm has no bias: its quantizer is symmetric, so r2 = 0 and nothing has to be shifted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import observed, op_sequence, tokens

import qwt_fx
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.aten import RMS_NORM
from qwt_fx.graph.nodes import tensor_of
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.numerics.qparams import QuantSpec, qparams_from_range
from qwt_fx.passes import FoldChannelWise, InsertObservers, ReparameterizeLayerNorm
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_nodes, fake_quant_of, set_mode


class _Model(nn.Module):
    """An RMSNorm that two linears read, one of them without bias."""

    def __init__(self, width: int = 16, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=affine)
        self.linear, self.bare = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return self.linear(n) * self.bare(n)


def _random(seed: int = 0, affine: bool = True) -> _Model:
    torch.manual_seed(seed)
    model = _Model(affine=affine).eval()
    if affine:
        model.norm.weight.data.normal_().exp_()
    return model


def _input_quantizer(gm: torch.fx.GraphModule) -> FakeQuant:
    modules = [fake_quant_of(gm, n) for n in fake_quant_nodes(gm)]
    (module,) = [m for m in modules if m.name.endswith(".input")]
    return module


@given(seed=st.integers(0, 10_000), bits=st.sampled_from([3, 4, 8]), affine=st.booleans())
@settings(max_examples=10, deadline=None)
def test_function_is_unchanged_in_float64(seed: int, bits: int, affine: bool) -> None:
    model, x = _random(seed, affine).double(), tokens(seed=seed).double()
    gm = observed(model, x, QuantConfig(bits, bits))
    before = sorted(op_sequence(gm))
    (change,) = ReparameterizeLayerNorm()(gm).changes
    assert change.node == ("norm" if affine else "rms_norm")
    assert sorted(op_sequence(gm)) == before
    set_mode(gm, Mode.OFF)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)


def test_worked_example() -> None:
    """Scales 1 and 3, zero points 128: s~ = 2, r1 = (0.5, 1.5), r2 = 0; no bias anywhere moves."""
    model = _Model(2)
    model.norm.weight.data = torch.tensor([1.0, 3.0])
    model.linear.weight.data = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    model.linear.bias.data = torch.tensor([100.0, 200.0])
    gm = observed(model, torch.randn(2, 3, 2))
    module = _input_quantizer(gm)
    assert module.zero_point.tolist() == [128.0, 128.0]
    module.set_qparams(torch.tensor([1.0, 3.0]), torch.tensor([128.0, 128.0]))
    ReparameterizeLayerNorm()(gm)
    norm = gm.graph.find_nodes(op="call_function", target=RMS_NORM)[0]
    assert tensor_of(gm, norm.args[2]).tolist() == [2.0, 2.0]
    linear, bare = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert tensor_of(gm, linear.args[1].args[0]).tolist() == [[0.5, 1.5], [0.0, 3.0]]
    assert tensor_of(gm, linear.args[2]).tolist() == [100.0, 200.0]
    assert bare.args[2] is None
    assert module.scale.tolist() == [2.0, 2.0]
    assert module.zero_point.tolist() == [128.0, 128.0]


@pytest.mark.parametrize("compat", ["none", "original"])
def test_folded_quantizer_has_the_middle_zero_point_in_both_settings(compat: str) -> None:
    model, x = _random(), tokens()
    gm = observed(model, x, QuantConfig(4, 4, recipe="repq-vit", compat=compat))
    ReparameterizeLayerNorm()(gm)
    FoldChannelWise()(gm)
    module = _input_quantizer(gm)
    assert module.spec.ch_axis is None
    assert float(module.zero_point) == 8.0


def test_quantized_model_converts_saves_and_is_close(tmp_path: object) -> None:
    model, x = _random(), tokens(64)
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig(8, 8, recipe="repq-vit"))
    with torch.no_grad():
        assert sqnr_db(model(x), q(x)) > 25.0
    qwt_fx.save(q, f"{tmp_path}/q")
    assert torch.equal(qwt_fx.load(f"{tmp_path}/q")(x), q(x))


def test_second_run_is_unmodified() -> None:
    gm = observed(_random(), tokens())
    assert ReparameterizeLayerNorm()(gm).modified
    again = ReparameterizeLayerNorm()(gm)
    assert [s.reason for s in again.skips] == ["its channels agree already"]


def test_quantizer_that_is_not_symmetric_is_skipped() -> None:
    model, x = _random(), tokens()
    gm = qwt_fx.capture(model, (x,))
    InsertObservers(QuantConfig())(gm)
    module = _input_quantizer(gm)
    module.spec = QuantSpec(8, ch_axis=-1, include_zero=False)
    observe(gm, [x])
    code = gm.code
    result = ReparameterizeLayerNorm()(gm)
    assert [s.reason for s in result.skips] == [
        "an RMSNorm has no shift, and its quantizer is not symmetric"
    ]
    assert gm.code == code


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(-8.0, 7.0, 1.0), (-8.0, 1.0, 1.0), (-1.0, 14.0, 2.0), (2.0, 7.0, 1.0), (-16.0, -1.0, 2.0)],
)
def test_symmetric_scale_covers_both_sides(low: float, high: float, scale: float) -> None:
    spec = QuantSpec(4, symmetric=True, include_zero=False)
    found = qparams_from_range(torch.tensor(low), torch.tensor(high), spec)
    assert [float(v) for v in found] == [scale, 8.0]
