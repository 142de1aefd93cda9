"""Values of a graph that depend on no input: masks, tables, biases put together from parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.nodes import get_attr, is_constant


def constant_value(gm: GraphModule, node: Node, cache: dict[Node, Any] | None = None) -> Any:
    """Value of a node that depends on no input; `cache` keeps values between calls."""
    known = {} if cache is None else cache
    if node not in known:
        if node.op == "get_attr":
            known[node] = get_attr(gm, str(node.target))
        else:
            args, kwargs = torch.fx.node.map_arg(
                (node.args, node.kwargs), lambda n: constant_value(gm, n, known)
            )
            assert callable(node.target)  # only call_function nodes reach this line
            known[node] = node.target(*args, **kwargs)
    return known[node]


def constant_tensor(gm: GraphModule, node: object) -> Tensor | None:
    """The tensor of an argument that depends on no input, detached; `None` for any other one."""
    if not isinstance(node, Node) or not is_constant(node):
        return None
    with torch.no_grad():
        value = constant_value(gm, node)
    return value.detach() if isinstance(value, Tensor) else None
