"""The quantizers of tokens in ATen operators: compilers fuse them, and a reader needs none of ours.

    s = (max(x, 0) - min(x, 0)) / (2^b - 1),  z = round(-min(x, 0) / s),  q = clamp(round(x / s + z))

of every row, operator by operator what `qwt_fx.numerics.qparams.token_qparams` and torch.ao's
`quantize_per_token` compute, bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from qwt_fx.graph.nodes import is_call
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao

aten = torch.ops.aten


def write_out_token_quantizers(gm: GraphModule, *, but: Collection[object] = ()) -> None:
    """Replace, in place, every operator of a quantizer per token by ATen operators; `but` some."""
    writer = _Writer(gm)
    targets: dict[object, Callable[[Node], None]] = {
        ops.CHOOSE_QPARAMS_PER_TOKEN: writer.qparams,
        torch_ao.QUANTIZE_PER_TOKEN: writer.quantize,
        torch_ao.DEQUANTIZE_PER_TOKEN: writer.dequantize,
    }
    found = [n for n in gm.graph.nodes if is_call(n, targets) and n.target not in but]
    for node in found:
        with gm.graph.inserting_before(node):
            targets[node.target](node)
    if found:
        clean_up(gm)


@dataclass
class _Writer:
    gm: GraphModule

    def call(self, target: Callable[..., object], *args: Argument) -> Node:
        return self.gm.graph.call_function(target, args)

    def qparams(self, node: Node) -> None:
        x, quant_max = node.args
        low, high = (
            self.call(aten.to.dtype, self.call(extreme, x, [-1], True), torch.float32)
            for extreme in (aten.amin.default, aten.amax.default)
        )
        low = self.call(aten.clamp_max.default, low, 0.0)
        high = self.call(aten.clamp_min.default, high, 0.0)
        scale = self.call(
            aten.div.Tensor,
            self.call(aten.sub.Tensor, high, low),
            float(quant_max),  # type: ignore[arg-type]
        )
        flat = self.call(aten.le.Scalar, scale, torch.finfo(torch.float32).tiny)
        scale = self.call(aten.where.ScalarSelf, flat, 1.0, scale)
        steps = self.call(aten.div.Tensor, self.call(aten.neg.default, low), scale)
        zero = self.call(aten.nan_to_num.default, self.call(aten.round.default, steps), 0.0)
        zero = self.call(aten.clamp.default, zero, 0, quant_max)
        zero = self.call(aten.to.dtype, zero, torch.int32)
        for reader in list(node.users):
            assert is_call(reader, {operator.getitem})  # the operator returns two tensors
            reader.replace_all_uses_with((scale, zero)[reader.args[1]])  # type: ignore[index]

    def quantize(self, node: Node) -> None:
        x, scale, zero_point, low, high, dtype = node.args
        scaled = self.call(aten.mul.Tensor, x, self.call(aten.reciprocal.default, scale))
        shifted = self.call(aten.add.Tensor, scaled, zero_point)
        codes = self.call(aten.clamp.default, self.call(aten.round.default, shifted), low, high)
        self._replace(node, self.call(aten.to.dtype, codes, dtype))

    def dequantize(self, node: Node) -> None:
        codes, scale, zero_point, _, _, _, dtype = node.args
        centred = self.call(aten.sub.Tensor, codes, zero_point)
        self._replace(
            node, self.call(aten.to.dtype, self.call(aten.mul.Tensor, centred, scale), dtype)
        )

    def _replace(self, node: Node, new: Node) -> None:
        new.meta.update({k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")})
        node.replace_all_uses_with(new)
