"""What the lowerings to integer products share: which layers, their operands as rows, the audit.

Every integer kernel computes one product of rows and a matrix. A linear is one; so is a convolution
whose windows lie side by side (a patch embedding), each window a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from qwt_fx.errors import PreconditionError
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import argument, compute_nodes, is_call, layer_name
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.quant.integer_layers import FloatLayer, IntegerLayer, IntegerWeight, layers_to_lower

aten = torch.ops.aten
SHIFT = 128  # from uint8 codes to int8 ones
LAYERS = "integer_layers"  # meta of a product of several layers: their names
_REASON = "float_reason"  # meta of a product left in floating point
_CONV2D = frozenset({aten.conv2d.default, aten.conv2d.padding})


def check_converted(graph: GraphModule, verb: str) -> None:
    """Raise `PreconditionError` for a graph not converted, or one that no integer type can hold."""
    if any(n.op == "call_module" for n in graph.graph.nodes):
        raise PreconditionError("the graph is not converted: call qwt_fx.convert first")
    if reason := graph_info(graph).unstorable:
        raise PreconditionError(f"cannot {verb}: {reason}")


def integer_layers(
    gm: GraphModule, why_not: Callable[[IntegerLayer], str | None]
) -> list[IntegerLayer]:
    """The layers to compute in integers, in graph order; the rest remember why not, see `audit_graph`.

    `why_not`: why a backend leaves a layer of integers in floating point; `None` when it need not.
    """
    integer: list[IntegerLayer] = []
    for layer in layers_to_lower(gm):
        reason = layer.reason if isinstance(layer, FloatLayer) else why_not(layer)
        if isinstance(layer, IntegerLayer) and reason is None:
            integer.append(layer)
        else:
            layer.node.meta[_REASON] = reason
    return integer


def float_reason(node: Node, default: str | None = None) -> str | None:
    """Why `integer_layers` left a product in floating point."""
    reason: str | None = node.meta.get(_REASON, default)
    return reason


def why_no_row_product(layer: IntegerLayer) -> str | None:
    """Why a layer is no product of rows of integers and a matrix; `None` when it is one."""
    node, activation = layer.node, layer.input
    if activation.token_scale is not None and (node.target is not LINEAR or activation.moved_by):
        return "positions with scales of their own are moved before the product"
    if activation.of_token is not None and activation.moved_by:
        return "tokens with scales of their own are moved before the product"
    if node.target is LINEAR:
        return None
    if node.target not in _CONV2D:
        return "a convolution other than conv2d"
    patch = list(layer.weight.codes.shape[2:])
    stride, padding = _pair(argument(node, 3, "stride", 1)), argument(node, 4, "padding", 0)
    dilation, groups = _pair(argument(node, 5, "dilation", 1)), argument(node, 6, "groups", 1)
    padded = padding != "valid" if isinstance(padding, str) else _pair(padding) != [0, 0]
    if stride != patch or dilation != [1, 1] or groups != 1 or padded:
        return "a convolution whose windows overlap, leave gaps, are padded or grouped"
    return None


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def signed_matrix(weight: IntegerWeight) -> tuple[Tensor, Tensor | None]:
    """w' (out, in) int8 and v' (out,) int32 with w - v == w' - v'; no v' where all are 0.

    w' is w - v where that fits int8, else (asymmetric 8 bits) w - 128, and v' is v - 128.
    """
    if (signed := weight.signed()) is not None:
        return signed.flatten(1), None
    shifted = (weight.codes.to(torch.int16) - SHIFT).to(torch.int8)
    return shifted.flatten(1), weight.zero_point.to(torch.int32) - SHIFT


@dataclass
class LayerRewriter:
    """Rewrites the layers of one graph, in place; holds what layers share."""

    gm: GraphModule
    _moved: dict[tuple[object, ...], Node] = field(default_factory=dict, init=False)

    def call(self, target: Callable[..., object], *args: Argument) -> Node:
        """Insert a call."""
        return self.gm.graph.call_function(target, args)

    def moved(self, layer: IntegerLayer, codes: Node) -> Node:
        """Codes moved as the layer's dequantized input was; once for all readers of the same."""
        for move in layer.input.moved_by:
            assert callable(move.target)  # an operator that only moves elements
            key = (codes, move.target, str(move.args[1:]), str(move.kwargs))
            if key not in self._moved:
                operands = (codes, *move.args[1:])
                self._moved[key] = self.gm.graph.call_function(
                    move.target, operands, dict(move.kwargs)
                )
            codes = self._moved[key]
        return codes

    def rows(self, layer: IntegerLayer, codes: Node) -> Node:
        """The rows of a layer's product, (..., in); what no window covers at the edges is cut off."""
        codes = self.moved(layer, codes)
        if layer.node.target is LINEAR:
            return codes
        height, width = (int(size) for size in layer.weight.codes.shape[2:])
        codes = self.call(aten.unfold.default, codes, 2, height, height)
        codes = self.call(aten.unfold.default, codes, 3, width, width)  # (n, c, h/p, w/q, p, q)
        codes = self.call(aten.permute.default, codes, [0, 2, 3, 1, 4, 5])
        return self.call(aten.flatten.using_ints, codes, 3, 5)

    def result(self, layer: IntegerLayer, product: Node) -> Node:
        """The product (..., out) in the layout of the layer's result."""
        if layer.node.target is LINEAR:
            return product
        return self.call(aten.permute.default, product, [0, 3, 1, 2])

    def replace(self, old: Node, new: Node) -> None:
        """Let the readers of one node read another, which keeps its shape and source module."""
        new.meta.update({k: v for k, v in old.meta.items() if k in ("val", "nn_module_stack")})
        old.replace_all_uses_with(new)
        self.gm.graph.erase_node(old)


def floating_kernels(graph: GraphModule, reason: str) -> list[LayerKernel]:
    """Every layer in floating point, for one reason."""
    return [
        LayerKernel(layer_name(node), False, str(node.target), reason)
        for node in compute_nodes(graph)
    ]


def audit_graph(
    lowered: GraphModule,
    products: Collection[object],
    kernel_of: Callable[[Node], str],
    backend: str,
) -> list[LayerKernel]:
    """What computes each layer of a graph whose integer layers call `products`, in graph order."""
    kernels: list[LayerKernel] = []
    floating, unknown = (
        set(compute_nodes(lowered)),
        f"the graph was not lowered by the {backend} backend",
    )
    for node in lowered.graph.nodes:
        if is_call(node, products):
            names = node.meta.get(LAYERS, [layer_name(node)])
            kernels += [LayerKernel(name, True, kernel_of(node)) for name in names]
        elif node in floating:
            reason = float_reason(node, unknown)
            kernels.append(LayerKernel(layer_name(node), False, str(node.target), reason))
    return kernels
