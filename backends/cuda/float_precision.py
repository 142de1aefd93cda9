"""Casts what a lowered graph computes in float32 to half precision; quantizers stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.backends.cuda.int8_gemm import INT8_LINEAR
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.aten import CONVOLUTIONS, LAYER_NORM, LINEAR, MATMULS, RMS_NORM, SDPA
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.nodes import is_call, is_move, tensor_of
from qwt_fx.quant import operators as ops
from qwt_fx.quant.quantizers import DEQUANTIZE, QUANTIZE

aten = torch.ops.aten
# Their constants are scales and biases, which stay exact.
_KEEP = DEQUANTIZE | QUANTIZE | {
    ops.CHOOSE_QPARAMS_PER_TOKEN, ops.FAKE_QUANTIZE_LOG_SQRT2, ops.FAKE_QUANTIZE_AFFINE, INT8_LINEAR,
}  # fmt: skip
# Readers that take one dtype only: an input of the model is cast for them, directly or behind what
# passes its dtype on, and for nothing else, because nothing else tells floating-point inputs from
# token ids in a graph without shapes.
_ONE_DTYPE = CONVOLUTIONS | MATMULS | {LINEAR, LAYER_NORM, RMS_NORM, SDPA}
_PASSES_ON = frozenset(
    {
        aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.clamp.default,
        aten.cat.default, aten.pad.default, aten.constant_pad_nd.default,
        aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
        aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
    }
)  # fmt: skip


def cast_floating(gm: GraphModule, dtype: torch.dtype) -> None:
    """Cast in place; inputs and outputs of the graph keep their dtypes.

    Raises `PreconditionError` for a graph that computes in another dtype than float32, or in
    `dtype` already.
    """
    if other := _other_dtypes(gm, dtype):
        raise PreconditionError(
            f"precision: the graph computes in {other.pop()}, wanted a float32 graph; "
            "leave the precision out to keep the graph's own"
        )
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            _cast_constant(gm, node, dtype)
        elif node.op == "placeholder":
            _cast_for(gm, node, [u for u in node.users if _wants_one_dtype(u)], dtype)
        elif is_call(node, DEQUANTIZE):
            _cast_for(gm, node, list(node.users), dtype)
        elif is_call(node, {INT8_LINEAR}) or (
            node.op == "call_function" and node.target not in _KEEP
        ):
            node.args = tuple(dtype if a is torch.float32 else a for a in node.args)
            node.kwargs = {k: dtype if v is torch.float32 else v for k, v in node.kwargs.items()}
        elif is_call(node, {ops.QUANTIZE_LOG_SQRT2}):
            with gm.graph.inserting_before(node):
                wide = gm.graph.call_function(aten.to.dtype, (node.args[0], torch.float32))
            node.args = (wide, *node.args[1:])
        elif node.op == "output":
            _cast_outputs(gm, node)
    _store_cast_constants(gm)


def _other_dtypes(gm: GraphModule, dtype: torch.dtype) -> set[torch.dtype]:
    dtypes = {p.dtype for p in gm.parameters() if p.is_floating_point()}
    return dtypes - {torch.float32, dtype}


def _cast_constant(gm: GraphModule, node: Node, dtype: torch.dtype) -> None:
    value = tensor_of(gm, node)
    readers = [u for u in node.users if not is_call(u, _KEEP)]
    if value is None or value.dtype is not torch.float32 or not readers:
        return
    with gm.graph.inserting_before(node):
        cast = add_tensor(gm, str(node.target), value.detach().to(dtype))
    for reader in readers:
        reader.replace_input_with(node, cast)


def _wants_one_dtype(reader: Node) -> bool:
    """Whether a reader takes one dtype only, or passes an input on to one that does."""
    if is_call(reader, _ONE_DTYPE):
        return True
    passes_on = is_move(reader) or is_call(reader, _PASSES_ON)
    return passes_on and any(_wants_one_dtype(user) for user in reader.users)


def _cast_for(gm: GraphModule, node: Node, readers: list[Node], dtype: torch.dtype) -> None:
    if not readers:
        return
    with gm.graph.inserting_after(node):
        cast = gm.graph.call_function(aten.to.dtype, (node, dtype))
    for reader in readers:
        reader.replace_input_with(node, cast)


def _cast_outputs(gm: GraphModule, output: Node) -> None:
    for node in output.all_input_nodes:
        value = node.meta.get("val")
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        if node.op == "placeholder" or whole:
            continue
        with gm.graph.inserting_before(output):
            wide = gm.graph.call_function(aten.to.dtype, (node, torch.float32))
        output.replace_input_with(node, wide)


def _store_cast_constants(gm: GraphModule) -> None:
    """A cast of a stored tensor, such as a compensation in half precision, is done once, here."""
    for node in list(gm.graph.nodes):
        if not is_call(node, {aten.to.dtype}) or len(node.args) != 2 or node.kwargs:
            continue
        source, dtype = node.args
        value = tensor_of(gm, source)
        if not isinstance(source, Node) or not isinstance(dtype, torch.dtype) or value is None:
            continue
        with gm.graph.inserting_before(node):
            stored = add_tensor(gm, f"{source.target}_cast", value.detach().to(dtype))
        node.replace_all_uses_with(stored)
        gm.graph.erase_node(node)
