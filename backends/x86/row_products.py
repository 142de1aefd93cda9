"""Which layers are one product of rows and a matrix, as every integer kernel computes it.

A linear is; so is a convolution whose windows lie side by side (a patch embedding), each window a row.
"""

from __future__ import annotations

from typing import Any

import torch

from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.nodes import argument
from qwt_fx.quant.integer_layers import IntegerLayer

aten = torch.ops.aten
_CONV2D = frozenset({aten.conv2d.default, aten.conv2d.padding})


def why_no_row_product(layer: IntegerLayer) -> str | None:
    """Why a layer is no product of rows of integers and a matrix; `None` when it is one."""
    node, found = layer.node, layer.input
    if found.token_scale is not None and (node.target is not LINEAR or found.moved_by):
        return "positions with scales of their own are moved before the product"
    if node.target is LINEAR:
        return None
    if node.target not in _CONV2D:
        return "a convolution other than conv2d"
    patch = list(layer.weight.codes.shape[2:])
    stride, padding = _pair(argument(node, 3, "stride", 1)), argument(node, 4, "padding", 0)
    dilation, groups = _pair(argument(node, 5, "dilation", 1)), argument(node, 6, "groups", 1)
    if stride != patch or dilation != [1, 1] or groups != 1 or not _no_padding(padding):
        return "a convolution whose windows overlap, leave gaps, are padded or grouped"
    return None


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * 2 if len(values) == 1 else values)]


def _no_padding(value: Any) -> bool:
    return value == "valid" if isinstance(value, str) else _pair(value) == [0, 0]
