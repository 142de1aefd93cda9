"""`QwTQuantizer` in torchao's prepare_pt2e and convert_pt2e, against figures computed here by hand."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from toys import Tower, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx import NotCalibratedError, QuantConfig
from qwt_fx.errors import ConfigError, DataError, MissingExtraError, PreconditionError
from qwt_fx.graph.aten import LINEAR, MATMULS
from qwt_fx.graph.nodes import layer_name
from qwt_fx.quant import torch_ao

pytest.importorskip("torchao", reason="extra torchao is not installed")
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from qwt_fx.pt2e.quantizer import QwTQuantizer

CONFIG = QuantConfig(w_bits=6, a_bits=6, recipe="repq-vit", compensation="none")
BATCHES = [tokens(8, seed=1), tokens(8, seed=2)]
UNSEEN = tokens(16, seed=3)


def sqnr(wanted: Tensor, got: Tensor) -> float:
    wanted, got = wanted.detach(), got.detach()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(Tower())


@pytest.fixture(scope="module")
def floating(model: nn.Module) -> GraphModule:
    return qwt_fx.reparameterize(qwt_fx.capture(model, (BATCHES[0],)), BATCHES, CONFIG)


def quantized(gm: GraphModule, quantizer: QwTQuantizer) -> GraphModule:
    prepared = prepare_pt2e(copy.deepcopy(gm), quantizer)
    for x in BATCHES:
        prepared(x)
    return convert_pt2e(prepared)


@pytest.fixture(scope="module")
def usual(floating: GraphModule) -> GraphModule:
    return quantized(floating, QwTQuantizer(CONFIG))


class Inputs(Interpreter):
    """Records the extremes of what each linear and matmul reads, over all runs."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extremes: dict[str, tuple[float, float]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and n.target is LINEAR:
            value = self.fetch_args_kwargs_from_env(n)[0][0]
            low, high = self.extremes.get(layer_name(n), (0.0, 0.0))  # 0 is always in the range
            low, high = min(low, float(value.min())), max(high, float(value.max()))
            self.extremes[layer_name(n)] = low, high
        return super().run_node(n)


