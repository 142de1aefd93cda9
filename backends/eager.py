"""The reference backend: the q/dq graph as it is, on any device."""

from __future__ import annotations

import copy

from torch.fx import GraphModule

from qwt_fx.errors import PreconditionError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import compute_nodes, layer_name
from qwt_fx.measure.kernel_audit import LayerKernel


class Eager:
    """Runs quantize and dequantize operators one by one; the outputs define the others' target."""

    def lower(self, quantized: GraphModule) -> GraphModule:
        """A copy of the graph. Raises `PreconditionError` for a graph not converted, or one that
        no integer type can hold."""
        if any(n.op == "call_module" for n in quantized.graph.nodes):
            raise PreconditionError("the graph is not converted: call qwt_fx.convert first")
        if reason := graph_info(quantized).unstorable:
            raise PreconditionError(f"cannot lower: {reason}")
        return copy.deepcopy(quantized)

    def audit(self, lowered: GraphModule) -> list[LayerKernel]:
        """Every layer in floating point: its operands are dequantized first."""
        reason = "operands are dequantized before the product"
        return [
            LayerKernel(layer_name(node), False, str(node.target), reason)
            for node in compute_nodes(lowered)
        ]
