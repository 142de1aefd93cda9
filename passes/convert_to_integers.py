"""Converts fake_quants to integer weights and q/dq operators."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.errors import NotCalibratedError, PostconditionError
from qwt_fx.graph.edits import add_tensor, described
from qwt_fx.graph.nodes import dtype_of, tensor_of
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.numerics.qparams import LOG_SQRT2, along_axis
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_of, is_fake_quant
from qwt_fx.text.text_length import cut_to_length


@dataclass(frozen=True)
class ConvertToIntegers(Pass):
    """Replace every `FakeQuant` by what it simulated; the outputs stay bit-identical.

    Weights become uint8 tensors behind `dequantize_per_channel`, activations pass
    `quantize_per_tensor` and `dequantize_per_tensor`, dynamic ones their twins per token; the
    log-sqrt2 code and non-integer zero points use `qwt_fx::` operators. Run again,
    nothing is left to convert. Raises `NotCalibratedError` for a quantizer without a scale.
    """

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        for node in [n for n in gm.graph.nodes if is_fake_quant(gm, n)]:
            module = fake_quant_of(gm, node)
            if not module.calibrated:
                raise NotCalibratedError(f"{module.name} has no scale: calibrate first")
            if module.spec.dynamic and not module.spec.per_token:
                raise NotCalibratedError(
                    f"{module.name} is dynamic and still has ranges of channels: run FoldChannelWise"
                )
            source = node.args[0]
            assert isinstance(source, Node)  # a FakeQuant reads one tensor
            weight = tensor_of(gm, source)
            dtype = _dtype(source, weight)
            cast = torch.ops.aten.to.dtype
            with gm.graph.inserting_before(node):
                if weight is not None and module.spec.integer_zero_point:
                    new = _integer_weight(gm, source, weight.float(), module)
                else:
                    if dtype is not torch.float32:
                        source = gm.graph.call_function(cast, (source, torch.float32))
                    new = _per_token(gm, source, module)
                if dtype is not torch.float32:  # the operators compute in float32
                    new = gm.graph.call_function(cast, (new, dtype))
            new.meta = described(node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            yield Change(module.name, str(new.target))

    def ensures(self, gm: GraphModule) -> None:
        """No `FakeQuant` may be left."""
        left = [n.name for n in gm.graph.nodes if n.op == "call_module"]
        if left:
            raise PostconditionError(f"{self.name}: modules are left in the graph: {left[:3]}")


def _dtype(source: Node, weight: Tensor | None) -> torch.dtype:
    """What is quantized and comes back; of a node a pass put in, what is recorded of its first input."""
    known = dtype_of(source) if weight is None else weight.dtype
    if known is not None:
        return known
    inputs = source.all_input_nodes
    return _dtype(inputs[0], None) if inputs else torch.float32


def _integer_weight(gm: GraphModule, source: Node, weight: Tensor, module: FakeQuant) -> Node:
    scale, zero_point, spec = module.scale, module.zero_point, module.spec
    assert scale is not None and zero_point is not None and spec.ch_axis is not None
    axis = spec.ch_axis % weight.dim()
    zeros = zero_point.to(torch.int64)
    limits = (spec.quant_min, spec.quant_max, torch.uint8)
    codes = torch_ao.QUANTIZE_PER_CHANNEL(weight.detach(), scale, zeros, axis, *limits)
    name = str(source.target)
    codes_node = add_tensor(gm, f"{name}_codes", codes)
    scale_node = add_tensor(gm, f"{name}_scale", scale)
    zeros_node = add_tensor(gm, f"{name}_zero_point", zeros)
    return gm.graph.call_function(
        torch_ao.DEQUANTIZE_PER_CHANNEL, (codes_node, scale_node, zeros_node, axis, *limits)
    )


def _per_token(gm: GraphModule, source: Node, module: FakeQuant) -> Node:
    """The activation's quantizer, between two products where positions have scales of their own."""
    if module.token_scale is None:
        return _activation(gm, source, module)
    multiply = torch.ops.aten.mul.Tensor
    inverse = add_tensor(gm, f"{module.name}_token_inverse", module.token_scale.reciprocal())
    factor = add_tensor(gm, f"{module.name}_token_scale", module.token_scale)
    inverse, factor = cut_to_length(gm, inverse, 0), cut_to_length(gm, factor, 0)
    divided = gm.graph.call_function(multiply, (source, inverse))
    return gm.graph.call_function(multiply, (_activation(gm, divided, module), factor))


def _activation(gm: GraphModule, source: Node, module: FakeQuant) -> Node:
    scale, zero_point, spec = module.scale, module.zero_point, module.spec
    call = gm.graph.call_function
    if spec.per_token:
        found: Any = call(ops.CHOOSE_QPARAMS_PER_TOKEN, (source, spec.quant_max))
        found = tuple(call(operator.getitem, (found, i)) for i in range(2))
        of_token = (*found, spec.quant_min, spec.quant_max)
        codes = call(torch_ao.QUANTIZE_PER_TOKEN, (source, *of_token, torch.uint8))
        return call(torch_ao.DEQUANTIZE_PER_TOKEN, (codes, *of_token, torch.uint8, torch.float32))
    assert scale is not None  # checked by the caller
    if spec.scheme == LOG_SQRT2:
        if not spec.reserve_zero:
            return call(ops.FAKE_QUANTIZE_LOG_SQRT2, (source, float(scale), spec.bits))
        codes = call(ops.QUANTIZE_LOG_SQRT2, (source, float(scale), spec.bits))
        return call(ops.DEQUANTIZE_LOG_SQRT2, (codes, float(scale), spec.bits))
    assert zero_point is not None  # affine quantizers have both
    limits: tuple[Any, ...] = (spec.quant_min, spec.quant_max)
    if not spec.integer_zero_point:
        value = tensor_of(gm, source)
        rank = value.dim() if value is not None else 1
        axis = spec.ch_axis
        scale_node = add_tensor(gm, f"{module.name}_scale", along_axis(scale, axis, rank))
        zeros_node = add_tensor(gm, f"{module.name}_zero_point", along_axis(zero_point, axis, rank))
        return call(ops.FAKE_QUANTIZE_AFFINE, (source, scale_node, zeros_node, *limits))
    limits = (*limits, torch.uint8)
    if spec.ch_axis is None:
        qparams = (float(scale), int(zero_point), *limits)
        codes = call(torch_ao.QUANTIZE_PER_TENSOR, (source, *qparams))
        return call(torch_ao.DEQUANTIZE_PER_TENSOR, (codes, *qparams))
    scale_node = add_tensor(gm, f"{module.name}_scale", scale)
    zeros_node = add_tensor(gm, f"{module.name}_zero_point", zero_point.to(torch.int64))
    shape = source.meta["val"].dim() if "val" in source.meta else None
    axis = spec.ch_axis if shape is None else spec.ch_axis % shape
    channel = (scale_node, zeros_node, axis, *limits)
    codes = call(torch_ao.QUANTIZE_PER_CHANNEL, (source, *channel))
    return call(torch_ao.DEQUANTIZE_PER_CHANNEL, (codes, *channel))
