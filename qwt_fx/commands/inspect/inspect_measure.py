"""Single measurements of `qwt-fx inspect`: kernels, channel ranges, latency."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.clip.clip import ClipModel
from qwt_fx.commands.screen import Screen
from qwt_fx.errors import QwtError
from qwt_fx.graph.nodes import layer_name, through_shape_ops, weight_layers
from qwt_fx.inspect.page.data import ChannelRanges
from qwt_fx.measure.floating import floating_graph
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.measure.layer_statistics import LayerStatistics
from qwt_fx.measure.timing import interleaved
from qwt_fx.quant.norms import NORMS

ROUNDS = 9


def kernels_of(gm: GraphModule, screen: Screen, name: str) -> list[LayerKernel] | None:
    """What computes each layer on this CPU; `None`, said aloud, where it cannot be lowered."""
    try:
        return api.kernel_audit(api.lower(gm, "x86"))
    except QwtError as error:
        screen.note(f"{name} tower: kernels are not known: {error}")
        return None


def moved_ranges(
    floating: GraphModule,
    before: dict[str, LayerStatistics],
    after: dict[str, LayerStatistics],
) -> list[ChannelRanges]:
    """Of the layers behind norms, one a norm, whose input's channels were moved."""
    moved, seen = [], set()
    for layer in weight_layers(floating):
        source = layer.args[0]
        assert isinstance(source, torch.fx.Node)
        norm = through_shape_ops(source)
        name = layer_name(layer)
        if norm.target not in NORMS or norm in seen or name not in after:
            continue
        seen.add(norm)
        a, b = before[name], after[name]
        if len(a.channel_low) == len(b.channel_low) and a.channel_high != b.channel_high:
            moved.append(
                ChannelRanges(name, a.channel_low, a.channel_high, b.channel_low, b.channel_high)
            )
    return moved


def latency_of(
    model: ClipModel,
    name: str,
    gm: GraphModule,
    floating: GraphModule | None,
    screen: Screen,
) -> dict[str, float]:
    """Median seconds of one sample, uncompiled, by runtime."""
    example = model.example(name)
    graphs = {
        "FP32": floating_graph(gm) if floating is None else floating,
        "eager": api.lower(gm, "eager"),
    }
    try:
        graphs["x86"] = api.lower(gm, "x86")
    except QwtError as error:
        screen.note(f"{name} tower: no latency of x86: {error}")
    with torch.no_grad(), screen.phase(f"{name} tower: latency"):
        calls = {key: (lambda graph=graph: graph(example)) for key, graph in graphs.items()}
        latencies = interleaved(calls, ROUNDS, 2)
    return {key: latency.median for key, latency in latencies.items()}
