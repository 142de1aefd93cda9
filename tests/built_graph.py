"""Graphs put together node by node, for tests that work out by hand what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from qwt_fx.quant.fake_quant import FakeQuant, Mode

aten = torch.ops.aten


class Built:
    """A graph put together by hand; `call` adds a node, `done` makes the module."""

    def __init__(self) -> None:
        self.root, self.graph = nn.Module(), Graph()
        self.x = self.graph.placeholder("x")

    def tensor(self, name: str, value: Any) -> Node:
        if not hasattr(self.root, name):
            self.root.register_parameter(name, nn.Parameter(torch.as_tensor(value), False))
        return self.graph.get_attr(name)

    def quantizer(self, name: str, source: Node, module: FakeQuant) -> Node:
        module.mode = Mode.ON
        self.root.add_module(name, module)
        return self.graph.call_module(name, (source,))

    def linear(self, source: Node, weight: Node, bias: Node | None = None) -> Node:
        args = (source, weight) if bias is None else (source, weight, bias)
        node = self.graph.call_function(aten.linear.default, args)
        node.meta["layer"] = "fc"
        return node

    def done(self, *outputs: Node) -> GraphModule:
        self.graph.output(outputs[0] if len(outputs) == 1 else outputs)
        return GraphModule(self.root, self.graph)
