from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qwt_fx
from qwt_fx import api
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.passes import QuantizeEmbeddings
from qwt_fx.passes.quantize_embeddings import quantize_rows

IDS = torch.tensor([[1, 5, 2], [0, 3, 3]])


class _Text(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_worked_example() -> None:
    codes, scale = quantize_rows(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
    assert codes.tolist() == [[127, -50], [0, 0]]
    assert scale.flatten().tolist() == pytest.approx([0.01, 1.0])


def test_rows_are_within_half_a_step() -> None:
    gm = qwt_fx.capture(_Text(), (IDS,))
    exact = gm(IDS)
    table = gm.get_parameter("table.weight").detach().clone()
    result = QuantizeEmbeddings()(gm)
    assert [c.node for c in result.changes] == ["table"]
    codes, scale = quantize_rows(table)
    assert bool(((codes * scale - table).abs() <= scale / 2 * 1.0001).all())
    assert 0.0 < float((gm(IDS) - exact).detach().abs().max()) < 0.1


def test_second_run_is_unmodified() -> None:
    gm = qwt_fx.capture(_Text(), (IDS,))
    QuantizeEmbeddings()(gm)
    assert not QuantizeEmbeddings()(gm).modified


def test_a_tied_table_is_skipped() -> None:
    gm = qwt_fx.capture(_Text(tied=True), (IDS,))
    code = gm.code
    (skip,) = QuantizeEmbeddings()(gm).skips
    assert skip.reason == "something else reads the table"
    assert gm.code == code


def test_the_stored_table_is_an_integer(tmp_path: Path) -> None:
    q = api.quantize(_Text().eval(), (IDS,), [IDS], QuantConfig(8, 8))
    tables = [v for v in q.state_dict().values() if v.dtype is torch.int8]
    assert [tuple(t.shape) for t in tables] == [(7, 4)]
    api.save(q, tmp_path / "a")
    assert torch.equal(api.load(tmp_path / "a")(IDS), q(IDS))
    kept = api.quantize(_Text().eval(), (IDS,), [IDS], QuantConfig(8, 8, embedding_bits=32))
    assert not any(v.dtype is torch.int8 for v in kept.state_dict().values())


def test_bits_are_validated() -> None:
    with pytest.raises(ConfigError, match="wanted 8"):
        QuantizeEmbeddings(bits=4)
    with pytest.raises(ConfigError, match="embedding_bits"):
        QuantConfig(embedding_bits=4)
