"""What the outputs of a group's layers miss, summed over the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from qwt_fx.batches.precision import wide
from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.nodes import is_call
from qwt_fx.numerics.second_moments import LayerSums
from qwt_fx.quant.fake_quant import FakeQuant
from qwt_fx.quant.layer_groups import LayerGroup, residual_of, rows_of
from qwt_fx.quant.rescale import weight_and_bias

Parameters = tuple[Tensor, Tensor | None]


def layer_sums(
    walk: PairedWalk,
    group: LayerGroup,
    layers: list[Node],
    floating: dict[Node, Parameters],
    quantizer: FakeQuant | None,
) -> dict[Node, tuple[LayerSums, LayerSums]]:
    """Sums of each layer over tokens that fit and tokens that judge, on the quantized input.

    They are complete on the first rank, and empty on the others.

    floating: weight and bias of each layer in the floating-point graph, as they were before any
    rescale. The missing part is measured against the layer's output there, or, with a local target,
    against its own output on the unquantized input of the quantized path.
    """
    current = {layer: weight_and_bias(walk.gm, layer) for layer in layers}
    sums = {}
    for layer, (weight, _) in current.items():
        sizes = (weight.flatten(1).shape[1], len(weight), weight.device)
        sums[layer] = (LayerSums.empty(*sizes), LayerSums.empty(*sizes))
    values = walk.values(group.source)

    def parts(index: int) -> Iterator[tuple[int, int, list[Tensor]]]:
        x = values[index]
        rounded: list[Tensor] = []  # the whole of x, once a layer reads all of it
        for at, layer in enumerate(layers):
            weight, bias = wide(current[layer][0]), wide(current[layer][1])
            keep, judged = walk.rows(group.source, layer, index, weight)
            rows = wide(_quantized_rows(layer, weight, x, keep, quantizer, rounded))
            if walk.settings.target == "fp":
                wanted = _floating_output(walk, group.source, layer, floating[layer], index, keep)
            else:
                read = wide(_kept(rows_of(layer, weight, x), keep))
                wanted = F.linear(read, weight.flatten(1), bias)
            missing = F.linear(rows, weight.flatten(1), bias)
            torch.sub(wanted, missing, out=missing)  # as wide as the widest value: held once
            del wanted
            for which, chosen in enumerate((~judged, judged)):
                for part in LayerSums.parts(rows[chosen], missing[chosen]):
                    yield at, which, part

    for at, which, part in walk.batches.in_order(parts):
        sums[layers[at]][which].merge(part)
    return sums


def _quantized_rows(
    layer: Node,
    weight: Tensor,
    x: Tensor,
    keep: Tensor,
    quantizer: FakeQuant | None,
    rounded: list[Tensor],
) -> Tensor:
    """The rows kept, (rows, inputs), of what a layer reads; nothing else is rounded where few are."""
    if quantizer is None:
        return _kept(rows_of(layer, weight, x), keep)
    if is_call(layer, {LINEAR}) and quantizer.token_scale is None:
        rows = rows_of(layer, weight, x)
        if len(keep) < len(rows):
            return quantizer.fake_quantize(rows[keep])
    if not rounded:
        rounded.append(quantizer.fake_quantize(x))
    return _kept(rows_of(layer, weight, rounded[0]), keep)


def _kept(rows: Tensor, keep: Tensor) -> Tensor:
    """Some rows, in their order; all of them are not copied."""
    return rows if len(keep) == len(rows) else rows[keep]


def _floating_output(
    walk: PairedWalk, source: Node, layer: Node, parameters: Parameters, index: int, keep: Tensor
) -> Tensor:
    """The floating-point path's output, (rows kept, outputs), with what the residual stream misses."""
    missing = walk.missing_in_sum(layer, index)
    if missing is not None:
        return _kept(missing.reshape(-1, missing.shape[-1]), keep)
    known = walk.floating_output(layer, index)
    if known is not None:
        wanted = wide(_kept(known.reshape(-1, known.shape[-1]), keep))
    else:
        weight, bias = wide(parameters[0]), wide(parameters[1])
        rows = wide(_kept(rows_of(layer, weight, walk.floating(source, index)), keep))
        wanted = F.linear(rows, weight.flatten(1), bias)
    residual = residual_of(layer)
    gap = None if residual is None else walk.gap(residual, index)
    if gap is None:
        return wanted
    if not is_call(layer, {LINEAR}):
        gap = gap.movedim(1, -1)  # a convolution's rows are pixels
    return wanted + _kept(gap.reshape(-1, gap.shape[-1]), keep)
