"""What each layer's quantization does to the model's output, layer by layer, on calibration data.

Each layer alone is quantized, all others stay in floating point, and the part of the graph behind it
is run: the squared error of the output relative to its energy. Errors of different layers are nearly
uncorrelated, so the whole model's error is about their sum, and 4 times less for each further bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batch
from qwt_fx.graph.nodes import layer_name
from qwt_fx.graph.runner import Env, computed, evaluate, start, steps
from qwt_fx.measure.measure import tensors_of
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_of
from qwt_fx.quant.layer_groups import LayerGroup, find_groups, weight_quantizer
from qwt_fx.quant.rescale import weight_and_bias


@dataclass(frozen=True)
class Sensitivity:
    """One group of layers that read one quantized value.

    Attributes:
        layers: their names.
        input_error: squared error of the model's output, relative to its energy, with the group's
            input quantized alone; `None` where it is not quantized.
        weight_error: the same for the weights of the group's layers.
        input_bits, weight_bits: the bits these were measured at.
        weights: number of weights.
    """

    layers: tuple[str, ...]
    input_error: float | None
    weight_error: float | None
    input_bits: int | None
    weight_bits: int | None
    weights: int

    @property
    def error(self) -> float:
        """What the group adds to the relative squared error of the output."""
        return (self.input_error or 0.0) + (self.weight_error or 0.0)


def measure_sensitivity(gm: GraphModule, batch: Batch) -> list[Sensitivity]:
    """Sensitivity of every group of layers of an observed graph, in graph order.

    gm: a graph whose quantizers are calibrated and whose float function is the model's (RepQ-ViT's
    reparameterization keeps it); its quantizers are switched off and left so. batch: one batch of
    inputs. Takes one forward pass of the rest of the graph for each input and each weight.
    """
    for module in gm.modules():
        if isinstance(module, FakeQuant):
            module.mode = Mode.OFF
    with torch.no_grad():
        probe = OutputProbe(gm, batch)
        return [_sensitivity(probe, group) for group in probe.groups()]


class OutputProbe:
    """Walks a graph once; at each node asked for, runs the rest of it with some values changed.

    Attributes:
        gm: a graph; its quantizers do what they are switched to.
        exact: the outputs without a change, tensors in order.
    """

    def __init__(self, gm: GraphModule, batch: Batch) -> None:
        self.gm = gm
        self.nodes = computed(gm)
        self.env: Env = start(gm, batch)
        self._at = 0
        self.exact = self.outputs({})

    def walk(self) -> Iterator[Node]:
        """Every node before it runs; `value` and `outputs` are then about this point."""
        for index, node in enumerate(steps(self.gm, self.nodes, self.env)):
            self._at = index
            yield node

    def groups(self) -> Iterator[LayerGroup]:
        """Every group of layers in graph order, before its value is quantized."""
        groups = {g.quantizer or g.layers[0]: g for g in find_groups(self.gm) if g.layers}
        for node in self.walk():
            if node in groups:
                yield groups[node]

    def value(self, node: Node) -> Tensor:
        """A value known at this point."""
        value: Tensor = self.env[node]
        return value

    def outputs(self, changed: Mapping[Node, Tensor]) -> list[Tensor]:
        """The model's outputs when these nodes, not run yet, have these values."""
        nodes = [n for n in self.nodes[self._at :] if n not in changed]
        return tensors_of(evaluate(self.gm, nodes, self.env | dict(changed))[self.nodes[-1]])

    def error(self, outputs: Sequence[Tensor]) -> float:
        """Squared error of outputs, relative to the energy of the exact ones."""
        noise = sum(
            float((a - b).square().sum(dtype=torch.float64))
            for a, b in zip(self.exact, outputs, strict=True)
        )
        signal = sum(float(a.square().sum(dtype=torch.float64)) for a in self.exact)
        return noise / max(signal, torch.finfo(torch.float64).tiny)


def weight_operand(layer: Node) -> Node:
    """The node of a layer's weight: its quantizer where it has one."""
    operand = layer.args[1]
    assert isinstance(operand, Node)  # find_groups checked that it is a parameter's
    return operand


def _sensitivity(probe: OutputProbe, group: LayerGroup) -> Sensitivity:
    gm = probe.gm
    module = None if group.quantizer is None else fake_quant_of(gm, group.quantizer)
    input_error = None
    if module is not None and group.quantizer is not None:
        quantized = module.fake_quantize(probe.value(group.source))
        input_error = probe.error(probe.outputs({group.quantizer: quantized}))
    weights, count, bits = {}, 0, []
    for layer in group.layers:
        weight, _ = weight_and_bias(gm, layer)
        count += weight.numel()
        quantizer = weight_quantizer(gm, layer)
        if quantizer is not None:
            weights[weight_operand(layer)] = quantizer.fake_quantize(weight)
            bits.append(quantizer.spec.bits)
    return Sensitivity(
        layers=tuple(layer_name(n) for n in group.layers),
        input_error=input_error,
        weight_error=probe.error(probe.outputs(weights)) if weights else None,
        input_bits=None if module is None else module.spec.bits,
        weight_bits=min(bits, default=None),
        weights=count,
    )
