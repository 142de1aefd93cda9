"""Rewrites one layer of a converted graph into oneDNN's u8 x s8 products.

With activation codes a (zero point z, scale s) and weight codes c (zero point v, scale t per row), the
kernel computes s t (sum_k a_k w_k - z sum_k w_k) + b for an int8 weight w and corrects z itself.

* w = c - v where that fits int8. Otherwise (asymmetric 8 bits) w = c - 128, and what is missing is
  exactly t (128 - v) times s sum_k (a_k - z): one sum a row of the activation, shared by its readers.
* Where the CPU saturates such products, w = low + high (see `saturation`), two products.
* Positions with scales of their own multiply the product, before the bias.
* A dynamic input has z and s of each token: the kernel computes t sum_k a_k w_k, and what is left is
  s_m (that - z_m t sum_k w_k) + b, which a compiler fuses into what reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from qwt_fx.backends.lowering import LayerRewriter, signed_matrix, why_no_row_product
from qwt_fx.backends.x86 import saturation
from qwt_fx.backends.x86.packed_weight import PackedWeight
from qwt_fx.backends.x86.saturation import NO_POST_OP, QLINEAR
from qwt_fx.graph.edits import add_module, add_tensor
from qwt_fx.graph.nodes import tensor_of
from qwt_fx.quant.integer_layers import IntegerLayer

aten = torch.ops.aten
QLINEAR_ADD = torch.ops.onednn.qlinear_pointwise.binary
PARTS = "x86_parts"  # meta: how many products compute the layer this node belongs to
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # what the kernel writes beside integers


def why_not(layer: IntegerLayer) -> str | None:
    """Why a layer stays in floating point; `None` when it need not."""
    if layer.input.codes.args[5] is not torch.uint8 or layer.input.quant_min < 0:
        return "its input is not quantized to uint8"
    return why_no_row_product(layer)


def _parts(matrix: Tensor, largest_code: int) -> tuple[Tensor, ...]:
    """int8 matrices (out, in) that add up to a matrix, none of which saturates on this CPU."""
    if saturation.saturates() and not saturation.fits_int16(matrix, largest_code):
        return saturation.split(matrix, largest_code)
    return (matrix,)


@dataclass
class LayerLowering(LayerRewriter):
    """Rewrites layers to oneDNN's products."""

    _sums: dict[Node, Node] = field(default_factory=dict, init=False)

    def lower(self, layer: IntegerLayer) -> None:
        """Replace a layer's node by its integer products."""
        with self.gm.graph.inserting_before(layer.node):
            product = self._product(layer, self.rows(layer, layer.input.codes))
            result = self.result(layer, product)
        self.replace(layer.node, result)

    def _product(self, layer: IntegerLayer, codes: Node) -> Node:
        activation, bias = layer.input, tensor_of(self.gm, layer.bias)
        matrix, shift = signed_matrix(layer.weight)
        parts = _parts(matrix, activation.quant_max)
        of_row = activation.token_scale if activation.of_token is None else activation.of_token[0]
        late_bias = layer.bias is not None and (bias is None or of_row is not None)
        alone = len(parts) == 1 and shift is None and of_row is None
        dtype = layer.dtype if alone and layer.dtype in _KERNEL_DTYPES else torch.float32
        scale = add_tensor(self.gm, f"{layer.name}_scale", layer.weight.scale.float().contiguous())
        zeros = add_tensor(
            self.gm, f"{layer.name}_zero", torch.zeros(len(layer.weight.scale), dtype=torch.int32)
        )
        bias_node = None
        if bias is not None and not late_bias:
            bias_node = add_tensor(self.gm, f"{layer.name}_bias", bias.detach().float())
        result = None
        for part in parts:
            packed = self.gm.graph.call_module(
                add_module(self.gm, f"{layer.name}_packed".replace(".", "_"), PackedWeight(part))
            )
            operands = (codes, activation.scale, activation.zero_point, packed, scale, zeros)
            quantizer = (1.0, 0, dtype)  # none
            if result is None:
                first = bias_node if len(parts) == 1 else None
                result = self.call(QLINEAR, *operands, first, *quantizer, *NO_POST_OP)
            else:
                added = (result, bias_node, *quantizer, 1.0, 0, "add", 1.0)
                result = self.call(QLINEAR_ADD, *operands, *added, *NO_POST_OP)
            result.meta["layer"] = layer.name
            result.meta[PARTS] = len(parts)
        assert result is not None  # a weight has a part at least
        if shift is not None:
            result = self._correct(layer, shift, codes, result)
        if activation.of_token is not None:
            sums = matrix.sum(dim=1, dtype=torch.int64).double() * layer.weight.scale.double()
            sums_node = add_tensor(self.gm, f"{layer.name}_sums", sums.float())
            missing = self.call(aten.mul.Tensor, activation.of_token[1], sums_node)
            result = self.call(aten.sub.Tensor, result, missing)
        if of_row is not None:
            result = self.call(aten.mul.Tensor, result, of_row)
        if late_bias:
            result = self.call(aten.add.Tensor, result, layer.bias)
        return result if dtype is layer.dtype else self.call(aten.to.dtype, result, layer.dtype)

    def _correct(self, layer: IntegerLayer, shift: Tensor, codes: Node, product: Node) -> Node:
        """Add t (128 - v) s sum_k (a_k - z)."""
        activation, inner = layer.input, layer.weight.codes[0].numel()
        if codes not in self._sums:
            sums = self.gm.graph.call_function(
                aten.sum.dim_IntList, (codes, [-1], True), {"dtype": torch.int32}
            )
            zeros: Argument = activation.zero_point * inner
            if activation.of_token is not None:
                zeros = self.call(aten.mul.Tensor, activation.of_token[1], inner)
            centred = self.call(aten.sub.Tensor, sums, zeros)
            self._sums[codes] = self.call(aten.to.dtype, centred, torch.float32)
        factor = -shift.double() * layer.weight.scale.double() * activation.scale
        factor_node = add_tensor(self.gm, f"{layer.name}_shift", factor.float())
        missing = self.call(aten.mul.Tensor, self._sums[codes], factor_node)
        return self.call(aten.add.Tensor, product, missing)
