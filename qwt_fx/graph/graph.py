"""What is read from, and attached to, a captured graph: op tables, node queries, parameters, records.

A captured graph is a `torch.fx.GraphModule` of ATen ops. Two kinds of records travel with it:
`node.meta["layer"]`, the name of a linear, convolution or matmul in the source model, and
`gm.meta["qwt_fx"]`, a `GraphInfo`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qwt_fx.errors import PreconditionError

aten = torch.ops.aten

LINEAR = aten.linear.default
LAYER_NORM = aten.layer_norm.default
RMS_NORM = aten.rms_norm.default
SDPA = aten.scaled_dot_product_attention.default
CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.convolution.default}
)
MATMULS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default})
# Products that no pass quantizes; they are listed so that none goes unreported.
OTHER_PRODUCTS = frozenset(
    {
        aten.conv3d.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
        aten.addmm.default, aten.addmv.default, aten.baddbmm.default, aten.mv.default,
        aten.bilinear.default,
    }
)  # fmt: skip
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})

# Ops that move elements without changing one, and that a per-last-channel quantizer commutes with
# as long as the last dimension stays the last one (`keeps_last_dim` checks that).
SHAPE_ONLY = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.roll.default,
        aten.detach.default,
    }
)

_INFO_KEY = "qwt_fx"


@dataclass(frozen=True)
class Block:
    """A transformer block: its name in the source model and the node names of its boundary values."""

    name: str
    input: str
    output: str


@dataclass
class GraphInfo:
    """Records that belong to a graph, copied and saved with it.

    Attributes:
        blocks: transformer blocks in execution order.
        passes: what each pass that ran did: `{"pass", "changes", "skips"}`, in order.
        compensations: block name -> `{"r2", "r2_held_out", "applied", "parameters", ...}`.
        layers: layer name -> measurements of that layer (`sqnr_db`, ...).
        constant_token: the id whose keys and values are constants at position 0; `None` if none.
        end_of_text: the node, made of the ids alone, that tells the one position of each text the
            output reads, where nothing behind it matters and shorter ids are accepted; `None` for a
            graph of fixed length.
        context_length: the most ids a graph of any length takes; `None` for one of fixed length.
        fixed_length: why a graph of token ids has a fixed length; `None` for others.
        unstorable: why the graph cannot be saved, lowered or exported; `None` when it can.
    """

    blocks: list[Block] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    compensations: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    unstorable: str | None = None
    constant_token: int | None = None
    end_of_text: str | None = None
    context_length: int | None = None
    fixed_length: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def graph_info(gm: GraphModule) -> GraphInfo:
    """The records of a captured graph. Raises `PreconditionError` for a graph without them."""
    info = gm.meta.get(_INFO_KEY)
    if not isinstance(info, GraphInfo):
        raise PreconditionError(
            "this GraphModule was not made by qwt_fx.capture: it has no block records; "
            "call qwt_fx.capture(model, example_inputs) first"
        )
    return info


def set_graph_info(gm: GraphModule, info: GraphInfo) -> None:
    """Attach records to a graph."""
    gm.meta[_INFO_KEY] = info


def has_graph_info(gm: GraphModule) -> bool:
    """Whether the graph carries qwt_fx records."""
    return isinstance(gm.meta.get(_INFO_KEY), GraphInfo)


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


def is_call(node: object, targets: Iterable[Any]) -> bool:
    """Whether this is a call of one of the given functions."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def ancestors(node: Node) -> set[Node]:
    """The node and every node its value is computed from."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found


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


def add_tensor(gm: GraphModule, base: str, value: Tensor, *, parameter: bool = False) -> Node:
    """Register a tensor under a fresh name and return its `get_attr` node.

    The name is fresh because the old tensor may be tied elsewhere. The caller sets the insertion
    point. A dotted `base`, or `layer@1` of a module called twice, becomes one flat name.
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


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
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


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """The (possibly symbolic) shape recorded at capture; `None` where nothing was recorded."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


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
