"""What the outputs of a group's layers miss, summed over the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from qwt_fx.fake_quant import FakeQuant
from qwt_fx.gram import LayerSums
from qwt_fx.layer_groups import LayerGroup, residual_of, rows_of
from qwt_fx.lockstep import Lockstep
from qwt_fx.precision import wide
from qwt_fx.rescale import weight_and_bias

Parameters = tuple[Tensor, Tensor | None]


def layer_sums(
    walk: Lockstep,
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
        x_hat = x if quantizer is None else quantizer.fake_quantize(x)
        for at, layer in enumerate(layers):
            weight, bias = wide(current[layer][0]), wide(current[layer][1])
            keep, judged = walk.rows(group.source, layer, index, weight)
            rows = wide(rows_of(layer, weight, x_hat)[keep])
            if walk.remedies.fp_target:
                wanted = _floating_output(walk, group.source, layer, floating[layer], index, keep)
            else:
                wanted = F.linear(wide(rows_of(layer, weight, x)[keep]), weight.flatten(1), bias)
            missing = wanted - F.linear(rows, weight.flatten(1), bias)
            for which, chosen in enumerate((~judged, judged)):
                for part in LayerSums.parts(rows[chosen], missing[chosen]):
                    yield at, which, part

    for at, which, part in walk.share.in_order(parts):
        sums[layers[at]][which].merge(part)
    return sums


def _floating_output(
    walk: Lockstep, source: Node, layer: Node, parameters: Parameters, index: int, keep: Tensor
) -> Tensor:
    """The floating-point path's output, (rows kept, outputs), with what the residual stream misses."""
    known = walk.floating_output(layer, index)
    if known is not None:
        wanted = wide(known.reshape(-1, known.shape[-1])[keep])
    else:
        weight, bias = wide(parameters[0]), wide(parameters[1])
        rows = wide(rows_of(layer, weight, walk.floating(source, index))[keep])
        wanted = F.linear(rows, weight.flatten(1), bias)
    residual = residual_of(layer)
    gap = None if residual is None else walk.gap(residual, index)
    return wanted if gap is None else wanted + gap.reshape(-1, gap.shape[-1])[keep]
