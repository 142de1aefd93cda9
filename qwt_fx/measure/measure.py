"""Measurements on a calibrated graph: SQNR of each quantized layer on calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batch
from qwt_fx.graph.constants import constant_value
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.graph.runner import Env, execute, run_all
from qwt_fx.quant.fake_quant import fake_quant_of, is_fake_quant
from qwt_fx.quant.quantizers import Quantizer, quantizer_at


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """10 log10(sum reference^2 / sum (reference - quantized)^2) in dB, over all elements.

    Infinite where the two are equal; sums in float64.
    """
    signal = float(reference.square().sum(dtype=torch.float64))
    noise = float((reference - quantized).square().sum(dtype=torch.float64))
    if noise == 0.0:
        return math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise)) if signal > 0.0 else -math.inf


def measure_layers(gm: GraphModule, batch: Batch) -> None:
    """Record what quantization does to each layer in the graph's `GraphInfo.layers`.

    `sqnr_db`, of the layer's output, in dB: its own error alone, both sides read the same,
    quantized-upstream input; `clipped`, the fraction of its input outside the codes' range, in [0, 1];
    `scales`, the mean scale of its input's and its weight's quantizer, by which a change made later is
    seen. A calibrated graph before conversion is expected; layers without quantizers get no record.
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
    clipped: dict[Node, float | None] = {}

    def visit(node: Node, env: Env) -> None:
        for layer in readers.get(node, ()):  # the quantizer is about to read the input
            held[layer] = env[operands[layer][0]]
            module = fake_quant_of(gm, node)
            clipped[layer] = clipped_fraction(
                held[layer], quantizer_at(gm, node), module.token_scale
            )
        if node not in operands:
            return
        source, weight = operands[node]
        x = held.pop(node) if node in held else env[source]
        read, read_weight = map(_node, node.args[:2])
        unquantized = env | {read: x, read_weight: constant_value(gm, weight)}
        value = sqnr_db(execute(gm, node, unquantized), execute(gm, node, env))
        info.layers[layer_name(node)] = {
            "sqnr_db": value if math.isfinite(value) else None,
            "clipped": clipped.get(node),
            "scales": mean_scales(gm, node),
        }

    run_all(gm, batch, visit)


def clipped_fraction(
    x: Tensor, quantizer: Quantizer | None, token_scale: Tensor | None = None
) -> float | None:
    """Fraction of the elements that the codes cannot reach within half a step; `None` without a range.

    None of them where every token has a range of its own.

    x: (..., channels); the quantizer's scale is () or (channels,). token_scale: see `FakeQuant`.
    """
    if quantizer is not None and quantizer.dynamic:
        return 0.0
    if quantizer is None or quantizer.scale is None or quantizer.zero_point is None:
        return None
    if token_scale is not None:
        x = x / token_scale[: x.shape[-token_scale.dim()]]
    codes = x / quantizer.scale.to(x.device) + quantizer.zero_point.to(x.device)
    outside = (codes < -0.5) | (codes > 2**quantizer.bits - 0.5)
    return float(outside.double().mean())


def mean_scales(gm: GraphModule, layer: Node) -> dict[str, float]:
    """Mean scale of a layer's "input" and "weight" quantizer; sides without one are left out."""
    scales = {}
    for side, operand in zip(("input", "weight"), layer.args[:2], strict=True):
        quantizer = quantizer_at(gm, operand)
        if quantizer is not None and quantizer.scale is not None:
            scales[side] = float(quantizer.scale.double().mean())
    return scales


def _node(argument: object) -> Node:
    assert isinstance(argument, Node)  # input and weight of a layer are values of the graph
    return argument


def _unquantized(gm: GraphModule, argument: object) -> Node:
    node = _node(argument)
    return _node(node.args[0]) if is_fake_quant(gm, node) else node


def tensors_of(value: object) -> list[Tensor]:
    """Floating-point tensors of a model's output, in order."""
    return [
        t
        for t in torch.utils._pytree.tree_leaves(value)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]


def block_outputs(gm: GraphModule, batch: Batch) -> dict[str, Tensor]:
    """The value behind each block, by block name, for one batch."""
    names = {block.output: block.name for block in graph_info(gm).blocks}
    outputs: dict[str, Tensor] = {}

    def visit(node: Node, env: Env) -> None:
        for read in node.all_input_nodes:
            if read.name in names and names[read.name] not in outputs:
                outputs[names[read.name]] = env[read]

    run_all(gm, batch, visit)
    return outputs


def block_sqnr(
    reference: GraphModule, quantized: GraphModule, batches: Sequence[Batch]
) -> dict[str, float | None]:
    """SQNR in dB of each block's output over the batches; `None` where both are equal.

    Both graphs read the model's input: errors of earlier blocks are in it, it is what arrives.
    """
    sums: dict[str, tuple[float, float]] = {}
    for batch in batches:
        exact, rounded = block_outputs(reference, batch), block_outputs(quantized, batch)
        for name in exact.keys() & rounded.keys():
            signal = float(exact[name].square().sum(dtype=torch.float64))
            noise = float((exact[name] - rounded[name]).square().sum(dtype=torch.float64))
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + signal, before[1] + noise
    return {
        block.name: _decibels(*sums[block.name])
        for block in graph_info(reference).blocks
        if block.name in sums
    }


def _decibels(signal: float, noise: float) -> float | None:
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and noise > 0.0 else None
