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
    signal = float(reference.double().square().sum())
    noise = float((reference.double() - quantized.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def measure_layers(gm: GraphModule, batch: Any) -> None:
    """Record each quantized layer's output SQNR (dB) in the graph's `GraphInfo.layers`.

    The layer's own error alone: both sides read the same, quantized-upstream input. A calibrated
    graph before conversion is expected; layers without quantizers get no record.
    """
    info = graph_info(gm)
    layers = {n for n in weight_layers(gm) if any(is_fake_quant(gm, a) for a in n.args[:2])}
    sources = {
        n: tuple(a.args[0] if is_fake_quant(gm, a) else a for a in n.args[:2])  # type: ignore[union-attr]
        for n in layers
    }
    held: Env = {}

    def visit(node: Node, env: Env) -> None:
        for layer, (source, _) in sources.items():
            if node in layer.all_input_nodes and source in env:
                held[source] = env[source]
        if node in layers:
            source, weight = sources[node]
            floating = dict(env) | {source: held[source]} if source in held else dict(env)
            exact = node.target(  # type: ignore[operator]
                floating[source], execute(gm, weight, {}), *_rest(gm, node)
            )
            value = sqnr_db(exact, execute(gm, node, env))
            info.layers[layer_name(node)] = {"sqnr_db": value if math.isfinite(value) else None}
            held.pop(source, None)

    run_all(gm, batch, visit)


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
