"""What calibration data show of a converted graph: clipping, histograms, channel ranges, own errors.

The graph runs once over one batch. A layer's own error is what its input's quantizer does to its
output, both sides reading the same values; the weights' part is not seen here, as the graph holds
rounded weights only (calibration recorded both, see `qwt_fx.measure.measure`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batch
from qwt_fx.graph.aten import SHAPE_ONLY
from qwt_fx.graph.constants import constant_value
from qwt_fx.graph.nodes import is_call, layer_name, weight_layers
from qwt_fx.graph.runner import Env, execute, run_all
from qwt_fx.measure.measure import clipped_fraction
from qwt_fx.measure.sensitivity import OutputProbe
from qwt_fx.quant import torch_ao
from qwt_fx.quant.quantizers import CASTS, Quantizer, quantizer_at

BINS = 72
_QUANTIZE = frozenset({torch_ao.QUANTIZE_PER_TENSOR, torch_ao.QUANTIZE_PER_TOKEN})
_DEQUANTIZE = frozenset({torch_ao.DEQUANTIZE_PER_TENSOR, torch_ao.DEQUANTIZE_PER_TOKEN})


@dataclass(frozen=True)
class LevelHistogram:
    """Counts of equal bins between `low` and `high`, and the levels a quantizer offers.

    Attributes:
        low, high: of the values counted (of the levels, for weights).
        counts: a bin each.
        step: distance between levels; `None` where there is no quantizer.
        first, last: the lowest and the highest level.
        levels: how many there are; of weights, in each row.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    step: float | None
    first: float | None
    last: float | None
    levels: int | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """One layer on one batch.

    Attributes:
        clipped: fraction of its input outside the codes' range, in [0, 1]; `None` if not quantized.
        error: squared error of its output caused by its input's quantizer, relative to the output.
        values: histogram of its input.
        channel_low, channel_high: extremes of each channel of its input (the last dimension of a
            linear's), as the layer reads it before rounding.
    """

    clipped: float | None
    error: float | None
    values: LevelHistogram
    channel_low: tuple[float, ...]
    channel_high: tuple[float, ...]


def layer_statistics(gm: GraphModule, batch: Batch) -> dict[str, LayerStatistics]:
    """Statistics of every linear and convolution of a converted or floating-point graph."""
    statistics: dict[str, LayerStatistics] = {}
    layers = set(weight_layers(gm))
    read = {node: _quantize_node(node.args[0]) for node in layers}
    held: dict[Node, Tensor] = {}
    wanted: dict[Node, list[Node]] = {}
    for layer, quantize in read.items():
        if quantize is not None:
            wanted.setdefault(quantize, []).append(layer)

    def visit(node: Node, env: Env) -> None:
        for layer in wanted.get(node, ()):  # about to be quantized
            source = node.args[0]
            assert isinstance(source, Node)
            held[layer] = env[source]
        if node in layers:
            statistics[layer_name(node)] = _statistics(gm, node, env, held.pop(node, None))

    run_all(gm, batch, visit)
    return statistics


def _quantize_node(operand: object) -> Node | None:
    """The quantizing node in front of a layer, through ops that move elements and token scales."""
    node = operand
    while isinstance(node, Node):
        if is_call(node, _DEQUANTIZE):
            source = node.args[0]
            if is_call(source, _QUANTIZE):
                assert isinstance(source, Node)
                return source
            return None
        if not is_call(node, SHAPE_ONLY | CASTS | {torch.ops.aten.mul.Tensor}):
            return None
        node = node.args[0]
    return None


