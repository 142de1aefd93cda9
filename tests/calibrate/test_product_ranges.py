"""Quantized attention is calibrated by what its products lose; channels' differences move first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig, api
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.numerics.qparams import AFFINE, LOG_SQRT2
from qwt_fx.quant.attention_products import find_products, place_next_to_products
from qwt_fx.quant.fake_quant import Mode, fake_quant_nodes, fake_quant_of, set_mode

BATCHES = [(tokens(16, 12, seed=s),) for s in range(4)]
UNSEEN = tokens(32, 12, seed=99)


def _tower(*, planted: bool) -> nn.Module:
    """A tower; `planted`: the same function, written so that one range for all channels fits badly."""
    model = randomize(Tower(2))
    factor = torch.logspace(-1.2, 1.2, 16)
    for block in model.blocks:
        block.k = nn.Linear(16, 16)
        randomize(block.k)
        if planted:
            for layer, by in ((block.q, factor), (block.k, 1 / factor), (block.v, factor.flip(0))):
                layer.weight.data *= by[:, None]
                layer.bias.data *= by
            # The same for every key, which no softmax sees.
            block.k.bias.data += 3.0 * torch.linspace(-1.0, 1.0, 16) / factor
            block.out.weight.data /= factor.flip(0)
    return model.eval()


def _quantized(model: nn.Module, **options: object) -> tuple[torch.fx.GraphModule, Tensor]:
    prepared = api.prepare(qwt_fx.capture(model, BATCHES[0]), QuantConfig(**options))
    return api.calibrate(prepared, BATCHES), model(UNSEEN)


@torch.no_grad()
def _sqnr(model: nn.Module, **options: object) -> float:
    quantized, exact = _quantized(model, **options)
    return sqnr_db(exact, quantized(UNSEEN))


@pytest.mark.parametrize("attention", ["uniform", "log2"])
def test_differences_between_channels_of_q_k_and_v_cost_nothing(attention: str) -> None:
    options = {"w_bits": 32, "a_bits": 6, "attention": attention}
    plain, planted = (_sqnr(_tower(planted=p), **options) for p in (False, True))
    assert planted > plain - 1.0
    assert _sqnr(_tower(planted=True), **options, fold_values=False) < planted - 6.0


@torch.no_grad()
def test_what_moves_changes_no_function() -> None:
    model = _tower(planted=True)
    unfitted = {"refit": False, "bias_correction": False, "rounding": "nearest"}
    quantized, exact = _quantized(
        model, w_bits=32, a_bits=4, attention="uniform", input_scales=False, **unfitted
    )
    done = str(graph_info(quantized).passes)
    assert done.count("queries balanced with keys") == 2
    assert done.count("moved into the values") == 2
    set_mode(quantized, Mode.OFF)
    torch.testing.assert_close(quantized(UNSEEN), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 6.0])
def test_auto_is_as_good_as_the_better_of_both(bits: int, sharpness: float) -> None:
    model = randomize(Tower(2))
    for block in model.blocks:
        block.q.weight.data *= sharpness
        block.q.bias.data *= sharpness
    sqnr = {
        a: _sqnr(model, w_bits=8, a_bits=bits, attention=a) for a in ("uniform", "log2", "auto")
    }
    assert sqnr["auto"] > max(sqnr["uniform"], sqnr["log2"]) - 0.5


def test_probabilities_get_a_scheme_each_and_all_four_are_calibrated() -> None:
    model, batches = randomize(Tower(2)), [(tokens(8, 33, seed=s),) for s in range(4)]
    model.blocks[0].q.weight.data *= 2.0  # to many positions, a few of them far more than the rest
    model.blocks[1].q.weight.data *= 0.05  # nearly even
    model.blocks[1].q.bias.data *= 0.05
    config = QuantConfig(w_bits=8, a_bits=4, attention="auto")
    quantized = api.calibrate(api.prepare(qwt_fx.capture(model, batches[0]), config), batches)
    modules = [fake_quant_of(quantized, n) for n in fake_quant_nodes(quantized)]
    assert all(m.calibrated for m in modules)
    schemes = [m.spec.scheme for m in modules if m.name.endswith("probabilities")]
    assert schemes == [LOG_SQRT2, AFFINE]


@torch.no_grad()
def test_a_model_quantized_so_is_stored_and_loaded(tmp_path: Path) -> None:
    graph = qwt_fx.capture(_tower(planted=True), BATCHES[0])
    quantized = qwt_fx.quantize(graph, (), BATCHES, QuantConfig(4, 4, attention="auto"))
    qwt_fx.save(quantized, tmp_path / "artifact")
    torch.testing.assert_close(
        qwt_fx.load(tmp_path / "artifact")(UNSEEN), quantized(UNSEEN), rtol=0, atol=0
    )


def test_an_override_of_a_product_gives_its_probabilities_bits() -> None:
    graph = qwt_fx.capture(randomize(Tower(2)), BATCHES[0])
    overrides = {"*": "w8a8", "blocks.1.*": "skip"}
    for attention in ("log2", "auto"):
        config = QuantConfig(16, 16, attention=attention, overrides=overrides)
        prepared = api.prepare(graph, config)
        modules = [fake_quant_of(prepared, n) for n in fake_quant_nodes(prepared)]
        bits = [m.spec.bits for m in modules if m.name.endswith("probabilities")]
        assert bits == [8]


class _OddlyScaled(nn.Module):
    """Attention whose scores are multiplied by a number for each key: a shift of keys would matter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).transpose(-2, -1)) * self.scale
        return self.out(torch.softmax(scores, dim=-1) @ self.v(x))


def test_only_scores_that_keep_a_querys_shift_are_taken_as_scores() -> None:
    graph = qwt_fx.capture(randomize(_OddlyScaled()), BATCHES[0])
    prepared = api.prepare(graph, QuantConfig(8, 8, attention="uniform"))
    products = set(find_products(prepared).values())
    assert [p.of_probabilities for p in products] == [True]
    assert _sqnr(randomize(_OddlyScaled()), w_bits=8, a_bits=8, attention="uniform") > 25.0


def test_quantizers_are_placed_just_before_their_product() -> None:
    graph = qwt_fx.capture(randomize(Tower(1, causal=True)), BATCHES[0])
    prepared = api.prepare(graph, QuantConfig(8, 8, attention="log2"))
    place_next_to_products(prepared)
    prepared.recompile()
    order = list(prepared.graph.nodes)
    products = set(find_products(prepared).values())
    assert len(products) == 2
    for product in products:
        at = order.index(product.node)
        assert set(order[at - 2 : at]) == {product.first.quantizer, product.second.quantizer}
    prepared.graph.lint()
