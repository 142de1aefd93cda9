"""Uniform or log-sqrt2 codes are chosen per softmax by the error that they really make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import Tower, randomize

import qwt_fx
from qwt_fx import QuantConfig, api
from qwt_fx.errors import ConfigError, PassError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.numerics.qparams import AFFINE, LOG_SQRT2
from qwt_fx.passes import ChooseSoftmaxQuantizer
from qwt_fx.quant.fake_quant import fake_quant_nodes, fake_quant_of

WIDTH = 16
BATCHES = [torch.randn(4, 9, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def _sharp_tower() -> Tower:
    """The first block attends sharply, to many small probabilities; the second nearly evenly."""
    model = randomize(Tower(2))
    model.blocks[0].q.weight.data *= 6.0
    model.blocks[1].q.weight.data *= 0.05
    model.blocks[1].q.bias.data *= 0.05
    return model


@pytest.mark.parametrize("recipe", ["repq-vit", "best"])
def test_auto_is_never_worse_than_both_and_takes_the_smaller_error(recipe: str) -> None:
    model = _sharp_tower()
    graph = qwt_fx.capture(model, (BATCHES[0],))
    config = QuantConfig(w_bits=8, a_bits=4, recipe=recipe, attention="auto")
    prepared = api.prepare(graph, config)
    result = ChooseSoftmaxQuantizer(BATCHES)(prepared)
    assert len(result.changes) == 2
    for change in result.changes:
        scheme, _, errors = change.what.partition(":")
        log, uniform = (float(e.split()[-1]) for e in errors.split(", "))
        assert scheme == (LOG_SQRT2 if log < uniform else AFFINE)
    quantized = api.quantize(graph, (), BATCHES, config)
    x = torch.cat(BATCHES)
    with torch.no_grad():
        exact = model(x)
        found = {
            name: sqnr_db(
                exact, api.quantize(graph, (), BATCHES, config.replace(attention=name))(x)
            )
            for name in ("uniform", "log2")
        }
        assert sqnr_db(exact, quantized(x)) > min(found.values()) - 0.5
    passes = [record["pass"] for record in graph_info(quantized).passes]
    assert "ChooseSoftmaxQuantizer" in passes


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
