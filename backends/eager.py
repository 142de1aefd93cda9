"""The reference backend: the q/dq graph as it is, on any device, its constants computed once."""

from __future__ import annotations

import copy

from torch.fx import GraphModule

from qwt_fx.backends.constant_folding import fold_constants
from qwt_fx.backends.lowering import check_converted, floating_kernels
from qwt_fx.measure.kernel_audit import LayerKernel


class Eager:
    """Runs quantize and dequantize operators one by one; the outputs define the others' target."""

    def lower(self, quantized: GraphModule) -> GraphModule:
        """A copy of the graph with the same outputs, bit for bit.

        Raises `PreconditionError` for a graph not converted, or one that no integer type can hold.
        """
        check_converted(quantized, "lower")
        gm = copy.deepcopy(quantized)
        fold_constants(gm)
        return gm

    def audit(self, lowered: GraphModule) -> list[LayerKernel]:
        """Every layer in floating point: its operands are dequantized first."""
        return floating_kernels(lowered, "operands are dequantized before the product")
