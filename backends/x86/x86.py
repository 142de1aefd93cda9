"""The x86 backend: linears and patch embeddings in oneDNN's u8 x s8 kernels, the rest for Inductor.

The lowered graph runs as it is, and under `qwt_fx.backends.compiled.compile_graph`, which fuses what
is between the products. See docs/x86.md for what is exact and what this CPU does.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from qwt_fx.backends.eager import Eager
from qwt_fx.backends.lowering import audit_graph, integer_layers
from qwt_fx.backends.token_quantizers import write_out_token_quantizers
from qwt_fx.backends.x86.fusion import FUSED, fuse_quantizers
from qwt_fx.backends.x86.layer import PARTS, QLINEAR_ADD, LayerLowering, why_not
from qwt_fx.backends.x86.saturation import QLINEAR
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.dead_code import remove_dead_nodes
from qwt_fx.graph.nodes import is_call
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.quant import torch_ao

_PRODUCTS = frozenset({QLINEAR, QLINEAR_ADD})


class X86:
    """Lowers to `onednn::qlinear_pointwise`."""

    def lower(self, quantized: GraphModule) -> GraphModule:
        """A lowered copy, called like the graph.

        Raises `PreconditionError` for a graph not converted or not storable, one whose tensors are
        not on the CPU, and a torch without oneDNN.
        """
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            raise PreconditionError("x86: this torch was built without oneDNN; use backend='eager'")
        gm = Eager().lower(quantized)
        devices = {str(t.device) for t in (*gm.parameters(), *gm.buffers())}
        if devices - {"cpu"}:
            raise PreconditionError(
                f"x86: tensors are on {', '.join(sorted(devices))}, wanted cpu: move the graph first"
            )
        _share_quantizers(gm)
        lowering = LayerLowering(gm)
        for layer in integer_layers(gm, why_not):
            lowering.lower(layer)
        remove_dead_nodes(gm)
        fuse_quantizers(gm)
        write_out_token_quantizers(gm)
        clean_up(gm)
        return gm

    def audit(self, lowered: GraphModule) -> list[LayerKernel]:
        """What computes each layer of a graph this backend lowered, in graph order."""
        kernels: dict[str, LayerKernel] = {}  # a layer of several products is listed once
        for kernel in audit_graph(lowered, _PRODUCTS, _kernel, "x86"):
            kernels.setdefault(kernel.name, kernel)
        return list(kernels.values())


def _kernel(node: Node) -> str:
    name = " + ".join(["onednn::qlinear_pointwise", *node.meta.get(FUSED, [])])
    parts = node.meta.get(PARTS, 1)
    if parts > 1:
        return f"{name}, {parts} exact products: one would saturate int16 on this CPU"
    return name


def _share_quantizers(gm: GraphModule) -> None:
    """Layers that quantize the same value alike read the same codes."""
    first: dict[tuple[object, ...], Node] = {}
    for node in list(gm.graph.nodes):
        if is_call(node, {torch_ao.QUANTIZE_PER_TENSOR}):
            same = first.setdefault(tuple(node.args), node)
            if same is not node:
                node.replace_all_uses_with(same)
                gm.graph.erase_node(node)
