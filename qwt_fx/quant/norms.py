"""Which norms can have their scale moved into the linears that read them, and which cannot.

RepQ-ViT's reparameterization changes a norm's output, so it is legal only when every reader is a
linear that can be changed to match, through ops that move elements but keep the last dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import LAYER_NORM, LINEAR, RMS_NORM, SHAPE_ONLY
from qwt_fx.graph.constants import constant_tensor
from qwt_fx.graph.nodes import argument, is_call, keeps_last_dim, layer_name, tensor_of
from qwt_fx.quant.fake_quant import is_fake_quant

NORMS = frozenset({LAYER_NORM, RMS_NORM})


@dataclass(frozen=True)
class NormReaders:
    """The linears that read a norm and the fake_quants between; `reason` when it must be skipped."""

    linears: tuple[Node, ...] = ()
    fake_quants: tuple[Node, ...] = ()
    reason: str | None = None


def _describe(node: Node) -> str:
    if node.op == "output":
        return "is an output of the model"
    return f"feeds {node.name} ({node.target}), not a linear"


def norm_readers(gm: GraphModule, norm: Node) -> NormReaders:
    """Every reader of a norm's output, or the reason why its output must stay as it is."""
    linears: list[Node] = []
    fake_quants: list[Node] = []
    pending = [(norm, user) for user in norm.users]
    while pending:
        source, node = pending.pop(0)
        if is_call(node, SHAPE_ONLY):
            if not keeps_last_dim(node):
                return NormReaders(reason=f"feeds {node.name}, which moves its last dimension")
            pending += [(node, user) for user in node.users]
        elif is_fake_quant(gm, node):
            fake_quants.append(node)
            pending += [(node, user) for user in node.users]
        elif is_call(node, {LINEAR}) and node.args[0] is source and source not in node.args[1:]:
            if tensor_of(gm, _weight(gm, node)) is None:
                return NormReaders(reason=f"the weight of {layer_name(node)} is computed")
            bias = argument(node, 2, "bias")
            if bias is not None and constant_tensor(gm, bias) is None:
                return NormReaders(reason=f"the bias of {layer_name(node)} is computed")
            linears.append(node)
        else:
            return NormReaders(reason=_describe(node))
    if not linears:
        return NormReaders(reason="feeds no linear")
    return NormReaders(tuple(linears), tuple(dict.fromkeys(fake_quants)))


def _weight(gm: GraphModule, linear: Node) -> object:
    weight = linear.args[1]
    while is_fake_quant(gm, weight):
        assert isinstance(weight, Node)
        weight = weight.args[0]
    return weight


def weight_node(gm: GraphModule, layer: Node) -> Node | None:
    """The `get_attr` of a layer's weight, behind its fake_quant if it has one."""
    node = _weight(gm, layer)
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def norm_affine(norm: Node) -> tuple[object, object]:
    """The nodes (or `None`) of a norm's weight and bias; an RMSNorm has no bias."""
    weight = argument(norm, 2, "weight")
    return weight, (argument(norm, 3, "bias") if norm.target is LAYER_NORM else None)


def why_affine_is_fixed(gm: GraphModule, norm: Node) -> str | None:
    """Why a norm's own scale and shift cannot be rewritten; `None` when they can."""
    shape = argument(norm, 1, "normalized_shape")
    if not isinstance(shape, list | tuple) or len(shape) != 1:
        return f"normalizes {shape}, not the last dimension alone"
    for kind, node in zip(("weight", "bias"), norm_affine(norm), strict=True):
        if node is not None and tensor_of(gm, node) is None:
            return f"its {kind} is computed"
    return None


def why_not_reparameterizable(gm: GraphModule, norm: Node) -> str | None:
    """Why a norm cannot be reparameterized; `None` when it can."""
    return why_affine_is_fixed(gm, norm) or norm_readers(gm, norm).reason