def found_qparams(gm: GraphModule) -> dict[str, tuple[tuple[float, int], tuple[Tensor, Tensor]]]:
    """layer -> (scale, zero point) of its input and of its weight, read from the q/dq graph."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is LINEAR:
            x, w = node.args[0], node.args[1]
            assert x.target is torch_ao.DEQUANTIZE_PER_TENSOR
            assert w.target is torch_ao.DEQUANTIZE_PER_CHANNEL
            assert x.args[3:6] == (0, 63, torch.uint8)
            codes, scale, zero = (getattr(gm, str(a.target)) for a in w.args[:3])
            assert codes.dtype is torch.uint8
            assert int(codes.max()) <= 63
            found[layer_name(node)] = ((x.args[1], x.args[2]), (scale, zero))
    return found


def test_scales_are_those_of_the_extremes_computed_by_hand(
    floating: GraphModule, usual: GraphModule
) -> None:
    inputs = Inputs(floating)
    with torch.no_grad():
        for x in BATCHES:
            inputs.run(x)
    found = found_qparams(usual)
    assert found.keys() == inputs.extremes.keys()
    assert len(found) == 12
    weights = {layer_name(n): n.args[1] for n in floating.graph.nodes if n.target is LINEAR}
    for name, (low, high) in inputs.extremes.items():
        (scale, zero), (scales, zeros) = found[name]
        assert math.isclose(scale, (high - low) / 63, rel_tol=1e-6)
        assert zero == round(-low / scale)
        rows = floating.get_parameter(str(weights[name].target))
        lows, highs = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        assert torch.allclose(scales, (highs - lows) / 63, rtol=1e-6)
        assert torch.equal(zeros, torch.round(-lows / scales).long())


def test_layers_that_read_one_value_share_its_quantizer(usual: GraphModule) -> None:
    found = found_qparams(usual)
    q, k, v = (found[f"blocks.0.{n}"][0] for n in "qkv")
    assert q == k == v


@pytest.mark.parametrize("ranges", ["minmax", pytest.param("histogram", marks=pytest.mark.slow)])
def test_reparameterized_it_is_as_good_as_our_own_and_better_than_without(
    model: nn.Module, floating: GraphModule, ranges: Any
) -> None:
    wanted = model(UNSEEN)
    assert sqnr(wanted, floating(UNSEEN)) > 100.0
    got = sqnr(wanted, quantized(floating, QwTQuantizer(CONFIG, ranges=ranges))(UNSEEN))
    own = sqnr(wanted, qwt_fx.quantize(model, (BATCHES[0],), BATCHES, CONFIG)(UNSEEN))
    captured = qwt_fx.capture(model, (BATCHES[0],))
    bare = sqnr(wanted, quantized(captured, QwTQuantizer(CONFIG, ranges=ranges))(UNSEEN))
    assert got > own - 1.0
    assert got > bare + 1.0


def test_symmetric_weights_have_the_middle_zero_point(floating: GraphModule) -> None:
    config = CONFIG.replace(recipe="best")  # whose weights are symmetric
    for (_, (scales, zeros)), node in zip(
        found_qparams(quantized(floating, QwTQuantizer(config))).values(),
        floating.graph.find_nodes(op="call_function", target=LINEAR),
        strict=True,
    ):
        rows = floating.get_parameter(str(node.args[1].target))
        assert torch.equal(zeros, torch.full_like(zeros, 32))
        wanted = torch.maximum(-rows.amin(1) / 32, rows.amax(1) / 31)
        assert torch.allclose(scales, wanted, rtol=1e-6)


def test_overrides_and_reasons(floating: GraphModule) -> None:
    config = CONFIG.replace(overrides={"*.fc1": "skip", "*.fc2": "w4a8"})
    quantizer = QwTQuantizer(config)
    q = quantized(floating, quantizer)
    assert [(s.node, s.reason) for s in quantizer.skips] == [
        ("blocks.0", "attention stays in floating point (attention='none')"),
        ("blocks.0.fc1", "left in floating point by the configuration"),
        ("blocks.1", "attention stays in floating point (attention='none')"),
        ("blocks.1.fc1", "left in floating point by the configuration"),
    ]
    limits = {
        layer_name(n): tuple(getattr(a, "args", ())[-2:-1] for a in n.args[:2])
        for n in q.graph.nodes
        if n.target is LINEAR
    }
    assert limits["blocks.0.fc2"] == ((255,), (15,))
    fc1 = next(n for n in q.graph.nodes if layer_name(n) == "blocks.0.fc1")
    assert fc1.args[1].op == "get_attr"


def test_attention_is_decomposed_and_its_products_quantized(floating: GraphModule) -> None:
    q = quantized(floating, QwTQuantizer(CONFIG.replace(attention="uniform")))
    assert "scaled_dot_product_attention" not in op_sequence(q)
    products = [n for n in q.graph.nodes if n.op == "call_function" and n.target in MATMULS]
    assert len(products) == 4
    for node in products:
        assert all(a.target is torch_ao.DEQUANTIZE_PER_TENSOR for a in node.args[:2])


def test_what_pt2e_cannot_say_is_refused(floating: GraphModule) -> None:
    for change in (
        {"compensation": "qwt"},
        {"attention": "log2"},
        {"exceptions": 0.1},
        {"compat": "original"},
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(change))}=.*nothing that torchao"):
            QwTQuantizer(QuantConfig(recipe="repq-vit").replace(**change))
    with pytest.raises(ConfigError, match="ranges: got 'mse', wanted one of minmax, histogram"):
        QwTQuantizer(ranges="mse")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="override 'nothing' matches no layer"):
        quantized(floating, QwTQuantizer(CONFIG.replace(overrides={"nothing": "skip"})))
    with pytest.raises(PreconditionError, match="no layer is quantized: blocks"):
        quantized(floating, QwTQuantizer(CONFIG.replace(overrides={"*": "skip"})))
    x = BATCHES[0]
    with pytest.raises(PreconditionError, match=r"observers of qwt-fx \(.*RemoveObservers"):
        prepare_pt2e(qwt_fx.prepare(floating, CONFIG), QwTQuantizer(CONFIG))
    with pytest.raises(PreconditionError, match=r"qwt_fx.capture\(model, example_inputs\) first"):
        prepare_pt2e(torch.export.export(nn.Linear(16, 4), (x,)).module(), QwTQuantizer(CONFIG))


def test_observers_refuse_no_data_and_nan(floating: GraphModule) -> None:
    with pytest.raises(NotCalibratedError, match="saw no data: run the prepared model"):
        convert_pt2e(prepare_pt2e(copy.deepcopy(floating), QwTQuantizer(CONFIG)))
    prepared = prepare_pt2e(copy.deepcopy(floating), QwTQuantizer(CONFIG))
    with pytest.raises(DataError, match="NaN or infinite"):
        prepared(torch.full_like(BATCHES[0], math.nan))


def test_without_torchao_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qwt-fx\[torchao\]'"):
        torch_ao.load_pt2e()
