"""Turns the integer layers of a converted graph into `qwt_fx::int8_linear`.

A quantizer writes signed codes, a' = a - 128, which is the same operator with other limits. With weight
codes w and zero point v, either w - v fits int8 and is the weight, or w - 128 is and the sum of the
activation's codes corrects it:

    sum_k (a_k - z)(w_k - v)  ==  sum_k a'_k w'_k  -  v' sum_k a'_k  -  z' sum_k (w'_k - v')

with a' = a - 128, z' = z - 128, w' = w - 128, v' = v - 128 (or w' = w - v, v' = 0): all exact integers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.backends.activations import fused_activation
from qwt_fx.backends.cuda.int8_gemm import (
    INT8_LINEAR,
    INT_MM,
    INT_MM_MULTIPLE,
    LONGEST_SUM,
    TRITON,
)
from qwt_fx.backends.x86.row_products import why_no_row_product
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.nodes import is_call, tensor_of
from qwt_fx.quant import torch_ao
from qwt_fx.quant.integer_layers import IntegerLayer, IntegerWeight

aten = torch.ops.aten
LAYERS = "int8_layers"  # meta of an int8_linear node: the names of the layers it computes
_SHIFT = 128


@dataclass(frozen=True)
class PackedWeight:
    """w' (out, in) int8, v' (out,) int32 or `None` where all are 0, sum_k (w' - v') (out,) int64."""

    codes: Tensor
    zero_point: Tensor | None
    sums: Tensor
    scale: Tensor


def pack(weight: IntegerWeight) -> PackedWeight:
    """The weight as the kernel reads it; a convolution's as a matrix."""
    signed, zero_point = weight.signed(), None
    if signed is None:
        signed = (weight.codes.to(torch.int16) - _SHIFT).to(torch.int8)
        zero_point = (weight.zero_point.to(torch.int32) - _SHIFT).contiguous()
    matrix = signed.flatten(1).contiguous()
    sums = matrix.sum(dim=1, dtype=torch.int64)
    if zero_point is not None:
        sums = sums - matrix.shape[1] * zero_point.long()
    return PackedWeight(matrix, zero_point, sums, weight.scale)


