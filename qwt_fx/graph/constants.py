"""Values of a graph that depend on no input: masks, tables, biases put together from parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.nodes import is_constant
from qwt_fx.graph.runner import Env, Value, evaluate, nodes_between


def constant_value(gm: GraphModule, node: Node, cache: Env | None = None) -> Value:
    """Value of a node that depends on no input; `cache` keeps all that was computed between calls."""
    known: Env = {} if cache is None else cache
    needed = nodes_between(gm, known, node)
    return evaluate(gm, needed, known, keep={*known, *needed})[node]


def constant_tensor(gm: GraphModule, node: object) -> Tensor | None:
    """The tensor of an argument that depends on no input, detached; `None` for any other one."""
    if not isinstance(node, Node) or not is_constant(node):
        return None
    with torch.no_grad():
        value = constant_value(gm, node)
    return value.detach() if isinstance(value, Tensor) else None
