"""Scaled dot-product attention as matmul, scale, mask, softmax, matmul.

Done only where attention is to be quantized: the fused operator is faster. The scale is applied
after Q K^T, as RepQ-ViT's published attention does, so that q and k are quantized unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import argument, dtype_of, layer_name, shape_of
from qwt_fx.text.text_length import cut_to_length

aten = torch.ops.aten


def why_not_decomposable(node: Node) -> str | None:
    """Why an attention must stay fused; `None` when it can be decomposed."""
    if argument(node, 4, "dropout_p", 0.0):
        return "has dropout"
    if argument(node, 7, "enable_gqa", False):
        return "groups queries (enable_gqa)"
    query, key = shape_of(_operand(node, 0)), shape_of(_operand(node, 1))
    if query is None or key is None or not isinstance(query[-1], int):
        return "the size of its heads is not known"
    if argument(node, 5, "is_causal", False) and not (
        isinstance(query[-2], int) and isinstance(key[-2], int)
    ):
        return "is causal over a dynamic length"
    return None


def _operand(node: Node, index: int) -> Node:
    operand = argument(node, index, ("query", "key", "value")[index])
    assert isinstance(operand, Node)  # the operator's schema: three tensors
    return operand


def decompose_attention(gm: GraphModule, node: Node) -> Node:
    """Replace one `scaled_dot_product_attention` and return its softmax node.

    Call only when `why_not_decomposable` says `None`.
    """
    query, key, value = (_operand(node, i) for i in range(3))
    shape, keys = shape_of(query), shape_of(key)
    assert shape is not None and keys is not None  # why_not_decomposable
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(shape[-1]) if scale is None else float(scale)
    name = layer_name(node)

    def call(target: Callable[..., object], *args: Argument, layer: str | None = None) -> Node:
        new = gm.graph.call_function(target, args)
        if "nn_module_stack" in node.meta:
            new.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        if layer is not None:
            new.meta["layer"] = layer
        return new

    with gm.graph.inserting_before(node):
        transposed = call(aten.transpose.int, key, -2, -1)
        scores = call(aten.matmul.default, query, transposed, layer=f"{name}.matmul1")
        scores = call(aten.mul.Tensor, scores, scale)
        mask = argument(node, 3, "attn_mask")
        if argument(node, 5, "is_causal", False):
            hidden = torch.ones(shape[-2], keys[-2], dtype=torch.bool).triu(1)
            device = _device(query)
            buffer = add_tensor(gm, "causal_mask", hidden.to(device))
            if shape[-2] == keys[-2] == graph_info(gm).context_length:
                buffer = cut_to_length(gm, cut_to_length(gm, buffer, 0), 1)
            scores = call(aten.masked_fill.Scalar, scores, buffer, -math.inf)
        elif isinstance(mask, Node):
            if _is_boolean(mask):
                hidden_node = call(aten.logical_not.default, mask)
                scores = call(aten.masked_fill.Scalar, scores, hidden_node, -math.inf)
            else:
                scores = call(aten.add.Tensor, scores, mask)
        softmax = call(aten.softmax.int, scores, -1)
        output = call(aten.matmul.default, softmax, value, layer=f"{name}.matmul2")
    output.meta |= {k: v for k, v in node.meta.items() if k == "val"}
    node.replace_all_uses_with(output)
    gm.graph.erase_node(node)
    return softmax


def _device(node: Node) -> torch.device:
    value = node.meta.get("val")
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


def _is_boolean(node: Node) -> bool:
    return dtype_of(node) is torch.bool
