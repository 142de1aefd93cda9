"""Padding masks on real text towers: applied where the graph proves them, and only there."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from zoo.measure import capture, run
from zoo.models import END, START, ZOO, Entry

import qwt_fx
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node
from qwt_fx.text.token_map import TokenMask, token_mask

TEXT = {e.name: e for e in ZOO if "text" in e.name.lower() or "Bert" in e.name}
MASKED = ("open_clip ViT-B-32 text", "transformers CLIPTextModel")
UNMASKED = {
    "open_clip ViT-B-16-SigLIP text": "attention is not causal",
    "open_clip coca_ViT-B-32 text": "aten.cat.default is not known to keep positions apart",
    "transformers BertModel": "attention is not causal",
}


@cache
def _captured(name: str) -> GraphModule:
    return capture(TEXT[name], 0)


def _inputs(entry: Entry, seed: int) -> tuple[Tensor, Tensor]:
    """Ids, and the same ids with others behind the end of each text."""
    ids = entry.inputs(3, seed)
    noise = torch.randint(0, START, ids.shape, generator=torch.Generator().manual_seed(seed + 1))
    behind = torch.arange(ids.shape[1]) > ids.argmax(1)[:, None]
    return ids, torch.where(behind, noise, ids)


def _mask(gm: GraphModule, ids: Tensor) -> TokenMask:
    return token_mask(gm, ids, [find_node(gm, b.input) for b in graph_info(gm).blocks])


def test_every_text_tower_of_the_zoo_is_looked_at() -> None:
    assert set(TEXT) == {*MASKED, *UNMASKED}


@pytest.mark.parametrize("name", MASKED)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_masked_positions_cannot_change_the_features(name: str, seed: int) -> None:
    gm, (ids, changed) = _captured(name), _inputs(TEXT[name], seed)
    mask = _mask(gm, ids)
    assert mask.reason is None
    assert len(mask.rows) == len(graph_info(gm).blocks)
    kept = torch.arange(ids.shape[1]) <= (ids == END).int().argmax(1)[:, None]
    assert all(torch.equal(rows.reshape(kept.shape), kept) for rows in mask.rows.values())
    assert torch.equal(run(gm, ids), run(gm, changed))


@pytest.mark.parametrize(("name", "reason"), UNMASKED.items())
def test_where_no_mask_applies_the_positions_do_matter(name: str, reason: str) -> None:
    gm, (ids, changed) = _captured(name), _inputs(TEXT[name], 0)
    mask = _mask(gm, ids)
    assert mask.reason is not None
    assert reason in mask.reason
    assert not mask.rows
    assert not torch.equal(run(gm, ids), run(gm, changed))


class _Counts(nn.Module):
    """Causal and pooled at the end, but every position sees how many ids are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(END + 1, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("mask", torch.full((16, 16), -torch.inf).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + (ids == 0).sum(1).float()[:, None, None]
        x = x + self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]
        return x[torch.arange(x.shape[0], device=x.device), ids.argmax(-1)]


def test_ids_that_act_beside_the_embedding_end_the_proof() -> None:
    torch.manual_seed(0)
    ids, changed = _inputs(TEXT[MASKED[0]], 3)
    gm = qwt_fx.capture(_Counts().eval(), (ids,))
    mask = token_mask(gm, ids, [n for n in gm.graph.nodes if n.users])
    assert mask.reason is not None
    assert "the ids' values act on activations beside the embedding" in mask.reason
    assert not torch.equal(run(gm, ids), run(gm, changed))
