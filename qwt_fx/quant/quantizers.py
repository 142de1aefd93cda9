"""Reads the quantizers of a graph back from it, prepared or converted, saved and loaded or not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import CONVOLUTIONS, LINEAR, SHAPE_ONLY
from qwt_fx.graph.constants import constant_value
from qwt_fx.graph.nodes import (
    ancestors,
    compute_nodes,
    get_attr,
    is_call,
    is_constant,
    layer_name,
    tensor_of,
    weight_layers,
)
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao
from qwt_fx.quant.fake_quant import fake_quant_of, is_fake_quant
from qwt_fx.text.text_length import uncut

# What a converted graph's values pass into integers and out of them again.
QUANTIZE = frozenset(
    {
        torch_ao.QUANTIZE_PER_TENSOR, torch_ao.QUANTIZE_PER_CHANNEL, torch_ao.QUANTIZE_PER_TOKEN,
        ops.QUANTIZE_LOG_SQRT2,
    }
)  # fmt: skip
DEQUANTIZE = frozenset(
    {
        torch_ao.DEQUANTIZE_PER_TENSOR, torch_ao.DEQUANTIZE_PER_CHANNEL,
        torch_ao.DEQUANTIZE_PER_TOKEN, ops.DEQUANTIZE_LOG_SQRT2,
    }
)  # fmt: skip
_PER_TENSOR = frozenset({torch_ao.DEQUANTIZE_PER_TENSOR})
_PER_TOKEN = frozenset({torch_ao.DEQUANTIZE_PER_TOKEN})
_PER_CHANNEL = frozenset({torch_ao.DEQUANTIZE_PER_CHANNEL})
_LOG = frozenset({ops.DEQUANTIZE_LOG_SQRT2, ops.FAKE_QUANTIZE_LOG_SQRT2})
_ORIGINAL = frozenset({ops.FAKE_QUANTIZE_AFFINE})
CASTS = frozenset({torch.ops.aten.to.dtype})  # behind q/dq, which compute in float32
_COMPENSATION = re.compile(r"(.*)\.compensation(?:\.down|\.up)?")


@dataclass(frozen=True)
class Quantizer:
    """One quantizer found in a graph: its bits, scale and zero point (`None` for log-sqrt2).

    A dynamic one has neither: it finds those of each token when it runs.
    """

    bits: int
    scale: Tensor | None
    zero_point: Tensor | None

    @property
    def dynamic(self) -> bool:
        """Whether each token has a range of its own."""
        return self.scale is None


def _bits(quant_max: object) -> int:
    assert isinstance(quant_max, int)  # the operators' schemas
    return (quant_max + 1).bit_length() - 1


def quantizer_at(gm: GraphModule, node: object) -> Quantizer | None:
    """The quantizer whose output this value is, through moves of elements and half precision's casts."""
    through = SHAPE_ONLY | CASTS
    while isinstance(node, Node) and (is_call(node, through) or _is_token_scale(gm, node)):
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    if is_fake_quant(gm, node):
        module = fake_quant_of(gm, node)
        if not module.calibrated:
            return None
        return Quantizer(module.spec.bits, module.scale, module.zero_point)
    if is_call(node, _PER_TENSOR):
        _, scale, zero_point, _, quant_max = node.args[:5]
        return Quantizer(_bits(quant_max), torch.tensor(scale), torch.tensor(zero_point))
    if is_call(node, _PER_TOKEN):
        return Quantizer(_bits(node.args[4]), None, None)
    if is_call(node, _PER_CHANNEL):
        scale, zero_point = tensor_of(gm, node.args[1]), tensor_of(gm, node.args[2])
        return None if scale is None else Quantizer(_bits(node.args[5]), scale, zero_point)
    if is_call(node, _LOG):
        return Quantizer(int(node.args[2]), torch.tensor(node.args[1]), None)  # type: ignore[arg-type]
    if is_call(node, _ORIGINAL):
        scale, zero_point = tensor_of(gm, node.args[1]), tensor_of(gm, node.args[2])
        return None if scale is None else Quantizer(_bits(node.args[4]), scale, zero_point)
    return None


def _is_token_scale(gm: GraphModule, node: Node) -> bool:
    """Whether this multiplies a dequantized activation by the scales of its positions."""
    if not is_call(node, {torch.ops.aten.mul.Tensor}) or len(node.args) != 2:
        return False
    return is_call(node.args[0], _PER_TENSOR) and tensor_of(gm, uncut(node.args[1])) is not None


