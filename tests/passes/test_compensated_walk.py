"""Blocks compensated on the layers' own walk: same fits, each block run once, later layers know it."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import api, steps
from qwt_fx.calibrate.compensators import InputLinear
from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.layer_settings import LayerSettings
from qwt_fx.graph import runner
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import is_call, layer_name
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.passes import CalibrateLayers, InsertCompensation, InsertObservers
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_nodes

KINDS = ("qwt", "lowrank:4", "int8", "affine")
BATCHES = [tokens(32, 6, seed=s) for s in range(4)]
FRESH = tokens(64, 6, seed=99)
# Weights rounded to the nearest of 8 levels leave a compensation something to do.
ROUGH = LayerSettings(refit=False, rounding="nearest", bias_correction=False)


def _graphs(blocks: int) -> tuple[GraphModule, GraphModule]:
    """The floating-point graph of a tower and one with observers."""
    reference = qwt_fx.capture(randomize(Tower(blocks)), (BATCHES[0],))
    observed = copy.deepcopy(reference)
    InsertObservers(QuantConfig(3, 8))(observed)
    return reference, observed


@pytest.mark.parametrize("target", ["local", "fp"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_block_gets_what_a_walk_of_its_own_gives_it(kind: str, target: str) -> None:
    reference, observed = _graphs(1)
    settings = CompensationSettings(kind, target)
    together, apart = copy.deepcopy(observed), observed
    CalibrateLayers(reference, BATCHES, ROUGH, compensation=settings)(together)
    CalibrateLayers(reference, BATCHES, ROUGH)(apart)
    InsertCompensation(reference, BATCHES, **vars(settings))(apart)
    assert graph_info(together).compensations == graph_info(apart).compensations
    (record,) = graph_info(together).compensations.values()
    assert record["applied"]
    assert torch.equal(together(FRESH), apart(FRESH))
    assert torch.equal(api.convert(together)(FRESH), together(FRESH))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_fitted_on_the_compensated_stream(kind: str) -> None:
    """A range behind a compensated block is that of what is read there now."""
    reference, observed = _graphs(3)
    plain = copy.deepcopy(observed)
    settings = CompensationSettings(kind, "fp")
    CalibrateLayers(reference, BATCHES, ROUGH)(plain)
    result = CalibrateLayers(reference, BATCHES, ROUGH, compensation=settings)(observed)
    compensated = graph_info(observed).compensations
    assert [name for name, found in compensated.items() if found["applied"]]
    assert {c.node for c in result.changes} >= compensated.keys() - {s.node for s in result.skips}
    scales = [_scales(gm, "blocks.2") for gm in (plain, observed)]
    assert scales[0].keys() == scales[1].keys()
    assert any(not torch.equal(scales[0][name], scales[1][name]) for name in scales[0])
    with torch.no_grad():
        exact = reference(FRESH)
        assert sqnr_db(exact, observed(FRESH)) > sqnr_db(exact, plain(FRESH))


def _scales(gm: GraphModule, block: str) -> dict[str, Any]:
    modules = [gm.get_submodule(str(n.target)) for n in fake_quant_nodes(gm)]
    return {
        m.name: m.scale
        for m in modules
        if isinstance(m, FakeQuant) and m.name.startswith(block) and "compensation" not in m.name
    }


@pytest.mark.parametrize("target", ["local", "fp"])
def test_every_block_runs_once(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, observed = _graphs(3)
    ran: Counter[tuple[bool, str]] = Counter()
    execute = runner.execute

    def counted(gm: GraphModule, node: Node, env: dict[Node, Any]) -> Any:
        if is_call(node, {LINEAR}):
            ran[gm is reference, layer_name(node)] += 1
        return execute(gm, node, env)

    monkeypatch.setattr(runner, "execute", counted)
    layers = LayerSettings(target=target)
    settings = CompensationSettings("qwt", target)
    CalibrateLayers(reference, BATCHES, layers, compensation=settings)(observed)
    blocks = {key: count for key, count in ran.items() if "blocks." in key[1]}
    assert {floating for floating, _ in blocks} == {True, False}
    assert set(blocks.values()) == {len(BATCHES)}


def test_one_sample_calibrates_and_says_why_it_compensates_nothing() -> None:
    reference, observed = _graphs(1)
    settings = CompensationSettings("qwt", "fp")
    result = CalibrateLayers(reference, [tokens(1, 6)], ROUGH, compensation=settings)(observed)
    assert [s.reason for s in result.skips] == ["one calibration sample: none can be held out"]
    assert not graph_info(observed).compensations
    assert torch.isfinite(observed(FRESH)).all()


def test_seconds_of_a_compensation_are_not_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the fit of a block, 100 s, and the end of a layer's group, 1 s, move."""
    now = [0.0]

    def tick(seconds: float) -> None:
        now[0] += seconds

    fit = InputLinear.fit

    def slow(self: InputLinear, *sums: Any) -> Any:
        tick(100.0)
        return fit(self, *sums)

    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(InputLinear, "fit", slow)
    graph, _ = _graphs(2)
    prepared = api.prepare(graph, QuantConfig(4, 4, compensation="qwt"))
    seconds: dict[str, float] = {}
    groups: list[tuple[int, int]] = []

    def progress(phase: str, done: int, count: int) -> None:
        groups.append((done, count))
        tick(1.0)

    api.calibrate(prepared, [b[:6] for b in BATCHES[:2]], seconds=seconds, progress=progress)
    assert seconds["compensate"] == 200.0  # the last block's, too, which no layer follows
    assert seconds["calibrate"] == len(groups) == 8  # q, k and v are one
