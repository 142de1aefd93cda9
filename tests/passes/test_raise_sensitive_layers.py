"""Layers that hurt the output most get 8 bits, within the budget and not beyond it."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import Tower, randomize

import qwt_fx
from qwt_fx import QuantConfig, api
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.errors import ConfigError, PassError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.measure.sensitivity import Sensitivity, measure_sensitivity
from qwt_fx.passes import RaiseSensitiveLayers
from qwt_fx.passes.raise_sensitive_layers import choose
from qwt_fx.quant.fake_quant import Mode, fake_quant_of, is_fake_quant, set_mode
from qwt_fx.quant.integer_layers import IntegerLayer, layers_to_lower

WIDTH = 16
BATCHES = [torch.randn(8, 9, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]
CONFIG = QuantConfig(w_bits=4, a_bits=4, recipe="repq-vit")


def _tower() -> Tower:
    return randomize(Tower(2))


def test_sensitivity_is_the_output_error_of_one_operand_alone() -> None:
    model = _tower()
    prepared = observe(api.prepare(qwt_fx.capture(model, (BATCHES[0],)), CONFIG), BATCHES)
    measured = measure_sensitivity(copy.deepcopy(prepared), BATCHES[0])
    assert {name for s in measured for name in s.layers} == {
        layer_name(n) for n in weight_layers(prepared)
    }
    with torch.no_grad():
        exact = model(BATCHES[0])
        for one in measured[:4]:
            alone = copy.deepcopy(prepared)
            set_mode(alone, Mode.OFF)
            layer = next(n for n in weight_layers(alone) if layer_name(n) == one.layers[0])
            assert is_fake_quant(alone, layer.args[0])
            fake_quant_of(alone, layer.args[0]).mode = Mode.ON
            missed = (alone(BATCHES[0]) - exact).square().sum() / exact.square().sum()
            assert one.input_error == pytest.approx(float(missed), rel=1e-3)


def test_the_budget_is_kept_and_accuracy_rises() -> None:
    model = _tower()
    graph = qwt_fx.capture(model, (BATCHES[0],))
    x = torch.cat(BATCHES)
    found, sizes = [], []
    with torch.no_grad():
        exact = model(x)
        for budget in (0.0, 0.25, 1.0):
            q = api.quantize(graph, (), BATCHES, CONFIG.replace(exceptions=budget))
            found.append(sqnr_db(exact, q(x)))
            layers = [la for la in layers_to_lower(q) if isinstance(la, IntegerLayer)]
            bits = sum(la.weight.bits * la.weight.codes.numel() for la in layers)
            sizes.append(bits / sum(la.weight.codes.numel() for la in layers))
            raised = [r for r in graph_info(q).passes if r["pass"] == "RaiseSensitiveLayers"]
            assert bool(raised) == (budget > 0.0)
    assert found[0] < found[1] < found[2]
    assert sizes[0] == 4.0
    assert 4.0 < sizes[1] <= 4.0 * 1.25  # the budget: a quarter more bytes
    assert sizes[2] == 8.0


def test_the_most_error_for_each_byte_goes_first() -> None:
    def one(name: str, error: float, weights: int, bits: int | None = 4) -> Sensitivity:
        return Sensitivity((name,), error, 0.0, 4, bits, weights)

    measured = [one("a", 1.0, 1000), one("b", 0.9, 100), one("c", 0.1, 10), one("d", 0.5, 5, 8)]
    assert [s.layers[0] for s, _ in choose(measured, 60.0)] == ["d", "c", "b"]
    assert sum(cost for _, cost in choose(measured, 60.0)) <= 60.0
    assert choose(measured, 0.0) == []


def test_bad_budgets_and_calibrated_graphs_are_refused() -> None:
    with pytest.raises(ConfigError, match="budget: got 2"):
        RaiseSensitiveLayers(BATCHES, 2.0)
    with pytest.raises(ConfigError, match="exceptions"):
        QuantConfig(exceptions=1.5)
    calibrated = api.calibrate(
        api.prepare(qwt_fx.capture(_tower(), (BATCHES[0],)), CONFIG), BATCHES
    )
    with pytest.raises(PassError, match="not calibrated yet"):
        RaiseSensitiveLayers(BATCHES, 0.1)(calibrated)
