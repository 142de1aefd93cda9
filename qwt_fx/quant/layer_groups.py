"""The layers that read one value through one quantizer: what is calibrated together, in graph order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import CONVOLUTIONS, LINEAR, SHAPE_ONLY
from qwt_fx.graph.nodes import argument, is_call, shape_of, tensor_of
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_of, is_fake_quant
from qwt_fx.quant.norms import weight_node


@dataclass(frozen=True)
class LayerGroup:
    """The quantizer of one value (`None` in floating point), and the layers that read it.

    `layers` are linears, or one convolution, whose weights are parameters; `shared` says that
    something else, such as an attention product, reads the quantized value too.
    """

    quantizer: Node | None
    layers: tuple[Node, ...]
    shared: bool

    @property
    def source(self) -> Node:
        """The value; another one once something has been inserted behind it."""
        source = (self.quantizer or self.layers[0]).args[0]
        assert isinstance(source, Node)
        return source


def find_groups(gm: GraphModule) -> list[LayerGroup]:
    """The graph's groups in execution order: every activation quantizer, every quantized weight."""
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups: list[LayerGroup] = []
    taken: set[Node] = set()
    for node in gm.graph.nodes:
        if is_fake_quant(gm, node) and tensor_of(gm, node.args[0]) is None:
            layers, shared = _readers(gm, node)
            taken |= set(layers)
            groups.append(LayerGroup(node, tuple(layers), shared))
    for node in gm.graph.nodes:
        if _is_layer(gm, node) and node not in taken and is_fake_quant(gm, node.args[1]):
            groups.append(LayerGroup(None, (node,), False))
    return sorted(groups, key=lambda g: position[g.quantizer or g.layers[0]])


def _is_layer(gm: GraphModule, node: Node) -> bool:
    kind = is_call(node, {LINEAR}) or is_call(node, CONVOLUTIONS)
    return kind and weight_node(gm, node) is not None


def _readers(gm: GraphModule, quantizer: Node) -> tuple[list[Node], bool]:
    layers: list[Node] = []
    shared = False
    pending = [(quantizer, user) for user in quantizer.users]
    while pending:
        source, node = pending.pop(0)
        if _is_layer(gm, node) and node.args[0] is source:
            layers.append(node)
        elif is_call(node, SHAPE_ONLY):
            pending += [(node, user) for user in node.users]
        else:
            shared = True
    return layers, shared


def weight_quantizer(gm: GraphModule, layer: Node) -> FakeQuant | None:
    """The quantizer of a layer's weight."""
    node = layer.args[1]
    return fake_quant_of(gm, node) if isinstance(node, Node) and is_fake_quant(gm, node) else None


def lowest_weight_bits(gm: GraphModule, layers: Iterable[Node]) -> int | None:
    """The fewest bits of the layers' weights; `None` where none is quantized."""
    modules = [weight_quantizer(gm, layer) for layer in layers]
    return min((m.spec.bits for m in modules if m is not None), default=None)


def can_be_rows(layer: Node) -> bool:
    """Whether the layer is a product of rows and a matrix: a linear, or an ungrouped 2-d convolution."""
    if is_call(layer, {LINEAR}):
        return True
    conv2d = torch.ops.aten.conv2d.default
    return is_call(layer, {conv2d}) and argument(layer, 6, "groups", 1) == 1


def rows_of(layer: Node, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer multiplies its weight with: (rows, inputs) of a batch of its input."""
    if is_call(layer, {LINEAR}):
        return x.reshape(-1, x.shape[-1])
    sizes = {
        name: argument(layer, index, name, default)
        for index, name, default in (
            (5, "dilation", 1), (4, "padding", 0), (3, "stride", 1),
        )
    }  # fmt: skip
    columns = F.unfold(x, tuple(weight.shape[2:]), **sizes)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def residual_of(layer: Node) -> Node | None:
    """The value that a layer's output is added to, where it does nothing else."""
    if len(layer.users) != 1:
        return None
    (user,) = layer.users
    if not is_call(user, {torch.ops.aten.add.Tensor}) or user.kwargs:
        return None
    others = [a for a in user.args if a is not layer]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    shape = shape_of(layer)
    return others[0] if shape is not None and shape == shape_of(others[0]) else None
