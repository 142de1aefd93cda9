"""Graphs that the user captured with `torch.export`, given to capture, prepare and quantize."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import symbolic_trace
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.errors import CaptureError
from qwt_fx.graph.graph_info import graph_info

CONFIG = QuantConfig(w_bits=6, a_bits=6, recipe="repq-vit", compensation="qwt")


def exported(model: nn.Module, x: Tensor) -> ExportedProgram:
    return export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=1024)},))


@pytest.mark.parametrize("form", ["program", "module"])
def test_three_words_on_an_exported_graph_equal_quantize_on_the_model(form: str) -> None:
    model, x = randomize(Tower()), tokens(6)
    program = exported(model, x)
    given = program if form == "program" else program.module()
    gm = qwt_fx.capture(given, (x,)) if form == "program" else given
    prepared = qwt_fx.prepare(gm, CONFIG)
    assert torch.equal(prepared(x), model(x))
    q = qwt_fx.convert(qwt_fx.calibrate(prepared, [x]))
    wanted = qwt_fx.quantize(model, (x,), [x], CONFIG)
    assert torch.equal(q(x), wanted(x))
    assert [b.name for b in graph_info(q).blocks] == ["blocks.0", "blocks.1"]
    assert qwt_fx.qparams(q).keys() == qwt_fx.qparams(wanted).keys()


def test_the_graph_given_is_not_changed() -> None:
    model, x = randomize(Tower(1)), tokens()
    module = exported(model, x).module()
    code, state = module.code, {k: v.clone() for k, v in module.state_dict().items()}
    qwt_fx.quantize(module, (x,), [x], CONFIG)
    assert module.code == code
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_fixed_batch_and_graphs_of_other_makers_are_refused_with_the_remedy() -> None:
    model, x = randomize(Tower(1)), tokens()
    with pytest.raises(CaptureError, match=r"input 'x' was exported for a batch of 3 alone.*Dim"):
        qwt_fx.prepare(export(model, (x,)).module(), CONFIG)
    with pytest.raises(CaptureError, match=r"batch of 3 alone"):
        qwt_fx.capture(export(model, (x,)), (x,))
    traced = symbolic_trace(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4)))
    with pytest.raises(CaptureError, match=r"torch.export did not make.*qwt_fx.capture"):
        qwt_fx.prepare(traced, CONFIG)
    captured = qwt_fx.capture(traced, (x,))  # but capture exports it
    assert torch.equal(captured(x), traced(x))


class InPlace(nn.Module):
    """Adds to a temporary in place, as some models do."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        return y


def test_in_place_operators_need_the_program() -> None:
    x = tokens()
    program = exported(InPlace(), x)
    assert torch.equal(qwt_fx.capture(program, (x,))(x), x * 2 + 1)
    with pytest.raises(CaptureError, match=r"writes to its input: give the ExportedProgram"):
        qwt_fx.capture(program.module(), (x,))


class Pooled(nn.Module):
    """Token ids to the mean of their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(10, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.table(ids).mean(1))


def test_an_exported_text_graph_has_the_length_it_was_exported_for() -> None:
    ids = torch.arange(12).reshape(2, 6) % 10
    gm = qwt_fx.capture(exported(Pooled(), ids), (ids,))
    assert graph_info(gm).fixed_length == "the graph was exported before qwt-fx saw the model"