def stack(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights that read the same codes as one, rows one below the other."""
    if len(weights) == 1:
        return weights[0]
    zero_point = None
    if any(w.zero_point is not None for w in weights):
        rows = [
            torch.zeros_like(w.sums, dtype=torch.int32) if w.zero_point is None else w.zero_point
            for w in weights
        ]
        zero_point = torch.cat(rows)
    codes, sums, scale = (
        torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "sums", "scale")
    )
    return PackedWeight(codes, zero_point, sums, scale)


def why_not(layer: IntegerLayer) -> str | None:
    """Why a layer stays in floating point; `None` when it need not."""
    if layer.weight.codes[0].numel() > LONGEST_SUM:
        return f"more than {LONGEST_SUM} products to a sum may leave int32"
    return why_no_row_product(layer)


@dataclass
class Int8Lowering:
    """Rewrites the layers of one graph; holds what layers share.

    Attributes:
        gm: the graph, changed in place.
        gemm: "triton" or "int_mm"; the latter only where sizes allow.
    """

    gm: GraphModule
    gemm: str
    _signed: dict[tuple[Node, ...], Node] = field(default_factory=dict)

    def lower(self, layers: Sequence[IntegerLayer], dtype: torch.dtype) -> None:
        """Compute layers that read the same value with one operator, at the first one's place.

        One layer may be a convolution or end in an activation; several are linears, see
        `groups_of`. `dtype`: of the results.
        """
        first = layers[0]
        activation, results = "none", [layer.node for layer in layers]
        if len(layers) == 1:
            activation, results[0] = fused_activation(first.node)
        with self.gm.graph.inserting_before(first.node):
            codes = self._codes(first)
            if first.node.target is not LINEAR:
                codes = self._patches(codes, first.weight.codes.shape[2:])
            node = self._linear(layers, codes, activation, dtype)
            if first.node.target is not LINEAR:
                node = self._call(aten.permute.default, node, [0, 3, 1, 2])
            outputs = [node] if len(layers) == 1 else self._split(node, layers)
        for old, new in zip(results, outputs, strict=True):
            new.meta.update({k: v for k, v in old.meta.items() if k in ("val", "nn_module_stack")})
            old.replace_all_uses_with(new)

    def _call(self, target: Any, *args: Any) -> Node:
        return self.gm.graph.call_function(target, args)

    def _codes(self, layer: IntegerLayer) -> Node:
        """The signed codes a layer reads, moved as its dequantized input was."""
        found = layer.input
        path: tuple[Node, ...] = (found.codes,)
        if path not in self._signed:
            limits = (found.zero_point, found.quant_min, found.quant_max)
            with self.gm.graph.inserting_after(found.codes):
                self._signed[path] = self._call(
                    torch_ao.QUANTIZE_PER_TENSOR,
                    found.codes.args[0],  # not `source`: a layer lowered before replaced it
                    found.scale,
                    *(value - _SHIFT for value in limits),
                    torch.int8,
                )
        for move in found.moved_by:
            value, path = self._signed[path], (*path, move)
            if path not in self._signed:
                with self.gm.graph.inserting_after(move):
                    self._signed[path] = self.gm.graph.call_function(
                        move.target,  # type: ignore[arg-type]
                        (value, *move.args[1:]),
                        dict(move.kwargs),
                    )
        return self._signed[path]

    def _patches(self, codes: Node, patch: Sequence[int]) -> Node:
        """(n, c, h, w) -> (n, h / p, w / q, c p q); what is left at the edges is cut off."""
        height, width = (int(p) for p in patch)
        for dim, size in ((2, height), (3, width)):
            whole = self._call(operator.floordiv, self._call(aten.sym_size.int, codes, dim), size)
            end = self._call(operator.mul, whole, size)
            codes = self._call(aten.slice.Tensor, codes, dim, 0, end)
        codes = self._call(aten.unflatten.int, codes, 3, [-1, width])
        codes = self._call(aten.unflatten.int, codes, 2, [-1, height])
        codes = self._call(aten.permute.default, codes, [0, 2, 4, 1, 3, 5])
        return self._call(aten.flatten.using_ints, codes, 3, 5)

    def _linear(
        self, layers: Sequence[IntegerLayer], codes: Node, activation: str, dtype: torch.dtype
    ) -> Node:
        found, base = layers[0].input, layers[0].name
        weight = stack([pack(layer.weight) for layer in layers])
        offset = -(found.zero_point - _SHIFT) * weight.sums
        constants = {
            "weight_int8": weight.codes,
            "scale": (weight.scale.double() * found.scale).float(),
            "offset": offset.to(torch.int32),
        }
        nodes = [add_tensor(self.gm, f"{base}_{name}", value) for name, value in constants.items()]
        bias = layers[0].bias if len(layers) == 1 else self._stacked_bias(layers)
        shift = None
        if weight.zero_point is not None:
            shift = add_tensor(self.gm, f"{base}_weight_shift", weight.zero_point)
        node = self._call(
            INT8_LINEAR, codes, *nodes, bias, found.token_scale, shift,
            dtype, activation, None, 0, -128, 127, self._gemm(weight),
        )  # fmt: skip
        node.meta[LAYERS] = [layer.name for layer in layers]
        return node

    def _stacked_bias(self, layers: Sequence[IntegerLayer]) -> Node | None:
        if all(layer.bias is None for layer in layers):
            return None
        rows = []
        for layer in layers:
            value = tensor_of(self.gm, layer.bias)
            rows.append(torch.zeros_like(layer.weight.scale) if value is None else value.float())
        return add_tensor(self.gm, f"{layers[0].name}_bias", torch.cat([r.detach() for r in rows]))

    def _gemm(self, weight: PackedWeight) -> str:
        fits = all(size % INT_MM_MULTIPLE == 0 for size in weight.codes.shape)
        return INT_MM if self.gemm == INT_MM and fits else TRITON

    def _split(self, node: Node, layers: Sequence[IntegerLayer]) -> list[Node]:
        parts, start = [], 0
        for layer in layers:
            end = start + len(layer.weight.scale)
            parts.append(self._call(aten.slice.Tensor, node, -1, start, end))
            start = end
        return parts


def groups_of(gm: GraphModule, layers: Sequence[IntegerLayer]) -> list[list[IntegerLayer]]:
    """Linears that read the same codes alike, as groups; every other layer alone.

    One product reads the activation once and fills a GPU better than several narrow ones: q, k and
    v of their own, or a compensation beside them. A layer that ends in an activation stays alone,
    and so does one whose bias is computed.
    """
    groups: dict[Any, list[IntegerLayer]] = {}
    for layer in layers:
        constant = layer.bias is None or tensor_of(gm, layer.bias) is not None
        alone = layer.node.target is not LINEAR or not constant
        alone = alone or fused_activation(layer.node)[0] != "none"
        found = layer.input
        key = layer.node if alone else (found.codes, found.moved_by, found.token_scale)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def fuse_quantizers(gm: GraphModule) -> None:
    """An int8 linear read by one quantizer of signed codes alone writes these codes itself."""
    for node in list(gm.graph.nodes):
        if not is_call(node, {torch_ao.QUANTIZE_PER_TENSOR}) or node.args[5] is not torch.int8:
            continue
        source, scale, zero_point, low, high, _ = node.args
        if not is_call(source, {INT8_LINEAR}) or set(source.users) != {node}:
            continue
        *operands, _, activation, _, _, _, _, gemm = source.args
        source.args = (
            *operands, torch.int8, activation, float(scale), zero_point, low, high, gemm
        )  # fmt: skip
        if isinstance(node.meta.get("val"), Tensor):
            source.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
