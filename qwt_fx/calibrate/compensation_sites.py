"""Where the compensations of a block attach: its integer input, its last linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.nodes import argument, is_call, shape_of, tensor_of
from qwt_fx.quant.fake_quant import fake_quant_of, is_fake_quant
from qwt_fx.quant.norms import NORMS, weight_node

aten = torch.ops.aten

Reordering = tuple[Callable[..., Tensor], tuple[int | list[int], ...]]
"""An operator and its arguments after the first, the value it is applied to."""


class NoSite(Exception):
    """A block has no place for a compensation; the message says why."""


def require_channels_last(channels: int) -> None:
    """Raise `NoSite` for a block of convolutions."""
    if channels != -1:
        raise NoSite(
            f"its values have their channels in dimension {channels}, not in the last: compensate it by "
            "'qwt' or 'lowrank:R'"
        )


def integer_input(
    source: Node, members: set[Node], gm: GraphModule
) -> tuple[Node, list[Reordering]]:
    """The first quantized activation that linears of a block read: its input or the norm of it.

    `source` is the block's input, `members` the nodes its output is computed from. Also returns the
    steps that bring a value in the quantizer's layout back to that of the block's input. Raises
    `NoSite` where there is no such activation with all the input's tokens in it.
    """
    pending: list[tuple[Node, list[Reordering]]] = [(source, [])]
    while pending:
        node, steps = pending.pop(0)
        for user in (u for u in node.users if u in members):
            if is_fake_quant(gm, user) and any(is_call(u, {LINEAR}) for u in user.users):
                return user, steps
            undoing = _undoing(user)
            if undoing is not None:
                pending.append((user, [undoing, *steps]))
            elif is_call(user, NORMS):
                pending.append((user, steps))
    raise NoSite("no quantized linear reads all tokens of its input, or of the norm of it")


def _undoing(move: Node) -> Reordering | None:
    """The step that undoes a reordering of dimensions but the last; `None` for any other node."""
    shape = shape_of(move)
    if shape is None:
        return None
    rank = len(shape)
    if is_call(move, {aten.transpose.int}):
        dims = tuple(int(d) % rank for d in move.args[1:3])  # type: ignore[arg-type]
        return None if rank - 1 in dims else (aten.transpose.int, dims)
    if is_call(move, {aten.permute.default}):
        order = [int(d) % rank for d in argument(move, 1, "dims")]
        back = [order.index(d) for d in range(rank)]
        return (aten.permute.default, (back,)) if back[-1] == rank - 1 else None
    return None


def last_linear(gm: GraphModule, result: Node) -> Node:
    """The linear that a block's output adds to the rest, and that nothing else reads.

    Raises `NoSite` where the block does not end so, or the linear's parameters cannot be changed.
    """
    linears: list[Node] = []
    if is_call(result, {aten.add.Tensor}) and not result.kwargs:
        linears = [a for a in result.all_input_nodes if is_call(a, {LINEAR})]
    if len(linears) != 1:
        raise NoSite("its output is not the sum of one linear and something else")
    (linear,) = linears
    if len(linear.users) != 1:
        raise NoSite("its last linear has other readers")
    bias = argument(linear, 2, "bias")
    if weight_node(gm, linear) is None or (bias is not None and tensor_of(gm, bias) is None):
        raise NoSite("the weight or bias of its last linear is computed")
    weight = linear.args[1]
    if isinstance(weight, Node) and is_fake_quant(gm, weight):
        spec = fake_quant_of(gm, weight).spec
        if not spec.integer_zero_point or spec.ch_axis != 0:
            raise NoSite("its last linear has no integer codes per output channel to keep")
    return linear
