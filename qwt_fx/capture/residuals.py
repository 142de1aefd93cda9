"""Finds where a graph adds a branch to a value that goes around it: v = u + f(u).

The way around holds no product (a scale, a norm, a reshape at most), the branch at least one layer.
Rotary embeddings add two shares of one product and are none; nor are gates, which multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.nodes import compute_nodes, is_call, shape_of, weight_layers

aten = torch.ops.aten
_SUMS = frozenset({aten.add.Tensor, aten.addcmul.default})


@dataclass(frozen=True)
class Residual:
    """v = u + f(u): u, v, and the linears and convolutions of f in graph order."""

    source: Node
    result: Node
    layers: tuple[Node, ...]


class Flow:
    """Which values of a graph are computed from which; sizes carry nothing."""

    def __init__(self, gm: GraphModule) -> None:
        self._at: dict[Node, int] = {}
        # A bit for each node that it is computed from, itself included.
        self._above: dict[Node, int] = {}
        inputs = 0
        for at, node in enumerate(gm.graph.nodes):
            self._at[node] = at
            above = 1 << at
            for source in node.all_input_nodes:
                if _carries(source):
                    above |= self._above[source]
            self._above[node] = above
            inputs |= (node.op == "placeholder") << at
        self._inputs = inputs

    def reads(self, node: Node, source: Node) -> bool:
        """Whether the node is computed from the other, or is it."""
        return bool(self._above[node] >> self._at[source] & 1)

    def sources(self, node: Node) -> list[Node]:
        """What the node reads that is computed from inputs."""
        return [n for n in node.all_input_nodes if _carries(n) and self._above[n] & self._inputs]

    def is_between(self, node: Node, source: Node, result: Node) -> bool:
        """Whether the node is computed from `source`, and `result` from the node; not `source`."""
        return node is not source and self.reads(node, source) and self.reads(result, node)

    def position(self, node: Node) -> int:
        """Its place in the graph's order."""
        return self._at[node]


def _carries(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" or not isinstance(value, int | float | bool | torch.SymInt)


def sizes_of(node: Node) -> list[object]:
    """A recorded shape, to compare: symbols by name, as comparing them may bind them."""
    return [s.node.expr if isinstance(s, torch.SymInt) else s for s in shape_of(node) or ()]


def find_residuals(gm: GraphModule, flow: Flow) -> list[Residual]:
    """The graph's residual sums, in graph order."""
    layers, products = list(weight_layers(gm)), set(compute_nodes(gm))
    sums = (_residual(node, flow, layers, products) for node in gm.graph.nodes)
    return [residual for residual in sums if residual is not None]


def _residual(node: Node, flow: Flow, layers: list[Node], products: set[Node]) -> Residual | None:
    if not is_call(node, _SUMS) or not isinstance(node.meta.get("val"), Tensor):
        return None
    operands = flow.sources(node)
    for around in operands:
        branch = [n for n in operands if n is not around]
        source: Node | None = around
        while source is not None:
            if sizes_of(source) == sizes_of(node) and any(flow.reads(n, source) for n in branch):
                inside = tuple(n for n in layers if flow.is_between(n, source, node))
                if inside:
                    return Residual(source, node, inside)
            read = flow.sources(source)
            source = read[0] if len(read) == 1 and source not in products else None
    return None
