"""Measurements on a calibrated graph: SQNR of each quantized layer on calibration data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph import graph_info, layer_name, weight_layers
from qwt_fx.norms import is_fake_quant
from qwt_fx.runner import Env, execute, run_all


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """10 log10(sum reference^2 / sum (reference - quantized)^2) in dB, over all elements.

    Infinite where the two are equal; sums in float64.
    """
    signal = float(reference.square().sum(dtype=torch.float64))
    noise = float((reference - quantized).square().sum(dtype=torch.float64))
    if noise == 0.0:
        return math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise)) if signal > 0.0 else -math.inf


def measure_layers(gm: GraphModule, batch: Any) -> None:
    """Record each quantized layer's output SQNR (dB) in the graph's `GraphInfo.layers`.

    The layer's own error alone: both sides read the same, quantized-upstream input. A calibrated
    graph before conversion is expected; layers without quantizers get no record.
    """
    info = graph_info(gm)
    operands = {
        layer: (_unquantized(gm, layer.args[0]), _unquantized(gm, layer.args[1]))
        for layer in weight_layers(gm)
        if any(is_fake_quant(gm, a) for a in layer.args[:2])
    }
    readers: dict[Node, list[Node]] = {}
    for layer in operands:
        if is_fake_quant(gm, layer.args[0]):
            readers.setdefault(_node(layer.args[0]), []).append(layer)
    held: Env = {}  # each layer's input before its quantizer, by layer

    def visit(node: Node, env: Env) -> None:
        for layer in readers.get(node, ()):  # the quantizer is about to read the input
            held[layer] = env[operands[layer][0]]
        if node not in operands:
            return
        source, weight = operands[node]
        x = held.pop(node) if node in held else env[source]
        assert callable(node.target)  # a linear or a convolution
        exact = node.target(x, execute(gm, weight, {}), *_rest(gm, node))
        value = sqnr_db(exact, execute(gm, node, env))
        info.layers[layer_name(node)] = {"sqnr_db": value if math.isfinite(value) else None}

    run_all(gm, batch, visit)


def _node(argument: object) -> Node:
    assert isinstance(argument, Node)  # input and weight of a layer are values of the graph
    return argument


def _unquantized(gm: GraphModule, argument: object) -> Node:
    node = _node(argument)
    return _node(node.args[0]) if is_fake_quant(gm, node) else node


def _rest(gm: GraphModule, node: Node) -> list[Any]:
    """Bias and the other arguments of a layer; they depend on no activation."""
    return [
        execute(gm, argument, {}) if isinstance(argument, Node) else argument
        for argument in node.args[2:]
    ]


def tensors_of(value: Any) -> list[Tensor]:
    """Floating-point tensors of a model's output, in order."""
    return [
        t
        for t in torch.utils._pytree.tree_leaves(value)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
