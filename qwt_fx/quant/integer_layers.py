"""Finds the layers of a converted graph that integers can compute: what every backend lowers.

A converted layer multiplies two dequantized tensors. With activation codes a (uint8, zero point z,
scale s) and weight codes w (zero point v and scale t per row), exactly

    y_j = s t_j (sum_k a_k (w_jk - v_j)  -  z sum_k (w_jk - v_j)) + b_j

so the integer product and one constant per row are all there is to compute. Of a dynamic input, every
token has its own z and s, which its row of the product is corrected and multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import CONVOLUTIONS, LINEAR, SHAPE_ONLY
from qwt_fx.graph.nodes import compute_nodes, is_call, layer_name, tensor_of
from qwt_fx.quant import torch_ao
from qwt_fx.quant.quantizers import CASTS, quantizer_at
from qwt_fx.text.text_length import uncut

aten = torch.ops.aten
_QUANTIZE = frozenset({torch_ao.QUANTIZE_PER_TENSOR})
_DEQUANTIZE = frozenset({torch_ao.DEQUANTIZE_PER_TENSOR})
_QUANTIZE_TOKENS = frozenset({torch_ao.QUANTIZE_PER_TOKEN})
_DEQUANTIZE_TOKENS = frozenset({torch_ao.DEQUANTIZE_PER_TOKEN})
_DEQUANTIZE_ROWS = frozenset({torch_ao.DEQUANTIZE_PER_CHANNEL})


@dataclass(frozen=True)
class IntegerInput:
    """The activation a layer reads.

    Attributes:
        codes: the uint8 node.
        source: the floating-point node that was quantized; already divided by the token scales.
        scale, zero_point, quant_min, quant_max: of the codes.
        token_scale: (length, 1) or (length, 1, 1) float32 node, a constant or its first positions
            (`qwt_fx.text.text_length.cut_to_length`), that multiplies the dequantized
            value position by position, or `None`. A linear may multiply its product by it instead.
        moved_by: the shape-only nodes between the dequantized value and the layer, first one first.
        of_token: scale (..., 1) float32 and zero point (..., 1) int32 of a dynamic quantizer, as nodes;
            `scale` and `zero_point` are 1 and 0 then. `None` of a static one.
    """

    codes: Node
    source: Node
    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    token_scale: Node | None
    moved_by: tuple[Node, ...]
    of_token: tuple[Node, Node] | None = None


@dataclass(frozen=True)
class IntegerWeight:
    """The weight of a layer: uint8 codes (out, in, ...), float32 scale (out,), zero point (out,)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    def signed(self) -> Tensor | None:
        """codes - zero_point as int8, or `None` where that does not fit (asymmetric 8 bits)."""
        shape = (-1, *[1] * (self.codes.dim() - 1))
        values = self.codes.to(torch.int16) - self.zero_point.to(torch.int16).reshape(shape)
        fits = int(values.min()) >= -128 and int(values.max()) <= 127
        return values.to(torch.int8) if fits else None


@dataclass(frozen=True)
class IntegerLayer:
    """A linear or convolution whose operands are both integers.

    `bias`: float node or `None`. `dtype`: what the layer computes in, the type of its result.
    """

    name: str
    node: Node
    input: IntegerInput
    weight: IntegerWeight
    bias: Node | None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class FloatLayer:
    """A product that stays in floating point, and why."""

    name: str
    node: Node
    reason: str


def layers_to_lower(gm: GraphModule) -> Iterator[IntegerLayer | FloatLayer]:
    """Every product of a converted graph, in graph order: in integers, or why not."""
    for node in compute_nodes(gm):
        yield _layer(gm, node)


def _layer(gm: GraphModule, node: Node) -> IntegerLayer | FloatLayer:
    name = layer_name(node)
    if node.target is not LINEAR and node.target not in CONVOLUTIONS:
        # CLIP's projections multiply by a parameter.
        if any(tensor_of(gm, _uncast(operand)) is not None for operand in node.args[:2]):
            return FloatLayer(name, node, "its parameter is not quantized")
        return FloatLayer(name, node, "a product of activations, not of an activation and a weight")
    weight, activation = weight_of(gm, node.args[1]), input_of(gm, node.args[0])
    if weight is None or activation is None:
        return FloatLayer(name, node, _why_not(gm, node, weight is None))
    bias = node.args[2] if len(node.args) > 2 else None
    cast = node.args[1]
    dtype = cast.args[1] if is_call(cast, CASTS) else torch.float32  # type: ignore[union-attr]
    assert isinstance(dtype, torch.dtype)  # the second argument of to.dtype
    return IntegerLayer(
        name, node, activation, weight, bias if isinstance(bias, Node) else None, dtype
    )


def _why_not(gm: GraphModule, node: Node, weight: bool) -> str:
    """What a layer lacks; `weight`: its weight does, not its input alone."""
    floating = [quantizer_at(gm, operand) is None for operand in node.args[:2]]
    if all(floating):
        return "it is not quantized"
    if floating[weight]:
        return f"its {'weight' if weight else 'input'} is not quantized"
    if weight:
        return "its weight is not quantized per row"
    return "its input is not quantized per tensor or per token"


def input_of(gm: GraphModule, node: Any) -> IntegerInput | None:
    """The quantized activation this value is, or `None`."""
    moved: list[Node] = []
    while is_call(node, SHAPE_ONLY):
        moved.append(node)
        node = node.args[0]
    node = _uncast(node)
    if is_call(node, _DEQUANTIZE_TOKENS) and is_call(node.args[0], _QUANTIZE_TOKENS):
        return _dynamic_input(node, tuple(reversed(moved)))
    token_scale = None
    if is_call(node, {aten.mul.Tensor}) and is_call(node.args[0], _DEQUANTIZE):
        token_scale = node.args[1]
        if tensor_of(gm, uncut(token_scale)) is None:
            return None
        node = node.args[0]
    if not is_call(node, _DEQUANTIZE) or not is_call(node.args[0], _QUANTIZE):
        return None
    codes = node.args[0]
    source, *limits = codes.args
    if list(node.args[1:]) != limits:
        return None
    scale, zero_point, low, high = limits[:4]
    return IntegerInput(
        codes, source, float(scale), int(zero_point), int(low), int(high), token_scale,
        tuple(reversed(moved)),
    )  # fmt: skip


def _dynamic_input(node: Node, moved: tuple[Node, ...]) -> IntegerInput | None:
    codes, *qparams = node.args[:6]
    assert isinstance(codes, Node)  # the quantizer in front of it
    source, scale, zero_point, low, high, _ = codes.args
    if qparams != list(codes.args[1:]) or not isinstance(source, Node):
        return None
    assert isinstance(scale, Node) and isinstance(zero_point, Node)  # tensors of the graph
    limits = (int(low), int(high))  # type: ignore[arg-type]
    return IntegerInput(codes, source, 1.0, 0, *limits, None, moved, (scale, zero_point))


def weight_of(gm: GraphModule, node: Any) -> IntegerWeight | None:
    """The integer weight this value dequantizes row by row, or `None`."""
    node = _uncast(node)
    if not is_call(node, _DEQUANTIZE_ROWS) or node.args[3] != 0:
        return None
    codes, scale, zero_point = (tensor_of(gm, a) for a in node.args[:3])
    if codes is None or scale is None or zero_point is None:
        return None
    return IntegerWeight(codes, scale, zero_point, int(node.args[5] + 1).bit_length() - 1)


def _uncast(node: Any) -> Any:
    """What a value of a half-precision model was before its cast: q/dq compute in float32."""
    return node.args[0] if is_call(node, CASTS) else node
