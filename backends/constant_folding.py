"""Computes once what depends on parameters alone, such as a position table resized to the model's grid.

Weights stay integers behind their dequantization, and tensors of half precision stay so behind a cast:
both are stored small. What only moves elements of a parameter costs nothing at run time and stays, too,
and so does what grows much: a bias for every pair of positions, gathered from a table.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from qwt_fx.graph.constants import constant_tensor
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.nodes import ancestors, is_call, is_constant, is_move, tensor_of
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.quant.quantizers import CASTS, DEQUANTIZE

_MOST_GROWTH = 4


def fold_constants(gm: GraphModule) -> list[str]:
    """Replace, in place, what depends on parameters alone by its value, bit for bit the same.

    Returns the names of the nodes that were replaced.
    """
    constant = {n for n in gm.graph.nodes if n.op == "call_function" and is_constant(n)}
    folded = []
    for node in list(gm.graph.nodes):
        if node not in constant or not set(node.users) - constant or not _computes(node):
            continue
        value = constant_tensor(gm, node)
        if value is None or value.numel() > _MOST_GROWTH * _stored(gm, node):
            continue  # several tensors, whose readers are folded; or too large
        with gm.graph.inserting_before(node):
            new = add_tensor(gm, node.name, value.contiguous())
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        folded.append(node.name)
    if folded:
        clean_up(gm)
    return folded


def _stored(gm: GraphModule, node: Node) -> int:
    """Elements of the tensors that a constant is computed from."""
    tensors = [tensor_of(gm, n) for n in ancestors(node)]
    return sum(t.numel() for t in tensors if t is not None)


def _computes(node: Node) -> bool:
    """Whether more than moves and casts stand behind a constant, and no stored integers do."""
    calls = [n for n in ancestors(node) if n.op == "call_function"]
    if any(is_call(n, DEQUANTIZE) for n in calls):
        return False
    return any(not is_move(n) and not is_call(n, CASTS) for n in calls)
