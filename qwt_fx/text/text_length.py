"""The two lengths of a text tower's graph: any at run time, the whole context in its records.

Passes read the shapes recorded at capture (`node.meta["val"]`) to tell samples from positions and
calibrate on whole contexts. So a graph of dynamic length records the shapes of full length, with
the batch as its only symbol, exactly as a graph of fixed length does; only its input has both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from qwt_fx.graph.graph_info import graph_info, has_graph_info
from qwt_fx.graph.nodes import find_node, is_call
from qwt_fx.graph.runner import evaluate, nodes_between, placeholders
from qwt_fx.graph.sample_ids import Size

_SHORTEST = 3  # a context below this holds no text


def text_ids(inputs: Iterable[object]) -> Tensor | None:
    """The input, when it is one tensor of token ids (n, context) int; else `None`."""
    values = list(inputs)
    ids = values[0] if len(values) == 1 else None
    if not isinstance(ids, Tensor):
        return None
    integer = ids.dtype in (torch.int64, torch.int32)
    return ids if integer and ids.dim() == 2 and ids.shape[1] >= _SHORTEST else None


def record_full_length(gm: GraphModule, ids: Tensor) -> None:
    """Record the shapes that ids of full length (n, context) give, with a symbol for n.

    The ids themselves keep both symbols: torch checks inputs against them, and is told here that
    the whole context is as good as less.
    """
    (source,) = placeholders(gm)
    length = source.meta["val"].shape[1].node.expr

    def full_size(size: Size) -> Size:
        if not isinstance(size, torch.SymInt):
            return size
        # Put in, not run again: torch 2.11 fixes the batch while a graph runs on symbols.
        whole = size.node.expr.subs(length, ids.shape[1])
        if whole.is_Integer:
            return int(whole)
        symbols = size.node.shape_env
        assert symbols is not None  # captured sizes have one
        return symbols.create_symintnode(whole, hint=None)

    def full(value: object) -> object:
        if not isinstance(value, FakeTensor):
            return full_size(value) if isinstance(value, torch.SymInt) else value
        with value.fake_mode:
            return torch.empty_strided(
                [full_size(s) for s in value.shape],
                [full_size(s) for s in value.stride()],
                dtype=value.dtype,
                device=value.device,
            )

    for node in gm.graph.nodes:
        if node is not source and "val" in node.meta:
            node.meta["val"] = pytree.tree_map(full, node.meta["val"])
    constraints: Any = gm.range_constraints
    constraints[length] = ValueRanges(1, ids.shape[1])


aten = torch.ops.aten


def trim(tower: nn.Module, ids: Tensor, multiple: int = 4) -> Tensor:
    """Cut token ids to the longest text of the batch.

    Args:
        tower: the graph that will be given the ids; for any other module, or a graph of fixed
            length, the ids are returned whole.
        ids: (n, context) int.
        multiple: the length is rounded up to a multiple of this, so that compiled kernels meet few
            different lengths.

    Returns (n, length) int, length <= context; the graph's outputs are the same up to rounding.
    """
    if not isinstance(tower, GraphModule) or not has_graph_info(tower) or ids.numel() == 0:
        return ids
    name = graph_info(tower).end_of_text
    if name is None:
        return ids
    end = find_node(tower, name)
    positions = run_on_ids(tower, end, ids)
    length = -(-(int(positions.max()) + 1) // multiple) * multiple
    if length >= ids.shape[1]:
        return ids
    cut = ids[:, :length].contiguous()
    # The end is found as the graph finds it, whatever its rule; a rule that the cut ids no longer
    # follow (a text without its end token) gives the whole batch back.
    return cut if torch.equal(run_on_ids(tower, end, cut), positions) else ids


def run_on_ids(gm: GraphModule, node: Node, ids: Tensor) -> Tensor:
    """Value of a node that depends on the ids alone."""
    (source,) = placeholders(gm)
    with torch.no_grad():
        value: Tensor = evaluate(gm, nodes_between(gm, {source}, node), {source: ids})[node]
    return value


def cut_to_length(gm: GraphModule, constant: Node, axis: int) -> Node:
    """A constant with one entry per position of the text, cut to the length of the ids at run time.

    In a graph of fixed length, the constant itself. The caller sets the insertion point.
    """
    if not has_graph_info(gm) or graph_info(gm).end_of_text is None:
        return constant
    return gm.graph.call_function(aten.slice.Tensor, (constant, axis, 0, length_node(gm)))


def length_node(gm: GraphModule) -> Node:
    """The node that reads the length of the ids, made in front of every operator if there is none."""
    (ids,) = placeholders(gm)
    for user in ids.users:
        if is_call(user, {aten.sym_size.int}) and user.args == (ids, 1):
            return user
    with gm.graph.inserting_after(ids):
        node = gm.graph.call_function(aten.sym_size.int, (ids, 1))
    node.meta["val"] = graph_info(gm).context_length
    return node


def uncut(node: object) -> object:
    """The constant that `cut_to_length` cut, or the node itself."""
    if isinstance(node, Node) and is_call(node, {aten.slice.Tensor}):
        return node.args[0] if is_call(node.args[-1], {aten.sym_size.int}) else node
    return node
