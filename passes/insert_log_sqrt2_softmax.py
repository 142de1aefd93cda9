"""Puts the log-sqrt2 quantizer at softmax outputs (RepQ-ViT section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from qwt_fx.capture.attention import decompose_attention, why_not_decomposable
from qwt_fx.errors import ConfigError
from qwt_fx.graph.aten import MATMULS, SDPA, SHAPE_ONLY, SOFTMAXES
from qwt_fx.graph.edits import add_module, described
from qwt_fx.graph.nodes import is_call, layer_name
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.numerics.qparams import LOG_SQRT2, QuantSpec
from qwt_fx.quant.fake_quant import FakeQuant, is_fake_quant


@dataclass(frozen=True)
class InsertLogSqrt2Softmax(Pass):
    """Put a log-sqrt2 `FakeQuant`, switched off, behind every softmax that a matmul reads.

    Fused attention is decomposed first. Codes are -2 log2(a / s), so small probabilities keep
    their relative precision; exact zeros (a causal mask) stay zero.

    Attributes:
        bits: 2..8; or a function of the product's layer name that gives them, `None` for a softmax that
            stays in floating point.
        reserve_zero: the last code means 0, so that `bits` bits hold every value; `False` gives
            the published 2^bits + 1 values, which no such integer holds.

    Run again, it finds every softmax taken and changes nothing. Raises `ConfigError` for bits out
    of range.
    """

    bits: int | Callable[[str], int | None] = 4
    reserve_zero: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, int) and not 2 <= self.bits <= 8:
            raise ConfigError(f"InsertLogSqrt2Softmax.bits: got {self.bits}, wanted 2..8")

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        for node in list(gm.graph.find_nodes(op="call_function", target=SDPA)):
            if reason := why_not_decomposable(node):
                yield Skip(layer_name(node), reason)
                continue
            decompose_attention(gm, node)
        for node in [n for n in gm.graph.nodes if is_call(n, SOFTMAXES)]:
            if any(is_fake_quant(gm, user) for user in node.users):
                continue  # taken already
            readers = list(_readers(node))
            if not readers or not all(is_call(r, MATMULS) for r in readers):
                yield Skip(node.name, "its output does not feed matmuls alone")
                continue
            product = layer_name(readers[0])
            bits = self.bits if isinstance(self.bits, int) else self.bits(product)
            if bits is None:
                yield Skip(product, "left in floating point by the configuration")
                continue
            spec = QuantSpec(bits, scheme=LOG_SQRT2, reserve_zero=self.reserve_zero)
            name = f"{product}.probabilities"
            target = add_module(gm, "fake_quant_0", FakeQuant(spec, name))
            with gm.graph.inserting_after(node):
                call = gm.graph.call_module(target, (node,))
            node.replace_all_uses_with(call, delete_user_cb=lambda user, c=call: user is not c)
            call.meta = described(node)
            yield Change(name, f"log-sqrt2, {bits} bits")


def _readers(node: Node) -> Iterator[Node]:
    """Readers of a value through ops that only move elements."""
    for user in node.users:
        if is_call(user, SHAPE_ONLY):
            yield from _readers(user)
        else:
            yield user
