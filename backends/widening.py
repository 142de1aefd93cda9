"""Computes in float32 what a graph computes in half or double precision; stores half as it is.

Runtimes of exported files have few kernels of other types on a CPU: ONNX Runtime none for bfloat16, no
erf in float64, and for float16 it computes in float32 and rounds where its own rewrites leave a cast. So
a file says what is computed: float32, from parameters stored in half precision behind one cast each. It
differs from a half-precision graph by that graph's own rounding, towards the float32 model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.precision import HALF
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.graph_info import graph_info, set_graph_info
from qwt_fx.graph.nodes import is_call, tensor_of
from qwt_fx.graph.pass_base import clean_up

aten = torch.ops.aten


def as_float32(x: Tensor) -> Tensor:
    """An input as a widened graph takes it: floating point in float32, ids as they are."""
    return x.float() if x.is_floating_point() else x


def compute_in_float32(gm: GraphModule) -> bool:
    """Rewrite in place; inputs of other types are then expected in float32, and so are the outputs.

    A float32 graph is left as it is, its own passages in float64 included. Returns whether anything
    changed.
    """
    kinds = set(HALF)
    if any(p.dtype is torch.float64 for p in gm.parameters()):
        kinds.add(torch.float64)
    changed = False
    for node in list(gm.graph.nodes):
        value = tensor_of(gm, node)
        if value is not None and value.dtype in kinds:
            changed |= _read_as_float32(gm, node, value)
        elif node.op == "call_function":
            args = tuple(torch.float32 if _among(a, kinds) else a for a in node.args)
            kwargs = {k: torch.float32 if _among(v, kinds) else v for k, v in node.kwargs.items()}
            changed |= (args, kwargs) != (node.args, dict(node.kwargs))
            node.args, node.kwargs = args, kwargs
    if changed:
        clean_up(gm)
        _expect_float32(gm, {str(kind).removeprefix("torch.") for kind in kinds})
    return changed


def _expect_float32(gm: GraphModule, kinds: set[str]) -> None:
    """Note that inputs of these types come in float32 from now on."""
    info = graph_info(gm)
    inputs = [replace(i, dtype="float32") if i.dtype in kinds else i for i in info.inputs]
    set_graph_info(gm, replace(info, inputs=inputs))


def _among(value: object, kinds: set[torch.dtype]) -> bool:
    return isinstance(value, torch.dtype) and value in kinds


def _read_as_float32(gm: GraphModule, node: Node, value: Tensor) -> bool:
    """One node in float32 for all readers but those that cast; whether one was needed."""
    wide = (torch.float32,)
    readers = [u for u in node.users if not (is_call(u, {aten.to.dtype}) and u.args[1:] == wide)]
    if not readers:
        return False
    with gm.graph.inserting_after(node):
        if value.dtype in HALF:
            new = gm.graph.call_function(aten.to.dtype, (node, torch.float32))
        else:
            new = add_tensor(gm, str(node.target), value.detach().float())
    for reader in readers:
        reader.replace_input_with(node, new)
    return True
