"""Uniform or log-sqrt2 codes are chosen per softmax by the error that they really make."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig, api
from qwt_fx.errors import ConfigError, PassError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.numerics.qparams import AFFINE, LOG_SQRT2, QuantSpec
from qwt_fx.passes import ChooseSoftmaxQuantizer
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_nodes, fake_quant_of, set_mode

WIDTH = 16
BATCHES = [torch.randn(4, 9, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def _sharp_tower() -> Tower:
    """The first block attends sharply, to many small probabilities; the second nearly evenly."""
    model = randomize(Tower(2))
    model.blocks[0].q.weight.data *= 6.0
    model.blocks[1].q.weight.data *= 0.05
    model.blocks[1].q.bias.data *= 0.05
    return model


def _spread_out_tower() -> Tower:
    """The first block's attention reaches many positions, a few of them far more than the rest."""
    model = _sharp_tower()
    model.blocks[0].q.weight.data /= 2.0
    return model


def _errors(model: Tower, block: int, x: Tensor) -> tuple[float, float]:
    """Squared error of softmax(QK^T) V with log-sqrt2 and with uniform codes of 4 bits, by hand."""
    with torch.no_grad():
        value = model.norm_pre(x)
        for earlier in model.blocks[:block]:
            value = earlier(value)
        this = model.blocks[block]
        heads = [
            p(this.norm1(value)).unflatten(-1, (2, 8)).transpose(1, 2).double().numpy()
            for p in (this.q, this.k, this.v)
        ]
    q, k, v = heads
    logits = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(8.0))
    probabilities = logits / logits.sum(axis=-1, keepdims=True)

    def scale(scheme: str) -> float:
        module = FakeQuant(QuantSpec(4, scheme=scheme), "probabilities")
        module.observe(torch.from_numpy(probabilities).float())
        assert module.zero_point is None or float(module.zero_point) == 0.0
        return float(module.scale)

    step, largest = scale(AFFINE), scale(LOG_SQRT2)
    uniform = step * np.round(probabilities / step).clip(0, 15)
    codes = np.round(-2.0 * np.log2(probabilities / largest)).clip(0, 15)
    log_sqrt2 = np.where(codes == 15, 0.0, largest * 2.0 ** (-codes / 2.0))
    log_error, uniform_error = (
        float((((rounded - probabilities) @ v) ** 2).sum()) for rounded in (log_sqrt2, uniform)
    )
    return log_error, uniform_error


@pytest.mark.parametrize("recipe", ["repq-vit", "best"])
def test_auto_takes_the_smaller_error_at_each_softmax(recipe: str) -> None:
    model = _spread_out_tower()
    batches = [tokens(4, 33, seed=s) for s in range(2)]
    graph = qwt_fx.capture(model, (batches[0],))
    config = QuantConfig(w_bits=8, a_bits=4, recipe=recipe, attention="auto")
    prepared = api.prepare(graph, config)
    result = ChooseSoftmaxQuantizer(batches)(prepared)
    schemes = []
    for index, change in enumerate(result.changes):
        scheme, _, errors = change.what.partition(":")
        schemes.append(scheme)
        said = [float(e.split()[-1]) for e in errors.split(", ")]
        assert said == pytest.approx(_errors(model, index, batches[0]), rel=2e-3)
        assert scheme == (LOG_SQRT2, AFFINE)[int(np.argmin(said))]
    # Spread over 33 positions, most probabilities are below half a uniform step.
    assert schemes == [LOG_SQRT2, AFFINE]
    chosen = [m.spec.scheme for m in prepared.modules()
              if isinstance(m, FakeQuant) and m.name.endswith("probabilities")]  # fmt: skip
    assert chosen == schemes
    quantized = api.quantize(graph, (), [b[:2] for b in batches], config)
    passes = [record["pass"] for record in graph_info(quantized).passes]
    # `best` chooses on the way, by all batches (tests/calibrate/test_product_ranges.py).
    assert ("ChooseSoftmaxQuantizer" in passes) is (recipe == "repq-vit")


def test_the_softmaxes_quantized_alone_disturb_the_output_least_by_what_was_chosen() -> None:
    model, batches = _spread_out_tower(), [tokens(4, 33, seed=s) for s in range(2)]
    graph = qwt_fx.capture(model, (batches[0],))
    sqnr = {}
    for attention in ("auto", "uniform", "log2"):
        prepared = api.prepare(graph, QuantConfig(a_bits=4, attention=attention))
        if attention == "auto":
            ChooseSoftmaxQuantizer(batches)(prepared)
        api.observe(prepared, batches)
        set_mode(prepared, Mode.OFF)
        softmaxes = [
            m
            for m in map(partial(fake_quant_of, prepared), fake_quant_nodes(prepared))
            if m.name.endswith("probabilities")
        ]
        assert len(softmaxes) == 2
        for module in softmaxes:
            module.mode = Mode.ON
        with torch.no_grad():
            sqnr[attention] = sqnr_db(model(batches[0]), prepared(batches[0]))
    assert sqnr["auto"] > max(sqnr["uniform"], sqnr["log2"]) + 1.0


def test_schemes_differ_between_softmaxes_where_the_errors_do() -> None:
    graph = qwt_fx.capture(_sharp_tower(), (BATCHES[0],))
    prepared = api.prepare(graph, QuantConfig(a_bits=4, attention="auto"))
    modules = [fake_quant_of(prepared, n) for n in fake_quant_nodes(prepared)]
    softmax = [m for m in modules if m.spec.scheme == LOG_SQRT2]
    assert len(softmax) == 2
    ChooseSoftmaxQuantizer(BATCHES)(prepared)
    # Nearly even probabilities of 9 positions lie within a factor of two: 16 uniform levels fit them
    # far better than the two or three that log-sqrt2 has there.
    assert softmax[1].spec == replace(softmax[1].spec, scheme=AFFINE)
    assert not any(m.calibrated for m in modules)


def test_it_stands_before_calibration_and_the_published_procedure_has_none() -> None:
    graph = qwt_fx.capture(_sharp_tower(), (BATCHES[0],))
    with pytest.raises(PassError, match="must follow InsertLogSqrt2Softmax"):
        ChooseSoftmaxQuantizer(BATCHES)(graph)
    calibrated = api.calibrate(
        api.prepare(graph, QuantConfig(recipe="repq-vit", attention="log2")), BATCHES
    )
    with pytest.raises(PassError, match="is calibrated"):
        ChooseSoftmaxQuantizer(BATCHES)(calibrated)
    with pytest.raises(ConfigError, match="neither 'auto' nor exceptions"):
        QuantConfig(recipe="repq-vit", compat="original", attention="auto")
