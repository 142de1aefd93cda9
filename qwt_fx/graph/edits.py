"""Tensors and modules that a pass registers in a graph, under fresh names."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.fx import GraphModule, Node


def described(node: Node) -> dict[str, object]:
    """What a new node in a node's place records of it: its value's shape and type, its module."""
    return {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}


def add_tensor(gm: GraphModule, base: str, value: Tensor, *, parameter: bool = False) -> Node:
    """Register a tensor under a fresh name and return its `get_attr` node.

    The name is fresh because the old tensor may be tied elsewhere. The caller sets the insertion
    point. A dotted `base`, or `layer@1` of a module called twice, becomes one flat name. `parameter`:
    for what replaces a weight, a bias or a norm's gain; constants are buffers.
    """
    stem = re.sub(r"\W", "_", base, flags=re.ASCII)
    name, count = stem, 0
    while hasattr(gm, name):
        count += 1
        name = f"{stem}_{count}"
    if parameter:
        gm.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        gm.register_buffer(name, value)
    return gm.graph.get_attr(name)


def drop_tensor(gm: GraphModule, node: object) -> None:
    """Erase a `get_attr` node that nothing reads, and its tensor with the last such node."""
    if not isinstance(node, Node) or node.op != "get_attr" or node.users:
        return
    target = str(node.target)
    gm.graph.erase_node(node)
    if not any(n.op == "get_attr" and n.target == target for n in gm.graph.nodes):
        path, _, name = target.rpartition(".")
        delattr(gm.get_submodule(path), name)


def add_module(gm: GraphModule, base: str, module: nn.Module) -> str:
    """Register a submodule under a fresh flat name and return the name."""
    name, count = base, 0
    while hasattr(gm, name):
        count += 1
        name = f"{base}_{count}"
    gm.add_module(name, module)
    return name
