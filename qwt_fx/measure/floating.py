"""A converted graph computed in floating point: what its speed is compared with."""

from __future__ import annotations

import copy

from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.constants import constant_value
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.nodes import is_call, is_constant
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao
from qwt_fx.quant.quantizers import DEQUANTIZE, QUANTIZE

_SIMULATE = frozenset({ops.FAKE_QUANTIZE_AFFINE, ops.FAKE_QUANTIZE_LOG_SQRT2})


def floating_graph(converted: GraphModule) -> GraphModule:
    """A copy without quantizers of activations, its weights dequantized once.

    It has the original model's products and sizes, and the compensation's; its weights are the
    rounded ones, so it is a yardstick of time and not of accuracy.
    """
    gm = copy.deepcopy(converted)
    for node in list(gm.graph.nodes):
        source = node.args[0] if node.args else None
        if is_call(node, DEQUANTIZE) and is_call(source, QUANTIZE):
            node.replace_all_uses_with(source.args[0])  # type: ignore[union-attr]
        elif is_call(node, _SIMULATE):
            node.replace_all_uses_with(source)
        elif is_call(node, {torch_ao.DEQUANTIZE_PER_CHANNEL}) and is_constant(node):
            _fold(gm, node)
    clean_up(gm)
    return gm


def _fold(gm: GraphModule, node: Node) -> None:
    weight: Tensor = constant_value(gm, node)
    with gm.graph.inserting_before(node):
        node.replace_all_uses_with(add_tensor(gm, f"{node.name}_weight", weight.detach()))