def _statistics(gm: GraphModule, layer: Node, env: Env, exact: Tensor | None) -> LayerStatistics:
    source = layer.args[0]
    assert isinstance(source, Node)
    quantizer = quantizer_at(gm, source)
    x = env[source] if exact is None else exact
    error = None
    if exact is not None and exact.shape == env[source].shape and _plain(source):
        wanted: Tensor = execute(gm, layer, env | {source: exact.to(env[source].dtype)})
        noise = (execute(gm, layer, env) - wanted).square().sum(dtype=torch.float64)
        error = float(noise / wanted.square().sum(dtype=torch.float64).clamp_min(1e-300))
    rows = x.float().reshape(-1, x.shape[-1]) if x.dim() != 4 else x.float().flatten(2)
    channels = (0,) if x.dim() != 4 else (0, 2)
    return LayerStatistics(
        clipped=None if exact is None else clipped_fraction(exact, quantizer),
        error=error,
        values=histogram(x, quantizer if exact is not None else None),
        channel_low=tuple(rows.amin(dim=channels).tolist()),
        channel_high=tuple(rows.amax(dim=channels).tolist()),
    )


def _plain(source: Node) -> bool:
    """Whether a layer reads a dequantized value as it is, without scales of positions."""
    while is_call(source, SHAPE_ONLY | CASTS):
        source = source.args[0]  # type: ignore[assignment]
    return is_call(source, _DEQUANTIZE)


def histogram(x: Tensor, quantizer: Quantizer | None) -> LevelHistogram:
    """LevelHistogram of finite values with the levels of an affine quantizer of one scale."""
    flat = x.detach().float().flatten()
    low, high = float(flat.min()), float(flat.max())
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6
    counts = torch.histc(flat, BINS, low, high).long().tolist()
    scale, zero_point = (
        (None, None) if quantizer is None else (quantizer.scale, quantizer.zero_point)
    )
    if quantizer is None or scale is None or zero_point is None or scale.numel() != 1:
        return LevelHistogram(low, high, tuple(counts), None, None, None)
    step, zero = float(scale), float(zero_point)
    last = (2**quantizer.bits - 1 - zero) * step
    return LevelHistogram(low, high, tuple(counts), step, -zero * step, last, 2**quantizer.bits)


def weight_histograms(gm: GraphModule) -> dict[str, LevelHistogram]:
    """How often each level is used by each layer's weights: one bin a level, in units of the step."""
    histograms = {}
    for layer in weight_layers(gm):
        node = layer.args[1]
        while is_call(node, CASTS):
            node = node.args[0]  # type: ignore[union-attr]
        if not is_call(node, {torch_ao.DEQUANTIZE_PER_CHANNEL}):
            continue
        assert isinstance(node, Node)
        quantizer = quantizer_at(gm, node)
        if quantizer is None or quantizer.scale is None or quantizer.zero_point is None:
            continue
        value: Tensor = constant_value(gm, node)
        step = quantizer.scale.reshape(-1, *[1] * (value.dim() - 1))
        codes = torch.round(value / step).long().flatten()
        first = -int(quantizer.zero_point.max())
        last = 2**quantizer.bits - 1 - int(quantizer.zero_point.min())
        counts = torch.bincount(codes - first, minlength=last - first + 1).tolist()
        histograms[layer_name(layer)] = LevelHistogram(
            first - 0.5, last + 0.5, tuple(counts), 1.0, first, last, 2**quantizer.bits
        )
    return histograms


def contributions(gm: GraphModule, batch: Batch, errors: dict[str, float]) -> dict[str, float]:
    """What each layer's own error does to the model's output, by layer name.

    errors: squared error of the layer's output, relative to its energy. Noise of that energy, white and
    seeded, is added to the output of one layer at a time, and the rest of the graph is run: the
    squared error of the model's output relative to its energy.
    """
    contributed: dict[str, float] = {}
    layers = set(weight_layers(gm))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        probe = OutputProbe(gm, batch)
        for node in probe.walk():
            error = errors.get(layer_name(node)) if node in layers else None
            if error is None:
                continue
            value: Tensor = execute(gm, node, probe.env)
            noise = torch.randn(value.shape, generator=generator).to(value)
            size = (error * value.float().square().mean()).sqrt()
            outputs = probe.outputs({node: value + noise * size.to(value.dtype)})
            contributed[layer_name(node)] = probe.error(outputs)
    return contributed
