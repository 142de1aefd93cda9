"""Cuts a batch of texts to its longest caption, where the graph is proved not to read further.

In a causal text tower pooled at the end of the text, positions behind the longest caption of a
batch cannot matter. `qwt_fx.capture` proves it, records the node that tells each text's end in
`GraphInfo.end_of_text`, and leaves the length of such a graph dynamic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qwt_fx.graph.graph import ancestors, find_node, graph_info, has_graph_info, is_call
from qwt_fx.graph.runner import Env, execute, placeholders

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
    env: Env = {source: ids}
    needed = ancestors(node)
    with torch.no_grad():
        for step in gm.graph.nodes:
            if step in needed and step is not source:
                env[step] = execute(gm, step, env)
    value: Tensor = env[node]
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


def uncut(node: Any) -> Any:
    """The constant that `cut_to_length` cut, or the node itself."""
    if is_call(node, {aten.slice.Tensor}) and is_call(node.args[-1], {aten.sym_size.int}):
        return node.args[0]
    return node
