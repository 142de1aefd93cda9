"""Turns the integer layers of a converted graph into `qwt_fx::int8_linear`.

A quantizer writes signed codes, a' = a - 128, which is the same operator with other limits. With weight
codes w and zero point v, either w - v fits int8 and is the weight, or w - 128 is and the sum of the
activation's codes corrects it:

    sum_k (a_k - z)(w_k - v)  ==  sum_k a'_k w'_k  -  v' sum_k a'_k  -  z' sum_k (w'_k - v')

Of a dynamic input z' is a number of each row, which the operator multiplies by the last sum.

with a' = a - 128, z' = z - 128, w' = w - 128, v' = v - 128 (or w' = w - v, v' = 0): all exact integers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from qwt_fx.backends.activations import fused_activation
from qwt_fx.backends.cuda.int8_gemm import (
    INT8_LINEAR,
    INT_MM,
    INT_MM_MULTIPLE,
    LONGEST_SUM,
    TRITON,
)
from qwt_fx.backends.lowering import (
    LAYERS,
    SHIFT,
    LayerRewriter,
    signed_matrix,
    why_no_row_product,
)
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.nodes import is_call, tensor_of
from qwt_fx.quant import torch_ao
from qwt_fx.quant.integer_layers import IntegerInput, IntegerLayer

aten = torch.ops.aten


def why_not(layer: IntegerLayer) -> str | None:
    """Why a layer stays in floating point; `None` when it need not."""
    if layer.weight.codes[0].numel() > LONGEST_SUM:
        return f"more than {LONGEST_SUM} products to a sum may leave int32"
    return why_no_row_product(layer)


def _stack(layers: Sequence[IntegerLayer]) -> tuple[Tensor, Tensor | None]:
    """`signed_matrix` of layers that read the same codes: rows one below the other."""
    pairs = [signed_matrix(layer.weight) for layer in layers]
    matrix = torch.cat([codes for codes, _ in pairs])
    if all(zero_point is None for _, zero_point in pairs):
        return matrix, None
    zeros = (codes.new_zeros(len(codes), dtype=torch.int32) for codes, _ in pairs)
    return matrix, torch.cat(
        [v if v is not None else z for (_, v), z in zip(pairs, zeros, strict=True)]
    )


@dataclass
class Int8Lowering(LayerRewriter):
    """Rewrites layers to `qwt_fx::int8_linear`.

    `gemm`: "triton" or "int_mm"; the latter only where sizes allow.
    """

    gemm: str
    _signed: dict[Node, Node] = field(default_factory=dict, init=False)
    _zeros: dict[Node, Node] = field(default_factory=dict, init=False)  # of tokens, signed

    def lower(self, layers: Sequence[IntegerLayer]) -> None:
        """Compute layers that read the same value with one operator, at the first one's place.

        One layer may be a convolution or end in an activation; several are linears, see
        `groups_of`.
        """
        first = layers[0]
        activation, results = "none", [layer.node for layer in layers]
        if len(layers) == 1:
            activation, results[0] = fused_activation(first.node)
        codes = self._signed_codes(first)
        with self.gm.graph.inserting_before(first.node):
            product = self._linear(layers, self.rows(first, codes), activation)
            product = self.result(first, product)
            outputs = [product] if len(layers) == 1 else self._split(product, layers)
        for old, new in zip(results, outputs, strict=True):
            self.replace(old, new)

    def _signed_codes(self, layer: IntegerLayer) -> Node:
        """The signed codes of the value a layer reads, by a quantizer beside the unsigned one."""
        activation = layer.input
        unsigned = activation.codes
        if unsigned not in self._signed:
            low, high = activation.quant_min - SHIFT, activation.quant_max - SHIFT
            target, scale, zero = self._qparams(activation)
            with self.gm.graph.inserting_after(zero if isinstance(zero, Node) else unsigned):
                self._signed[unsigned] = self.call(
                    target,
                    unsigned.args[0],  # not `source`: a layer lowered before replaced it
                    scale, zero, low, high, torch.int8,
                )  # fmt: skip
        return self._signed[unsigned]

    def _qparams(self, activation: IntegerInput) -> tuple[OpOverload, Argument, Argument]:
        """The quantizer of signed codes, its scale and its zero point."""
        if activation.of_token is None:
            return torch_ao.QUANTIZE_PER_TENSOR, activation.scale, activation.zero_point - SHIFT
        scale, zero_point = activation.of_token
        if zero_point not in self._zeros:
            with self.gm.graph.inserting_before(activation.codes):
                self._zeros[zero_point] = self.call(aten.sub.Tensor, zero_point, SHIFT)
        return torch_ao.QUANTIZE_PER_TOKEN, scale, self._zeros[zero_point]

    def _linear(self, layers: Sequence[IntegerLayer], codes: Node, activation: str) -> Node:
        quantizer, base = layers[0].input, layers[0].name
        weight, zero_point = _stack(layers)
        scale = torch.cat([layer.weight.scale for layer in layers])
        sums, shift = weight.sum(dim=1, dtype=torch.int64), None  # of w' - v'
        if zero_point is not None:
            sums = sums - weight.shape[1] * zero_point.long()
            shift = add_tensor(self.gm, f"{base}_weight_shift", zero_point)
        row_scale, row_zero, factor = quantizer.token_scale, None, SHIFT - quantizer.zero_point
        if quantizer.of_token is not None:
            row_scale, zero_point_of_token = quantizer.of_token
            row_zero, factor = self._zeros[zero_point_of_token], -1
        constants = {
            "weight_int8": weight,
            "scale": (scale.double() * quantizer.scale).float(),
            "offset": (factor * sums).to(torch.int32),
        }
        nodes = [add_tensor(self.gm, f"{base}_{name}", value) for name, value in constants.items()]
        bias = layers[0].bias if len(layers) == 1 else self._stacked_bias(layers)
        fits = all(size % INT_MM_MULTIPLE == 0 for size in weight.shape)
        gemm = INT_MM if self.gemm == INT_MM and fits else TRITON
        node = self.call(
            INT8_LINEAR, codes, *nodes, bias, row_scale, shift, row_zero,
            layers[0].dtype, activation, None, 0, -128, 127, gemm,
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

    def _split(self, node: Node, layers: Sequence[IntegerLayer]) -> list[Node]:
        parts, start = [], 0
        for layer in layers:
            end = start + len(layer.weight.scale)
            parts.append(self.call(aten.slice.Tensor, node, -1, start, end))
            start = end
        return parts


def groups_of(gm: GraphModule, layers: Sequence[IntegerLayer]) -> list[list[IntegerLayer]]:
    """Linears that read the same codes alike, as groups; every other layer alone.

    One product reads the activation once and fills a GPU better than several narrow ones: q, k and
    v of their own, or a compensation beside them. A layer that ends in an activation stays alone,
    and so does one whose bias is computed.
    """
    groups: dict[Hashable, list[IntegerLayer]] = {}
    for layer in layers:
        constant = layer.bias is None or tensor_of(gm, layer.bias) is not None
        alone = layer.node.target is not LINEAR or not constant
        alone = alone or fused_activation(layer.node)[0] != "none"
        value = (layer.input.codes, layer.input.moved_by, layer.input.token_scale)
        key: Hashable = layer.node if alone else value
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
