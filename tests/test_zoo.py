"""Every model of the zoo: captured, moved, batched, quantized, and nothing left out silently."""

from __future__ import annotations

import copy
import re
from functools import cache

import pytest
import torch
from torch.fx import GraphModule
from zoo.measure import Figures, capture, measure, random_model, run
from zoo.models import ZOO, Entry, images
from zoo.published import PUBLISHED, measure_published

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import compute_nodes
from qwt_fx.inspect.report import layer_rows

SAMPLES, FEWER = 128, 48  # as in the table; for the models that every run of the tests measures
# Whatever multiplies matrices, by name: an oracle that does not use the package's own tables.
PRODUCT = re.compile(r"linear|conv|matmul|\b\w*mm\b|\b\w*mv\b|einsum|attention|bilinear|\bdot\b")
NORM = re.compile(r"aten\.(layer|rms)_norm")
NOT_PRODUCT = re.compile(r"upsample|grid_sampler|native_batch_norm")


def _entries() -> list[object]:
    return [pytest.param(e, id=e.name, marks=() if e.fast else pytest.mark.slow) for e in ZOO]


each_model = pytest.mark.parametrize("entry", _entries())


@cache
def _captured(entry: Entry, strict: bool = False) -> GraphModule:
    return capture(entry, 0, strict=strict)


@cache
def _figures(entry: Entry) -> Figures:
    samples = FEWER if entry.fast else SAMPLES
    return measure(entry, samples, samples, 0)


def test_zoo_is_as_large_as_promised() -> None:
    assert len(ZOO) >= 22
    assert len({e.name for e in ZOO}) == len(ZOO)
    assert sum(e.name.startswith("timm ") for e in ZOO) >= 10
    assert sum(e.fast for e in ZOO) == 6


@each_model
def test_captured_graph_is_the_model_at_every_batch_size_and_moves_to_meta(entry: Entry) -> None:
    model, gm = random_model(entry, 0), _captured(entry)
    for batch in (1, 3):
        x = entry.inputs(batch, 7)
        torch.testing.assert_close(run(gm, x), run(model, x), rtol=1e-4, atol=1e-4)
    moved = copy.deepcopy(gm).to("meta")
    x = entry.inputs(5, 7).to("meta")
    assert moved(x).device.type == "meta"
    assert moved(x).shape[0] == 5


@each_model
def test_no_product_is_unquantized_without_a_reason(entry: Entry) -> None:
    gm = _captured(entry)
    found = set(compute_nodes(gm))
    for node in gm.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and PRODUCT.search(name) and not NOT_PRODUCT.search(name):
            assert node in found, f"{node.name}: {name}"
    prepared = qwt_fx.prepare(gm, QuantConfig(recipe="repq-vit"))
    skipped = dict(graph_info(prepared).passes[-1]["skips"])
    taken = dict(graph_info(prepared).passes[-1]["changes"])
    for node in compute_nodes(prepared):
        assert (node.meta["layer"] in taken) != (node.meta["layer"] in skipped)


@each_model
def test_figures(entry: Entry) -> None:
    figures = _figures(entry)
    assert figures.blocks > 0
    assert figures.blocks_share > 0.03, "the blocks contribute nothing: the figures are vacuous"
    # Each norm of swinv2 stands behind its branch, in front of the residual: none can be moved.
    assert (figures.reparameterized > 0) == (entry.name != "timm swinv2")
    if not figures.reparameterized:
        assert set(figures.skipped) == {
            "feeds aten.add, not a linear",
            "feeds aten.mean, not a linear",
        }
    assert figures.quantized >= 4 * figures.blocks
    # XCiT's channels attend to each other behind batch norms; folded or not, 8 bits leave it 24 dB.
    assert figures.w8a8 >= (24.0 if entry.name == "timm xcit" else 25.0)
    assert figures.compensated >= 0.75 * figures.blocks
    assert figures.w4a4_qwt - figures.w4a4 >= (0.1 if entry.name == "timm pvt_v2" else 0.2)
    norms = [n for n in _captured(entry).graph.nodes if NORM.search(str(n.target))]
    assert figures.reparameterized + sum(figures.skipped.values()) == len(norms)
    assert all(len(reason.split()) > 2 for reason in figures.skipped)


@each_model
def test_report_of_the_quantized_model_and_its_round_trip(entry: Entry, tmp_path: object) -> None:
    x = entry.inputs(8, 0)
    config = QuantConfig(8, 8, recipe="repq-vit")
    q = qwt_fx.quantize(_captured(entry), (x,), [x], config)
    for row in layer_rows(q, "model"):
        if row["w_bits"] is None and row["a_bits"] is None:
            assert row["reason"] not in (None, "not quantized"), row["name"]
    qwt_fx.save(q, f"{tmp_path}/artifact")
    assert torch.equal(run(qwt_fx.load(f"{tmp_path}/artifact"), x), run(q, x))


@pytest.mark.slow
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in ZOO if e.strict])
def test_strict_capture_gives_the_same_graph(entry: Entry) -> None:
    strict, traced = _captured(entry, strict=True), _captured(entry)
    x = entry.inputs(3, 7)
    torch.testing.assert_close(run(strict, x), run(traced, x), rtol=1e-5, atol=1e-5)
    names = [[b.name for b in graph_info(gm).blocks] for gm in (strict, traced)]
    assert names[0] == names[1]
    targets = [[n.target for n in compute_nodes(gm)] for gm in (strict, traced)]
    assert targets[0] == targets[1]


@pytest.mark.slow
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in PUBLISHED])
def test_published_sizes_lose_no_more_than_their_layers_do(entry: Entry) -> None:
    """A wrong scale, a wrong fold, a lost norm cost far more than noise of the layers' own errors.

    fastvit_mci2, deep and with random weights, makes 14 dB of layers of 24 dB and more; noise 17 dB.
    Pooling averages white noise away, but not what rounding weights does alike to every token.
    """
    figures = measure_published(entry)
    assert figures.blocks >= 12
    assert figures.floating == 0
    assert figures.least_layer_db > 20.0
    assert figures.w8a8 > min(figures.noise, figures.least_layer_db) - 6.0
    assert figures.unseen > 10.0


@pytest.mark.slow
def test_folding_the_norms_of_mobileclip2_is_exact() -> None:
    entry = next(e for e in PUBLISHED if "fastvit" in e.name)
    x = images(64)(2, 0).double()
    model = random_model(entry, 0).double()
    assert any("BatchNorm" in type(m).__name__ for m in model.modules())
    gm = qwt_fx.capture(model, (x,))
    assert not any("batch_norm" in str(n.target) for n in gm.graph.nodes)
    torch.testing.assert_close(run(gm, x), run(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in ZOO if "Bert" in e.name])
def test_post_norm_model_keeps_its_norms(entry: Entry) -> None:
    """Each norm of BERT feeds the next residual too; only the pooler's may be changed."""
    figures = _figures(entry)
    assert figures.skipped == {"feeds aten.add, not a linear": 2 * figures.blocks}
    assert figures.reparameterized == 1
