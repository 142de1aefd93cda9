"""Which node of the floating-point graph a node of the quantized one stands for while that is rewritten.

A node stands for the one of its own name, until a pass tells of a node that it put in the place of
another or behind it. That is noted on the node, so that it goes with copies of the graph. Whatever is
known of rows (which of them count) is kept by what a node stands for: an inserted node needs no entry.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node

_STANDS_FOR = "stands_for"


class Correspondence:
    """Finds the nodes of a floating-point graph for those of the quantized graph made from it."""

    def __init__(self, floating: GraphModule) -> None:
        self.floating = floating
        self._by_name = {node.name: node for node in floating.graph.nodes}

    def twin(self, node: Node) -> Node:
        """The floating-point node. Raises `PreconditionError` when there is none."""
        name = self.name_of(node)
        return self._by_name.get(name) or find_node(self.floating, name)

    @staticmethod
    def name_of(node: Node) -> str:
        """The name of the floating-point node that a node stands for."""
        return str(node.meta.get(_STANDS_FOR, node.name))

    @staticmethod
    def inserted(new: Node, behind: Node) -> None:
        """Note that some readers of a node read a new one, which has its rows."""
        new.meta[_STANDS_FOR] = Correspondence.name_of(behind)

    @staticmethod
    def replaced(gm: GraphModule, old: Node, new: Node) -> None:
        """Note that all readers of a node read a new one: where it bounded a block, that does now."""
        Correspondence.inserted(new, old)
        info = graph_info(gm)
        names = {old.name: new.name}
        info.blocks[:] = [
            replace(b, input=names.get(b.input, b.input), output=names.get(b.output, b.output))
            for b in info.blocks
        ]
