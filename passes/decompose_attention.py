"""Decomposes fused attention, so that q, k, v and the softmax can be quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from qwt_fx.capture.attention import decompose_attention, why_not_decomposable
from qwt_fx.graph.aten import SDPA
from qwt_fx.graph.nodes import layer_name
from qwt_fx.graph.pass_base import Change, Pass, Skip


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """softmax(scale Q K^T + mask) V in five operators instead of one, for every attention.

    Masks are kept: a causal flag becomes a buffer, a boolean mask a fill with -inf, a float mask
    an addition. Run again, it finds no fused attention and changes nothing.
    """

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        for node in list(gm.graph.find_nodes(op="call_function", target=SDPA)):
            name = layer_name(node)
            if reason := why_not_decomposable(node):
                yield Skip(name, reason)
                continue
            decompose_attention(gm, node)
            yield Change(name, "decomposed into matmul, softmax, matmul")
