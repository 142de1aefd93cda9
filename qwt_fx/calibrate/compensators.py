"""The kinds of compensation: what each regresses on, how it is fitted, what it adds to the graph.

qwt      y + x W + b           x the block's input, W in half precision (arXiv 2411.13918)
lowrank  y + (x A) B + b       the same with W of rank R
int8     y + x~ W + b          x~ the quantized input of the block's first linears, W 8-bit
affine   y + (a - 1) m + c     m the block's last linear, into which a and c are folded
                               (QwT-v2, arXiv 2505.20932)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.calibrate.compensation_sites import (
    Reordering,
    integer_input,
    last_linear,
    require_channels_last,
)
from qwt_fx.config.compensation_kind import CompensationKind
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.edits import add_module, add_tensor, described
from qwt_fx.graph.nodes import ancestors, dtype_of, shape_of
from qwt_fx.numerics.channel_affine import AffineFit, ChannelMoments, fit_affine
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.numerics.regression import Fit, Moments, fit_held_out, fit_original
from qwt_fx.numerics.stored_weight import (
    INT8_ZERO_POINT,
    Dense,
    Int8,
    LowRank,
    Storage,
    fits_half,
    int8_scale,
)
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_of, is_fake_quant
from qwt_fx.quant.rescale import set_layer, weight_and_bias

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A block, the value its error is regressed on, and the steps to the output's layout.

    `channels`: the dimension of the channels, -1 where it is the last: 1 of maps (n, c, h, w).
    """

    name: str
    source: Node
    result: Node
    regressor: Node
    steps: tuple[Reordering, ...] = ()
    channels: int = -1

    def regressor_value(self, value: Tensor) -> Tensor:
        """The regressor with its tokens in the order of the block's output, channels last."""
        for operator, args in self.steps:
            value = operator(value, *args)
        return value.movedim(self.channels, -1)

    def output_value(self, value: Tensor) -> Tensor:
        """The block's output, channels last."""
        return value.movedim(self.channels, -1)

    def add(self, gm: GraphModule, *values: Node) -> Node:
        """The block's output plus some values, in its place; at the graph's insertion point."""
        readers = list(self.result.users)
        output = self.result
        for value in values:
            output = gm.graph.call_function(aten.add.Tensor, (output, value))
            output.meta.update(described(self.result))
        for reader in readers:
            reader.replace_input_with(self.result, output)
        return output


@dataclass(frozen=True)
class Inserted:
    """The block's new output, and what the compensation costs: numbers stored, MACs per token."""

    output: Node
    parameters: int
    macs: int


Sums = TypeVar("Sums")
Fitted = TypeVar("Fitted")


class Compensator(ABC, Generic[Sums, Fitted]):
    """One kind of compensation."""

    @abstractmethod
    def site(
        self, gm: GraphModule, name: str, source: Node, result: Node, channels: int = -1
    ) -> Site:
        """Where it attaches to a block whose values have their channels there.

        Raises `NoSite` where it cannot.
        """

    @abstractmethod
    def empty(self, inputs: int, outputs: int, device: torch.device) -> Sums:
        """Sums over no tokens of the regressor and the error."""

    @abstractmethod
    def fit(self, train: Sums, held_out: Sums | None) -> Fitted:
        """A fit judged on held-out sums, or, as published, on the ones that make it."""

    @abstractmethod
    def insert(self, gm: GraphModule, site: Site, fit: Fitted) -> Inserted:
        """Put the fitted compensation into the graph."""


class _LinearCompensator(Compensator[Moments, Fit]):
    """One that regresses on all channels of a value."""

    def empty(self, inputs: int, outputs: int, device: torch.device) -> Moments:
        """See `Compensator`."""
        return Moments.empty(inputs, outputs, device)


@dataclass(frozen=True)
class InputLinear(_LinearCompensator):
    """A linear of the block's input, dense or of low rank; `half`: stored in half precision."""

    storage: Storage
    half: bool

    def site(
        self, gm: GraphModule, name: str, source: Node, result: Node, channels: int = -1
    ) -> Site:
        """See `Compensator`."""
        return Site(name, source, result, source, channels=channels)

    def fit(self, train: Moments, held_out: Moments | None) -> Fit:
        """See `Compensator`."""
        return _fit(train, held_out, self.storage)

    def insert(self, gm: GraphModule, site: Site, fit: Fit) -> Inserted:
        """See `Compensator`."""
        suffixes = ("",) if len(fit.factors) == 1 else (".down", ".up")
        dtype, value = dtype_of(site.result) or torch.float32, site.source
        base = f"{site.name}.compensation"
        with gm.graph.inserting_before(site.result.next):
            if site.channels != -1:
                value = gm.graph.call_function(aten.movedim.int, (value, site.channels, -1))
            for suffix, factor in zip(suffixes, fit.factors, strict=True):
                half = self.half and fits_half(factor)
                stored = factor.half() if half else factor.to(dtype)
                matrix = add_tensor(gm, f"{base}{suffix}_weight", stored.contiguous())
                if stored.dtype is not dtype:
                    matrix = gm.graph.call_function(aten.to.dtype, (matrix, dtype))
                value = gm.graph.call_function(aten.matmul.default, (value, matrix))
                value.meta["layer"] = f"{base}{suffix}"
            shift = fit.bias.to(dtype)
            if site.channels != -1:
                value = gm.graph.call_function(aten.movedim.int, (value, -1, site.channels))
                rank = len(shape_of(site.result) or ())
                shift = shift.reshape(-1, *[1] * (rank - 1 - site.channels))
            value.meta.update(described(site.result))
            output = site.add(gm, value, add_tensor(gm, f"{base}_bias", shift))
        macs = sum(factor.numel() for factor in fit.factors)
        return Inserted(output, macs + fit.bias.numel(), macs)


