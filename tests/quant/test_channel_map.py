from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from toys import WIDTH, Block, Tower, randomize, tokens

import qwt_fx
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.quant.channel_map import NotMapped, feeds_attention, value_map


def _layer(gm: GraphModule, name: str) -> Node:
    return next(n for n in weight_layers(gm) if layer_name(n) == name)


def test_separate_projections_map_one_to_one() -> None:
    gm = qwt_fx.capture(randomize(Tower(1)), (tokens(),))
    mapped = value_map(gm, _layer(gm, "blocks.0.out").args[0])
    assert layer_name(mapped.producer) == "blocks.0.v"
    assert mapped.rows.tolist() == list(range(WIDTH))


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_multi_head_attention_are_the_last_third(batch_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            return self.attn(x, x, x, need_weights=False)[0]

    gm = qwt_fx.capture(Model().eval(), (tokens(),))
    mapped = value_map(gm, _layer(gm, "attn.out_proj").args[0])
    assert layer_name(mapped.producer) == "attn.in_proj"
    assert mapped.rows.tolist() == list(range(2 * WIDTH, 3 * WIDTH))


def test_interleaved_heads_are_followed() -> None:
    """Heads of (q, k, v) triples, as some models lay their rows out: the map is not a plain third."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (2, 3, -1)).transpose(1, 2).unbind(3)
            a = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(a.transpose(1, 2).flatten(2))

    gm = qwt_fx.capture(Model().eval(), (tokens(),))
    rows = value_map(gm, _layer(gm, "out").args[0]).rows.tolist()
    half = WIDTH // 2
    assert rows == [*range(2 * half, 3 * half), *range(5 * half, 6 * half)]


class _Shared(Block):
    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).unflatten(-1, (2, -1)).transpose(1, 2)
        a = nn.functional.scaled_dot_product_attention(v, v, v)
        return self.out(a.transpose(1, 2).flatten(2))


class _Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v * 2.0)
        return self.out(a.transpose(1, 2).flatten(2))


class _Read(Block):
    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        heads = [p.unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q(x), self.k(x), v)]
        a = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(a.transpose(1, 2).flatten(2)) + v


class _Grouped(Block):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = (p(x)[..., :8].unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.k, self.v))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Shared(), "something else reads"),
        (_Gated(), "do not come from a linear through moves alone"),
        (_Read(), "something else reads the values"),
        (_Grouped(), "do not come from a linear through moves alone"),
    ],
)
def test_near_misses_say_why(model: nn.Module, reason: str) -> None:
    gm = qwt_fx.capture(model.eval(), (tokens(),))
    with pytest.raises(NotMapped, match=reason):
        value_map(gm, _layer(gm, "out").args[0])


def test_what_no_attention_made_is_not_mapped() -> None:
    gm = qwt_fx.capture(randomize(Tower(1)), (tokens(),))
    with pytest.raises(NotMapped, match="not the output of an attention"):
        value_map(gm, _layer(gm, "blocks.0.fc2").args[0])


def test_only_projections_feed_attention() -> None:
    gm = qwt_fx.capture(randomize(Tower(1)), (tokens(),))
    found = {layer_name(n): feeds_attention(gm, n) for n in weight_layers(gm)}
    assert [n for n, feeds in found.items() if feeds] == ["blocks.0.k", "blocks.0.v"]
    assert torch.is_tensor(tokens())
