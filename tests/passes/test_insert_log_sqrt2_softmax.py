from __future__ import annotations

import pytest
import torch
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.graph.aten import SOFTMAXES
from qwt_fx.graph.nodes import is_call
from qwt_fx.graph.runner import run_all
from qwt_fx.passes import InsertLogSqrt2Softmax
from qwt_fx.quant.fake_quant import fake_quant_of, is_fake_quant


def test_one_quantizer_per_softmax_and_the_function_is_unchanged() -> None:
    model, x = randomize(Tower()).double(), tokens().double()
    gm = qwt_fx.capture(model, (x,))
    assert len(InsertLogSqrt2Softmax(bits=4)(gm).changes) == 2
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)
    assert not InsertLogSqrt2Softmax(bits=4)(gm).modified


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_causal_zeros_stay_zero_and_codes_fit_the_bits(bits: int) -> None:
    x = tokens()
    gm = qwt_fx.capture(randomize(Tower(causal=True)), (x,))
    InsertLogSqrt2Softmax(bits=bits)(gm)
    observe(gm, [x])
    seen = []

    def visit(node: object, env: dict) -> None:
        if is_fake_quant(gm, node) and is_call(node.args[0], SOFTMAXES):  # type: ignore[attr-defined]
            exact = env[node.args[0]]  # type: ignore[attr-defined]
            seen.append((exact, fake_quant_of(gm, node)(exact)))  # type: ignore[arg-type]

    run_all(gm, x, visit)
    assert len(seen) == 2
    for exact, quantized in seen:
        assert bool((exact == 0).any())
        assert bool((quantized[exact == 0] == 0).all())
        assert len(torch.unique(quantized)) <= 2**bits


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 9"):
        InsertLogSqrt2Softmax(bits=9)


def test_softmax_that_is_returned_is_skipped() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, dim=-1)

    gm = qwt_fx.capture(Model(), (tokens(),))
    (skip,) = InsertLogSqrt2Softmax()(gm).skips
    assert skip.reason == "its output does not feed matmuls alone"


def test_recipe_quantizes_attention_end_to_end() -> None:
    x = tokens()
    q = qwt_fx.quantize(randomize(Tower()), (x,), [x, x], QuantConfig(4, 4, attention="log2"))
    targets = [str(n.target) for n in q.graph.nodes]
    assert targets.count("qwt_fx.quantize_log_sqrt2.default") == 2
