"""What can be asked of the nodes of a captured graph."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qwt_fx.errors import PreconditionError
from qwt_fx.graph.aten import CONVOLUTIONS, LINEAR, MATMULS, MOVES, OTHER_PRODUCTS, SDPA, SHAPE_ONLY

aten = torch.ops.aten


def get_attr(gm: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return operator.attrgetter(path)(gm)


def find_node(gm: GraphModule, name: str) -> Node:
    """The node with this name. Raises `PreconditionError` when there is none."""
    node: Node
    for node in gm.graph.nodes:
        if node.name == name:
            return node
    raise PreconditionError(f"the graph has no node {name!r}")


def is_call(node: object, targets: Container[object]) -> bool:
    """Whether this is a call of one of the given functions."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def ancestors(node: Node) -> set[Node]:
    """The node and every node its value is computed from."""
    reached: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in reached:
            reached.add(current)
            pending.extend(current.all_input_nodes)
    return reached


def is_constant(node: Node) -> bool:
    """Whether the node's value depends on no input (parameters, buffers and functions of them)."""
    return all(n.op != "placeholder" for n in ancestors(node))


def tensor_of(gm: GraphModule, node: object) -> Tensor | None:
    """The tensor a `get_attr` node reads; `None` for any other argument."""
    if isinstance(node, Node) and node.op == "get_attr":
        value = get_attr(gm, str(node.target))
        if isinstance(value, Tensor):
            return value
    return None


def argument(node: Node, index: int, name: str, default: object = None) -> Any:
    """An argument of a call, given by position or by keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def weight_layers(gm: GraphModule) -> Iterator[Node]:
    """Linears and convolutions in graph order."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and (node.target is LINEAR or node.target in CONVOLUTIONS):
            yield node


def compute_nodes(gm: GraphModule) -> Iterator[Node]:
    """Every node that multiplies matrices: linears, convolutions, matmuls, attention, the rest."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and (
            node.target is LINEAR
            or node.target in CONVOLUTIONS
            or node.target in MATMULS
            or node.target in OTHER_PRODUCTS
            or node.target is SDPA
        ):
            yield node


def layer_name(node: Node) -> str:
    """The layer's name: its parameter's name without `.weight` / `_weight`, else the node's."""
    return str(node.meta.get("layer", node.name))


def strip_weight(parameter: str) -> str:
    """`a.b.in_proj_weight` -> `a.b.in_proj`, `a.b.weight` -> `a.b`."""
    for suffix in (".weight", "_weight"):
        if parameter.endswith(suffix):
            return parameter[: -len(suffix)]
    return parameter


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...] | None:
    """The (possibly symbolic) shape recorded at capture; `None` where nothing was recorded."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def dtype_of(node: object) -> torch.dtype | None:
    """The dtype recorded at capture; `None` where nothing was recorded."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def is_move(node: Node) -> bool:
    """Whether the node only moves elements, or is an element of what does."""
    return is_call(node, MOVES) or getattr(node.target, "__name__", "") == "getitem"


def keeps_last_dim(node: Node) -> bool:
    """Whether a shape-only op leaves the last dimension's elements in place and order."""
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None or not before or not after or before[-1] != after[-1]:
        return False
    rank = len(before)
    if node.target is aten.transpose.int:
        return all(int(d) % rank != rank - 1 for d in node.args[1:3])  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        return int(node.args[1][-1]) % rank == rank - 1  # type: ignore[index,arg-type]
    if node.target in (aten.select.int, aten.slice.Tensor):
        return int(argument(node, 1, "dim", 0)) % rank != rank - 1
    if node.target is aten.roll.default:
        dims = argument(node, 2, "dims", [])
        return bool(dims) and all(int(d) % rank != rank - 1 for d in dims)
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        # (..., h, w) -> (..., w) keeps whole last rows; a merge that happens to end in the same
        # size, (a, b) -> (..., b), does too, because elements stay in row-major order.
        return True
    return True


def through_shape_ops(node: Node) -> Node:
    """Walk up through shape-only ops that keep the last dimension, to the value they move."""
    while is_call(node, SHAPE_ONLY) and keeps_last_dim(node):
        source = node.args[0]
        assert isinstance(source, Node)  # a shape-only op reads a node: checked by keeps_last_dim
        node = source
    return node
