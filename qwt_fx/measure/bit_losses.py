"""What each layer's weights, and its input, cost the model's output at each bit width.

One walk over the floating-point graph: at each group of layers that read one value, only the weights
or only the value are quantized, at one width after another, and the part of the graph behind them is
run (`measure.sensitivity`). Ranges are the observers' own (`numerics.percentile_search`), weights are
rounded to nearest: what recipes do better they do better everywhere, so the order of the layers stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batch
from qwt_fx.graph.nodes import layer_name
from qwt_fx.measure.sensitivity import OutputProbe, weight_operand
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_of, set_mode
from qwt_fx.quant.layer_groups import LayerGroup, weight_quantizer
from qwt_fx.quant.rescale import weight_and_bias

WEIGHT, INPUT = "weight", "input"
Judge = Callable[[Tensor], float]


@dataclass(frozen=True)
class BitLoss:
    """One operand of one group of layers, quantized alone at one width.

    Attributes:
        layers: names of the layers; they read one value through one quantizer.
        operand: "weight" or "input".
        bits: the width.
        elements: number of weights; 0 for an input, which takes no room in a file.
        error: squared error of the model's output relative to its energy.
        agreement: fraction of the samples whose nearest partner stays the same, in [0, 1]; `None`
            where nobody judges.
    """

    layers: tuple[str, ...]
    operand: str
    bits: int
    elements: int
    error: float
    agreement: float | None = None

    @property
    def key(self) -> tuple[tuple[str, ...], str, int]:
        """What was quantized, and how."""
        return self.layers, self.operand, self.bits

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BitLoss:
        """The loss `to_dict` described."""
        return cls(**{**values, "layers": tuple(values["layers"])})


def measure_bits(
    gm: GraphModule,
    batch: Batch,
    widths: Mapping[str, Sequence[int]],
    *,
    fixed: Callable[[str], bool] = lambda name: False,
    judge: Judge | None = None,
    known: Sequence[BitLoss] = (),
) -> Iterator[BitLoss]:
    """Losses of every operand at every width, in graph order, as soon as each is known.

    Args:
        gm: a graph with observers, not calibrated, all of one width below 8; they are switched off.
            An observer of another width (an image of 8-bit pixels) keeps it and is left out.
        batch: one batch of inputs.
        widths: bits to try, by operand, "weight" and "input".
        fixed: layers that keep their bits.
        judge: agreement of an output with the floating-point one.
        known: losses that an earlier run has measured; they are passed on.

    Takes one forward pass of the rest of the graph for each loss.
    """
    set_mode(gm, Mode.OFF)
    have = {loss.key: loss for loss in known}
    with torch.no_grad():
        probe = OutputProbe(gm, batch)
        lowest = min(min(bits) for bits in widths.values() if bits)
        for group in probe.groups():
            names = tuple(layer_name(n) for n in group.layers)
            if any(fixed(name) for name in names):
                continue
            for operand in (WEIGHT, INPUT):
                for bits in widths[operand]:
                    loss = have.get((names, operand, bits))
                    yield from (
                        [loss]
                        if loss is not None
                        else _loss(probe, group, names, operand, bits, lowest, judge)
                    )


def _loss(
    probe: OutputProbe,
    group: LayerGroup,
    names: tuple[str, ...],
    operand: str,
    bits: int,
    lowest: int,
    judge: Judge | None,
) -> Iterator[BitLoss]:
    """The loss of one operand at one width; none where it is not quantized or keeps its width."""
    changed, elements = (_weights if operand == WEIGHT else _input)(probe, group, bits, lowest)
    if not changed:
        return
    outputs = probe.outputs(changed)
    agreement = None if judge is None else judge(outputs[0])
    yield BitLoss(names, operand, bits, elements, probe.error(outputs), agreement)


def _weights(
    probe: OutputProbe, group: LayerGroup, bits: int, lowest: int
) -> tuple[dict[Node, Tensor], int]:
    changed, elements = {}, 0
    for layer in group.layers:
        module = weight_quantizer(probe.gm, layer)
        if module is not None and module.spec.bits == lowest:
            weight, _ = weight_and_bias(probe.gm, layer)
            changed[weight_operand(layer)] = _quantized(module, weight, bits)
            elements += weight.numel()
    return changed, elements


def _input(
    probe: OutputProbe, group: LayerGroup, bits: int, lowest: int
) -> tuple[dict[Node, Tensor], int]:
    if group.quantizer is None:
        return {}, 0
    module = fake_quant_of(probe.gm, group.quantizer)
    if module.spec.bits != lowest:
        return {}, 0
    return {group.quantizer: _quantized(module, probe.value(group.source), bits)}, 0


def _quantized(like: FakeQuant, value: Tensor, bits: int) -> Tensor:
    module = FakeQuant(replace(like.spec, bits=bits), like.name)
    module.observe(value)
    return module.fake_quantize(value)
