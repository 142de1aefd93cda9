"""Rewrites one layer of a converted graph into oneDNN's u8 x s8 products.

With activation codes a (zero point z, scale s) and weight codes c (zero point v, scale t per row), the
kernel computes s t (sum_k a_k w_k - z sum_k w_k) + b for an int8 weight w and corrects z itself.

* w = c - v where that fits int8. Otherwise (asymmetric 8 bits) w = c - 128, and what is missing is
  exactly t (128 - v) times s sum_k (a_k - z): one sum a row of the activation, shared by its readers.
* Where the CPU saturates such products, w = low + high (see `saturation`), two products.
* Positions with scales of their own multiply the product, before the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.backends.packed_weight import PackedWeight
from qwt_fx.backends.x86 import saturation
from qwt_fx.backends.x86.row_products import why_no_row_product
from qwt_fx.backends.x86.saturation import QLINEAR
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.edits import add_module, add_tensor
from qwt_fx.graph.nodes import tensor_of
from qwt_fx.quant.integer_layers import IntegerLayer, IntegerWeight

aten = torch.ops.aten
QLINEAR_ADD = torch.ops.onednn.qlinear_pointwise.binary
PARTS = "x86_parts"  # meta: how many products compute the layer this node belongs to
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # what the kernel writes beside integers
_SHIFT = 128
_PLAIN: tuple[Any, ...] = ("none", [], "")


def why_not(layer: IntegerLayer) -> str | None:
    """Why a layer stays in floating point; `None` when it need not."""
    found = layer.input
    if found.codes.args[5] is not torch.uint8 or found.quant_min < 0:
        return "its input is not quantized to uint8"
    return why_no_row_product(layer)


@dataclass(frozen=True)
class _Weight:
    """int8 matrices (out, in) that add up to w, and v - 128 (out,) where w = c - 128, else `None`."""

    parts: tuple[Tensor, ...]
    shift: Tensor | None


def _int8(weight: IntegerWeight, largest_code: int) -> _Weight:
    signed, shift = weight.signed(), None
    if signed is None:
        signed = (weight.codes.to(torch.int16) - _SHIFT).to(torch.int8)
        shift = (weight.zero_point - _SHIFT).float()
    signed = signed.flatten(1)
    if saturation.saturates() and not saturation.fits_int16(signed, largest_code):
        return _Weight(saturation.split(signed, largest_code), shift)
    return _Weight((signed,), shift)


@dataclass
class LayerLowering:
    """Lowers the layers of one graph, in place; holds what layers share."""

    gm: GraphModule
    _codes: dict[tuple[Any, ...], Node] = field(default_factory=dict)
    _sums: dict[Node, Node] = field(default_factory=dict)

    def lower(self, layer: IntegerLayer) -> Node:
        """Replace a layer's node by its integer products; returns the node of its result."""
        found, node = layer.input, layer.node
        is_linear = node.target is LINEAR
        weight = _int8(layer.weight, found.quant_max)
        with self.gm.graph.inserting_before(node):
            codes = self._moved_codes(layer)
            if not is_linear:
                codes = self._patches(codes, layer.weight.codes.shape[2:])
            result = self._product(layer, weight, codes)
            if not is_linear:
                result = self._call(aten.permute.default, result, [0, 3, 1, 2])
        kept = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
        result.meta.update(kept)
        node.replace_all_uses_with(result)
        self.gm.graph.erase_node(node)
        return result

    def _call(self, target: Any, *args: Any) -> Node:
        return self.gm.graph.call_function(target, args)

    def _moved_codes(self, layer: IntegerLayer) -> Node:
        """The codes a layer reads, moved as its dequantized input was; once for all its readers."""
        node = layer.input.codes
        key: tuple[Any, ...] = (node,)
        for move in layer.input.moved_by:
            key = (*key, move.target, str(move.args[1:]), str(move.kwargs))
            if key not in self._codes:
                operands = (node, *move.args[1:])
                self._codes[key] = self.gm.graph.call_function(
                    move.target, operands, dict(move.kwargs)  # type: ignore[arg-type]
                )  # fmt: skip
            node = self._codes[key]
        return node

    def _patches(self, codes: Node, patch: Sequence[int]) -> Node:
        """(n, c, h, w) -> (n, h / p, w / q, c p q); what is left at the edges is cut off."""
        height, width = (int(size) for size in patch)
        codes = self._call(aten.unfold.default, codes, 2, height, height)
        codes = self._call(aten.unfold.default, codes, 3, width, width)  # (n, c, h/p, w/q, p, q)
        codes = self._call(aten.permute.default, codes, [0, 2, 3, 1, 4, 5])
        return self._call(aten.flatten.using_ints, codes, 3, 5)

    def _product(self, layer: IntegerLayer, weight: _Weight, codes: Node) -> Node:
        found, bias = layer.input, tensor_of(self.gm, layer.bias)
        late_bias = layer.bias is not None and (bias is None or found.token_scale is not None)
        alone = len(weight.parts) == 1 and weight.shift is None and found.token_scale is None
        dtype = layer.dtype if alone and layer.dtype in _KERNEL_DTYPES else torch.float32
        scale = add_tensor(self.gm, f"{layer.name}_scale", layer.weight.scale.float().contiguous())
        zeros = add_tensor(
            self.gm, f"{layer.name}_zero", torch.zeros(len(layer.weight.scale), dtype=torch.int32)
        )
        bias_node = None
        if bias is not None and not late_bias:
            bias_node = add_tensor(self.gm, f"{layer.name}_bias", bias.detach().float())
        result = None
        for part in weight.parts:
            packed = self.gm.graph.call_module(
                add_module(self.gm, f"{layer.name}_packed".replace(".", "_"), PackedWeight(part))
            )
            operands = (codes, found.scale, found.zero_point, packed, scale, zeros)
            if result is None:
                first = bias_node if len(weight.parts) == 1 else None
                result = self._call(QLINEAR, *operands, first, 1.0, 0, dtype, *_PLAIN)
            else:
                result = self._call(
                    QLINEAR_ADD, *operands, result, bias_node, 1.0, 0, dtype, 1.0, 0, "add", 1.0,
                    *_PLAIN,
                )  # fmt: skip
            result.meta["layer"] = layer.name
            result.meta[PARTS] = len(weight.parts)
        assert result is not None  # a weight has a part at least
        if weight.shift is not None:
            result = self._correct(layer, weight.shift, codes, result)
        if found.token_scale is not None:
            result = self._call(aten.mul.Tensor, result, found.token_scale)
        if late_bias:
            result = self._call(aten.add.Tensor, result, layer.bias)
        return result if dtype is layer.dtype else self._call(aten.to.dtype, result, layer.dtype)

    def _correct(self, layer: IntegerLayer, shift: Tensor, codes: Node, product: Node) -> Node:
        """Add t (128 - v) s sum_k (a_k - z)."""
        found, inner = layer.input, layer.weight.codes[0].numel()
        if codes not in self._sums:
            sums = self.gm.graph.call_function(
                aten.sum.dim_IntList, (codes, [-1], True), {"dtype": torch.int32}
            )
            centred = self._call(aten.sub.Tensor, sums, found.zero_point * inner)
            self._sums[codes] = self._call(aten.to.dtype, centred, torch.float32)
        factor = -shift.double() * layer.weight.scale.double() * found.scale
        factor_node = add_tensor(self.gm, f"{layer.name}_shift", factor.float())
        missing = self._call(aten.mul.Tensor, self._sums[codes], factor_node)
        return self._call(aten.add.Tensor, product, missing)
