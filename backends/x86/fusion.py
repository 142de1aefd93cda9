"""Activations and quantizers that oneDNN's kernels apply to their product before it is written.

A linear whose only reader is an activation and then a quantizer writes uint8 codes at once: neither
the float product nor the float activation goes through memory. An activation that no quantizer
follows is left to the compiler, and so is the residual sum, which it merges with the norm behind it.

QuickGELU(x) = SiLU(1.702 x) / 1.702 is the kernel's `swish`, which computes SiLU whatever argument
it is given: 1.702 goes into the product's scale and bias and 1 / 1.702 into the quantizer's scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.backends.activations import QUICK_GELU_FACTOR, fused_activation
from qwt_fx.backends.x86.saturation import NO_POST_OP, QLINEAR
from qwt_fx.graph.dead_code import remove_dead_nodes
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.nodes import is_call, tensor_of
from qwt_fx.quant import torch_ao

aten = torch.ops.aten
FUSED = "x86_fused"  # meta: what a product applies before it is written
_UINT8_MAX = 255

# Our name -> the kernel's post op, its arguments and its algorithm.
_POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "none": NO_POST_OP,
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "quick_gelu": ("swish", [], ""),
    "silu": ("swish", [], ""),
    "relu": ("relu", [], ""),
}
_SINGLE = {aten.relu.default: "relu", aten.silu.default: "silu"}


def fuse_quantizers(gm: GraphModule) -> None:
    """Fuse every product, activation and quantizer in a chain that nothing else reads, in place."""
    for node in list(gm.graph.nodes):
        if is_call(node, {QLINEAR}):
            _fuse(gm, node)


def _fuse(gm: GraphModule, product: Node) -> None:
    name, result = _activation(product)
    quantizer = _only_reader(result)
    if quantizer is not None and is_call(quantizer, {aten.to.dtype}):  # of a half-precision model
        quantizer = _only_reader(quantizer)
    if quantizer is None or not is_call(quantizer, {torch_ao.QUANTIZE_PER_TENSOR}):
        return
    _, scale, zero_point, low, high, dtype = quantizer.args
    if low != 0 or dtype is not torch.uint8:
        return
    factor = QUICK_GELU_FACTOR if name == "quick_gelu" else 1.0
    _scale_product(gm, product, factor)
    qparams = (float(scale) * factor, zero_point, torch.uint8)  # type: ignore[arg-type]
    product.args = (*product.args[:7], *qparams, *_POST_OPS[name])
    product.meta[FUSED] = [f for f in (name, "quantize") if f != "none"]
    codes = product
    if high != _UINT8_MAX:  # the kernel saturates at 255, fewer bits at less
        with gm.graph.inserting_after(product):
            codes = gm.graph.call_function(aten.clamp_max.default, (product, high))
    for new in {product, codes}:
        if isinstance(quantizer.meta.get("val"), Tensor):
            new.meta["val"] = quantizer.meta["val"]
    quantizer.replace_all_uses_with(codes)
    remove_dead_nodes(gm)


def _activation(product: Node) -> tuple[str, Node]:
    reader = _only_reader(product)
    if reader is not None and reader.op == "call_function" and reader.target in _SINGLE:
        return _SINGLE[reader.target], reader
    return fused_activation(product)


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _scale_product(gm: GraphModule, product: Node, factor: float) -> None:
    """Multiply the product and its bias by a factor, through the weight's scales."""
    if factor == 1.0:
        return
    args = list(product.args)
    for index in (4, 6):  # the weight's scales and the bias
        value = tensor_of(gm, args[index])
        if value is not None:
            with gm.graph.inserting_before(product):
                args[index] = add_tensor(gm, f"{args[index]}_scaled", value * factor)
    product.args = tuple(args)
