"""Recognizes an RMSNorm that a model writes out in separate operators, and fuses it.

    y = w * (x * rsqrt(mean(x^2, -1) + eps))          arXiv 1910.07467, eq. 4

Hugging Face's models and older timm versions compute it like this; the reparameterization needs to
see one norm with one weight.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import RMS_NORM
from qwt_fx.graph.dead_code import remove_dead_nodes
from qwt_fx.graph.edits import described
from qwt_fx.graph.nodes import argument, dtype_of, is_call, is_constant, shape_of

aten = torch.ops.aten
_MUL, _ADDS = aten.mul.Tensor, frozenset({aten.add.Tensor, aten.add.Scalar})


def fuse_rms_norms(gm: GraphModule) -> int:
    """Replace every written-out RMSNorm by `aten.rms_norm`; returns how many were found.

    Left alone: one whose inner values something else reads, or that normalizes other dimensions than
    the last. A weight behind a cast stays outside the norm.
    """
    count = 0
    for root in [n for n in gm.graph.nodes if is_call(n, {aten.rsqrt.default})]:
        match = _match(root)
        if match is None:
            continue
        x, weight, eps, last = match
        width = x.meta["val"].shape[-1]
        with gm.graph.inserting_before(last):
            new = gm.graph.call_function(RMS_NORM, (x, [width], weight, eps))
        new.meta = described(last)
        last.replace_all_uses_with(new)
        count += 1
    remove_dead_nodes(gm)
    return count


def _match(rsqrt: Node) -> tuple[Node, Node | None, float, Node] | None:
    """(x, weight, eps, the node whose value is the norm's output), or `None`."""
    total = rsqrt.args[0]
    if not is_call(total, _ADDS) or not isinstance(total, Node):
        return None
    mean, eps = total.args[0], total.args[1]
    if not isinstance(eps, int | float) or not is_call(mean, {aten.mean.dim}):
        return None
    assert isinstance(mean, Node)
    square = mean.args[0]
    last_dim = argument(mean, 1, "dim") == [-1] and argument(mean, 2, "keepdim", False) is True
    if not last_dim or not isinstance(square, Node):
        return None
    x = _squared(square)
    inner = _only_user(rsqrt)
    if x is None or inner is None or not is_call(inner, {_MUL}) or _other(inner, rsqrt) is not x:
        return None
    if any(len(n.users) != 1 for n in (square, mean, total)) or not _same_dtype(x, inner):
        return None
    outer = _only_user(inner)
    if outer is not None and is_call(outer, {_MUL}):
        weight = _other(outer, inner)
        if isinstance(weight, Node) and _is_channel_weight(weight, x) and _same_dtype(x, outer):
            return x, weight, float(eps), outer
    return x, None, float(eps), inner


def _squared(node: Node) -> Node | None:
    """x where the node is x^2."""
    source = node.args[0] if node.args else None
    power = is_call(node, {aten.pow.Tensor_Scalar}) and node.args[1] == 2
    product = is_call(node, {_MUL}) and node.args[0] is node.args[1]
    square = is_call(node, {aten.square.default})
    return source if isinstance(source, Node) and (power or product or square) else None


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _other(product: Node, operand: Node) -> object:
    """The other operand of a product of two."""
    first, second = product.args[:2]
    return second if first is operand else first


def _is_channel_weight(node: Node, x: Node) -> bool:
    shape, width = shape_of(node), x.meta["val"].shape[-1]
    return is_constant(node) and shape == (width,)


def _same_dtype(first: Node, second: Node) -> bool:
    return dtype_of(first) is not None and dtype_of(first) == dtype_of(second)
