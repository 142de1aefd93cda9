from __future__ import annotations

import torch
from torch import Tensor, nn
from toys import Tower, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx.passes import DecomposeAttention

F = nn.functional


class _Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        self.register_buffer("added", torch.zeros(5, 5).masked_fill(hidden, -torch.inf))
        self.register_buffer("kept", ~hidden)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = q.flip(-1), q * 0.5
        if self.kind == "added":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.added.to(x.dtype))
        if self.kind == "kept":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.kept)
        if self.kind == "scaled":
            return F.scaled_dot_product_attention(q, k, v, scale=0.3)
        if self.kind == "grouped":
            return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")


def _decomposed(kind: str) -> None:
    x = tokens().double()
    model = _Attention(kind).double()
    gm = qwt_fx.capture(model, (x,))
    assert len(DecomposeAttention()(gm).changes) == 1
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)
    assert "scaled_dot_product_attention" not in op_sequence(gm)


def test_every_kind_of_mask_keeps_the_function() -> None:
    for kind in ("added", "kept", "scaled", "causal", "plain"):
        _decomposed(kind)


def test_grouped_queries_are_skipped() -> None:
    gm = qwt_fx.capture(_Attention("grouped"), (tokens(),))
    code = gm.code
    result = DecomposeAttention()(gm)
    assert [s.reason for s in result.skips] == ["groups queries (enable_gqa)"]
    assert gm.code == code


def test_op_sequence_and_idempotence() -> None:
    gm = qwt_fx.capture(randomize(Tower(1)), (tokens(),))
    DecomposeAttention()(gm)
    sequence = op_sequence(gm)
    begin = sequence.index("matmul")
    assert sequence[begin : begin + 4] == ["matmul", "mul", "softmax", "matmul"]
    assert not DecomposeAttention()(gm).modified