def operand_bits(gm: GraphModule, node: Node) -> tuple[int | None, int | None]:
    """(weight bits, activation bits) of a multiplying node; `None` for floating point.

    A product of two activations has no weight: both entries are its operands' widest bits, and
    `None` when an operand is not quantized.
    """
    operands = [quantizer_at(gm, a) for a in node.args[:2]]
    widths = [None if q is None else q.bits for q in operands]
    if node.target is LINEAR or node.target in CONVOLUTIONS or _has_parameter(node):
        return widths[1], widths[0]
    if len(widths) < 2 or widths[0] is None or widths[1] is None:
        return None, None
    return None, max(widths[0], widths[1])


def _has_parameter(node: Node) -> bool:
    return any(isinstance(a, Node) and is_constant(a) for a in node.args[:2])


def activations_of(gm: GraphModule, node: Node) -> str | None:
    """ "static" or "dynamic": how a multiplying node's activation is quantized; `None`: it is not."""
    quantizer = quantizer_at(gm, node.args[0])
    if quantizer is None:
        return None
    return "dynamic" if quantizer.dynamic else "static"


def qparams(gm: GraphModule) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Scales and zero points of every quantized layer.

    Returns `{layer: {"input": (scale, zero_point), "weight": (scale, zero_point)}}`; a side in
    floating point has no entry, nor has a dynamic input, which finds its own when it runs. Scales are
    float32, () per tensor or (channels,) per channel.
    """
    quantizers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for node in weight_layers(gm):
        entry = {}
        for kind, operand in zip(("input", "weight"), node.args[:2], strict=False):
            quantizer = quantizer_at(gm, operand)
            if quantizer is None or quantizer.scale is None or quantizer.zero_point is None:
                continue
            entry[kind] = (quantizer.scale, quantizer.zero_point)
        if entry:
            quantizers[layer_name(node)] = entry
    return quantizers


def compensation_tensors(gm: GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (in, out) and bias (out,) of each block's compensating linear, by block name, float32.

    The weight as the graph computes with it: the product of two factors, or dequantized integers. A
    compensation that was folded into the block has no entry.
    """
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for block, nodes in _compensation_nodes(gm).items():
        weight = reduce(torch.matmul, (_matrix(gm, node) for node in nodes))
        bias = _constant(gm, _compensation_bias(nodes[-1]))
        tensors[block] = (weight.float(), bias.float().flatten())  # of maps: (out, 1, 1)
    return tensors


def compensation_bytes(gm: GraphModule) -> int:
    """Bytes that the compensations add to a converted graph as it is stored."""
    read: set[str] = set()
    for nodes in _compensation_nodes(gm).values():
        operands = [node.args[1] for node in nodes] + [_compensation_bias(nodes[-1])]
        for operand in operands:
            assert isinstance(operand, Node)
            read |= {str(n.target) for n in ancestors(operand) if n.op == "get_attr"}
    tensors = [get_attr(gm, path) for path in read]
    return sum(t.numel() * t.element_size() for t in tensors)


def _compensation_nodes(gm: GraphModule) -> dict[str, list[Node]]:
    """The products of each block's compensation, in order, by block name."""
    products: dict[str, list[Node]] = {}
    for node in compute_nodes(gm):
        if match := _COMPENSATION.fullmatch(layer_name(node)):
            products.setdefault(match.group(1), []).append(node)
    return products


def _compensation_bias(node: Node) -> object:
    """A linear has its own; behind a matmul it is the first constant added."""
    if node.target is LINEAR:
        return node.args[2]
    (user,) = node.users
    added = user.args[1]
    return added if isinstance(added, Node) and is_constant(added) else _compensation_bias(user)


def _matrix(gm: GraphModule, node: Node) -> Tensor:
    value = _constant(gm, node.args[1])
    return value.T if node.target is LINEAR else value


def _constant(gm: GraphModule, node: object) -> Tensor:
    """The value of a node that depends on no input."""
    assert isinstance(node, Node)
    value: Tensor = constant_value(gm, node)
    return value.detach()


def weight_code_bits(gm: GraphModule) -> dict[str, int]:
    """Bits of the integer weights a graph stores, by the path of their codes."""
    widths: dict[str, int] = {}
    for node in gm.graph.nodes:
        if not is_call(node, _PER_CHANNEL | _PER_TENSOR):
            continue
        codes, quant_min, quant_max = node.args[0], node.args[-3], node.args[-2]
        if not isinstance(codes, Node) or codes.op != "get_attr" or quant_min != 0:
            continue
        bits = _bits(quant_max)
        widths[str(codes.target)] = max(bits, widths.get(str(codes.target), 0))
    return widths
