"""Activations that a kernel computes right behind its product."""

from __future__ import annotations

import torch
from torch.fx import Node

from qwt_fx.graph.nodes import argument, is_call

aten = torch.ops.aten
_MULTIPLY = frozenset({aten.mul.Tensor, aten.mul.Scalar})
QUICK_GELU_FACTOR = 1.702


def fused_activation(product: Node) -> tuple[str, Node]:
    """The activation that is the only reader of a product, and the node of its result.

    ("none", product) where there is none.
    """
    readers = list(product.users)
    if len(readers) == 1 and is_call(readers[0], {aten.gelu.default}):
        kind = argument(readers[0], 1, "approximate", "none")
        return ("gelu_tanh" if kind == "tanh" else "gelu"), readers[0]
    if len(readers) == 2:
        for scaled, result in (readers, readers[::-1]):
            if _is_quick_gelu(product, scaled, result):
                return "quick_gelu", result
    return "none", product


def _is_quick_gelu(product: Node, scaled: Node, result: Node) -> bool:
    """product * sigmoid(1.702 * product), with nothing else reading what is in between."""
    if not is_call(scaled, _MULTIPLY) or not is_call(result, _MULTIPLY):
        return False
    if not _is_pair(scaled, product, QUICK_GELU_FACTOR) or len(scaled.users) != 1:
        return False
    (gate,) = scaled.users
    return (
        is_call(gate, {aten.sigmoid.default})
        and set(gate.users) == {result}
        and _is_pair(result, product, gate)
    )


def _is_pair(node: Node, one: object, other: object) -> bool:
    return tuple(node.args) in ((one, other), (other, one))
