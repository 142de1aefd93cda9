from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node
from qwt_fx.passes import DecomposeAttention
from qwt_fx.quant.fake_quant import fake_quant_nodes
from qwt_fx.text.token_ids import TokenMask
from qwt_fx.text.token_map import token_mask

LENGTH = 9
END = 40


class _Text(nn.Module):
    """A small text tower; `pool` says what the output reads, `visible` breaks the causal mask."""

    def __init__(self, pool: str = "end", visible: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(END + 1, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(8),
                    "attn": nn.MultiheadAttention(8, 2, batch_first=True),
                    "fc": nn.Linear(8, 8),
                }
            )
            for _ in range(2)
        )
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        if visible:
            mask[2, 3] = 0.0
        self.register_buffer("mask", mask if causal else torch.zeros(LENGTH, LENGTH))
        self.pool = pool

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            n = layer["norm"](x)
            x = x + layer["attn"](n, n, n, need_weights=False, attn_mask=self.mask)[0]
            x = x + layer["fc"](x)
        if self.pool == "all":
            return x
        if self.pool == "last":
            return x[:, -1]
        return x[torch.arange(x.shape[0], device=x.device), ids.argmax(-1)]


def _ids(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, END, (batch, LENGTH), generator=generator)
    for row, end in enumerate((2, 5, 8, 3)[:batch]):
        ids[row, end] = END
    return ids


@pytest.mark.parametrize("decomposed", [False, True])
def test_rows_behind_the_end_are_masked_in_every_layout(decomposed: bool) -> None:
    ids = _ids()
    gm = qwt_fx.capture(_Text().eval(), (ids,))
    if decomposed:
        DecomposeAttention()(gm)
    prepared = qwt_fx.prepare(gm, QuantConfig())
    nodes = [n for n in fake_quant_nodes(prepared) if n.args[0].op != "get_attr"]
    mask = token_mask(prepared, ids, nodes)
    assert mask.reason is None
    assert set(mask.rows) == {n.name for n in nodes}
    kept = int((torch.tensor([2, 5, 8, 3]) + 1).sum())
    assert all(int(rows.sum()) == kept for rows in mask.rows.values())


def test_features_do_not_depend_on_masked_positions() -> None:
    model, ids = _Text().eval(), _ids()
    changed = ids.clone()
    behind = torch.arange(LENGTH) > ids.argmax(-1)[:, None]
    changed[behind] = 1
    assert torch.equal(model(ids), model(changed))
    assert not torch.equal(ids, changed)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Text(visible=True), "attention is not causal"),
        (_Text(causal=False), "attention is not causal"),
    ],
)
def test_attention_that_looks_ahead_gets_no_mask(model: nn.Module, reason: str) -> None:
    gm = qwt_fx.capture(model.eval(), (_ids(),))
    mask = token_mask(gm, _ids(), list(gm.graph.nodes))
    assert mask.reason is not None
    assert reason in mask.reason
    assert not mask.rows


@pytest.mark.parametrize("pool", ["all", "last"])
def test_every_position_counts_when_the_output_reads_the_last(pool: str) -> None:
    gm = qwt_fx.capture(_Text(pool).eval(), (_ids(),))
    boundary = find_node(gm, graph_info(gm).blocks[0].input) if graph_info(gm).blocks else None
    nodes = [boundary] if boundary is not None else [n for n in gm.graph.nodes if n.users]
    mask = token_mask(gm, _ids(), nodes)
    assert mask.reason is None
    assert mask.rows
    assert all(bool(rows.all()) for rows in mask.rows.values())


def test_images_get_no_mask() -> None:
    gm = qwt_fx.capture(nn.Linear(8, 8), (torch.randn(2, 3, 8),))
    assert token_mask(gm, torch.randn(2, 3, 8), []).reason == (
        "the input is not one tensor of token ids"
    )


def test_rows_that_count_leave_out_padding_and_a_constant_first_position() -> None:
    rows = torch.tensor([True, True, False])
    proof = TokenMask({"x": rows}, {"x": torch.arange(3), "y": torch.tensor([1, 0, 2])})

    def counting(name: str, behind_end: bool, first: bool) -> list[bool] | None:
        found = proof.counting(name, behind_end=behind_end, first=first)
        return None if found is None else found.tolist()

    assert counting("x", True, True) == [True, True, False]
    assert counting("x", True, False) == [False, True, False]
    assert counting("x", False, False) == [False, True, True]
    assert counting("y", True, False) == [True, False, True]
    assert counting("x", False, True) is None
    assert counting("z", True, False) is None
