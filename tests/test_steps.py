"""The order of the data-dependent steps: ranges once, and told to the caller when they are known."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_nodes, fake_quant_of

BATCHES = [tokens(6, seed=i) for i in range(2)]
CONFIG = QuantConfig(4, 4, recipe="repq-vit")


def _prepared(config: QuantConfig) -> torch.fx.GraphModule:
    graph = qwt_fx.capture(randomize(Tower()), (BATCHES[0],))
    return qwt_fx.prepare(graph, config)


@pytest.mark.parametrize(
    "config",
    [CONFIG, CONFIG.replace(recipe="best"), CONFIG.replace(attention="log2", compensation="qwt")],
    ids=str,
)
def test_ranges_are_told_once_when_all_are_known(config: QuantConfig) -> None:
    prepared = _prepared(config)
    told: list[Any] = []

    def ranges_found() -> None:
        modules = [fake_quant_of(prepared, n) for n in fake_quant_nodes(prepared)]
        assert modules
        assert all(m.calibrated and m.mode is Mode.ON for m in modules)
        told.append((any(m.spec.ch_axis == -1 for m in modules), prepared(BATCHES[0])))

    calibrated = qwt_fx.calibrate(prepared, BATCHES, ranges_found=ranges_found)
    [(before_anything_moved, output)] = told
    assert before_anything_moved == (config.recipe == "repq-vit")
    assert torch.equal(output, calibrated(BATCHES[0])) == (config.recipe == "best")


def test_each_range_of_the_published_procedure_is_searched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = _prepared(CONFIG)
    searched: Counter[str] = Counter()
    observe = FakeQuant.observe

    def counted(module: FakeQuant, x: torch.Tensor) -> None:
        searched[module.name] += 1
        observe(module, x)

    monkeypatch.setattr(FakeQuant, "observe", counted)
    qwt_fx.calibrate(prepared, BATCHES)
    activations = {n: c for n, c in searched.items() if not n.endswith(".weight")}
    assert activations
    assert set(activations.values()) == {1}


def test_nothing_quantized_is_told_at_once() -> None:
    told = []
    qwt_fx.calibrate(
        _prepared(CONFIG.replace(w_bits=32, a_bits=32)),
        BATCHES,
        ranges_found=lambda: told.append(1),
    )
    assert told == [1]


def test_a_compensation_that_was_asked_for_and_is_not_possible_is_told() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).relu())

    asked = CONFIG.replace(compensation="qwt")
    why = "compensation 'qwt' was asked for, but no block has one: no block was found"
    with pytest.warns(UserWarning, match=why):
        qwt_fx.quantize(Plain(), (BATCHES[0],), BATCHES, asked)
    qwt_fx.quantize(Plain(), (BATCHES[0],), BATCHES, CONFIG)  # nothing to tell: not asked for
    told: list[str] = []
    qwt_fx.calibrate(_prepared(asked), BATCHES, tell=told.append)
    assert not told
    qwt_fx.calibrate(_prepared(asked), [BATCHES[0][:1]], tell=told.append)
    (line,) = told
    assert line.endswith("no block has one: one calibration sample: none can be held out")