@dataclass(frozen=True)
class IntegerLinear(_LinearCompensator):
    """An 8-bit linear of the first quantized activation in the block.

    That activation is an integer already, so these are more output rows of a product that the
    block computes anyway.
    """

    def site(
        self, gm: GraphModule, name: str, source: Node, result: Node, channels: int = -1
    ) -> Site:
        """See `Compensator`."""
        require_channels_last(channels)
        value, steps = integer_input(source, ancestors(result), gm)
        return Site(name, source, result, value, tuple(steps))

    def fit(self, train: Moments, held_out: Moments | None) -> Fit:
        """See `Compensator`."""
        return _fit(train, held_out, Int8())

    def insert(self, gm: GraphModule, site: Site, fit: Fit) -> Inserted:
        """See `Compensator`."""
        dtype = dtype_of(site.result) or torch.float32
        scale = int8_scale(fit.weight)
        base = f"{site.name}.compensation"
        quantizer = FakeQuant(QuantSpec(8, ch_axis=0), f"{base}.weight")
        quantizer.set_qparams(scale, torch.full_like(scale, INT8_ZERO_POINT))
        quantizer.mode = Mode.ON
        with gm.graph.inserting_before(site.result.next):
            weight = add_tensor(gm, f"{base}_weight", fit.weight.T.to(dtype).contiguous())
            path = add_module(gm, "fake_quant_0", quantizer)
            rounded = gm.graph.call_module(path, (weight,))
            bias = add_tensor(gm, f"{base}_bias", fit.bias.to(dtype))
            value = gm.graph.call_function(LINEAR, (site.regressor, rounded, bias))
            value.meta["layer"] = base
            for operator, args in site.steps:
                value = gm.graph.call_function(operator, (value, *args))
            output = site.add(gm, value)
        macs = fit.weight.numel()
        return Inserted(output, macs + fit.bias.numel(), macs)


@dataclass(frozen=True)
class FoldedAffine(Compensator[ChannelMoments, AffineFit]):
    """A scale and a shift of each channel of the block's last linear, folded into it.

    The scale goes into that of the linear's weight quantizer, whose codes stay, or into a weight in
    floating point; the shift goes into the bias. Nothing is added.
    """

    def site(
        self, gm: GraphModule, name: str, source: Node, result: Node, channels: int = -1
    ) -> Site:
        """See `Compensator`."""
        require_channels_last(channels)
        return Site(name, source, result, last_linear(gm, result))

    def empty(self, inputs: int, outputs: int, device: torch.device) -> ChannelMoments:
        """See `Compensator`."""
        return ChannelMoments.empty(outputs, device)

    def fit(self, train: ChannelMoments, held_out: ChannelMoments | None) -> AffineFit:
        """See `Compensator`."""
        return fit_affine(train, held_out)

    def insert(self, gm: GraphModule, site: Site, fit: AffineFit) -> Inserted:
        """See `Compensator`."""
        weight, bias = weight_and_bias(gm, site.regressor)
        qparams, node = None, site.regressor.args[1]
        if isinstance(node, Node) and is_fake_quant(gm, node):
            module = fake_quant_of(gm, node)
            assert module.scale is not None and module.zero_point is not None  # affine, calibrated
            # From the codes' own values: a weight halfway between two codes might change sides.
            weight = module.fake_quantize(weight)
            qparams = ((module.scale.double() * fit.scale).float(), module.zero_point)
        shift = fit.shift if bias is None else bias.double() * fit.scale + fit.shift
        set_layer(gm, site.regressor, weight.double() * fit.scale[:, None], shift, qparams)
        return Inserted(site.result, 0 if bias is not None else shift.numel(), 0)


def compensator(kind: CompensationKind, half: bool) -> Compensator[Any, Any]:
    """The compensation of a kind other than "none"; `half`: floats in half precision."""
    if kind.name == "affine":
        return FoldedAffine()
    if kind.name == "int8":
        return IntegerLinear()
    storage: Storage = Dense(half) if kind.rank is None else LowRank(kind.rank, half)
    return InputLinear(storage, half)


def _fit(train: Moments, held_out: Moments | None, storage: Storage) -> Fit:
    if held_out is None:
        return fit_original(train, storage)
    return fit_held_out(train, held_out, storage)
