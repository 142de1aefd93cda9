"""What a backend is."""

from __future__ import annotations

from typing import Protocol

from torch.fx import GraphModule

from qwt_fx.measure.kernel_audit import LayerKernel


class Backend(Protocol):
    """Lowers a converted graph; the result is called like the graph and stays within a stated
    tolerance of it."""

    def lower(self, quantized: GraphModule) -> GraphModule:
        """The graph, ready to run on this backend. The argument is not changed."""
        ...

    def audit(self, lowered: GraphModule) -> list[LayerKernel]:
        """What computes each layer of a graph that this backend lowered."""
        ...
