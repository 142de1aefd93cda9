"""The products of an attention whose operands are quantized: Q K^T and softmax(Q K^T) V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import LINEAR, MATMULS, SHAPE_ONLY, SOFTMAXES
from qwt_fx.graph.nodes import argument, is_call, shape_of
from qwt_fx.quant.channel_map import (
    NotMapped,
    OperandMap,
    operand_map,
    value_map,
)
from qwt_fx.quant.fake_quant import is_fake_quant

aten = torch.ops.aten

# What scores may pass on their way to the softmax without a shift of a whole row mattering.
_KEEPS_ROWS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_MASKS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})


@dataclass(frozen=True)
class Operand:
    """One operand of a product, (..., tokens, channels) or, `transposed`, (..., channels, tokens)."""

    product: Node
    index: int
    quantizer: Node
    transposed: bool

    @property
    def source(self) -> Node:
        """What is quantized."""
        source = self.quantizer.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def tokens(self) -> Node:
        """The same elements with one token a row of the last dimension."""
        source = self.source
        if not self.transposed or not is_call(source, {aten.transpose.int}):
            return source
        before = source.args[0]
        assert isinstance(before, Node)
        return before

    def rows(self, x: Tensor) -> Tensor:
        """Its value as (tokens of all samples, channels of all heads)."""
        moved = x.movedim(-1 if self.transposed else -2, 1)
        return moved.reshape(moved.shape[0] * moved.shape[1], -1)

    def spread(self, channels: Tensor, shape: Sequence[int]) -> Tensor:
        """One number for each channel, as it multiplies a value of this shape."""
        heads = shape[1:-2]
        size = shape[-2] if self.transposed else shape[-1]
        return channels.reshape(*heads, *((size, 1) if self.transposed else (1, size)))

    def flags(self, flags: Tensor, shape: Sequence[int]) -> Tensor:
        """One flag for each row of `tokens`, flattened, as one for each of `rows`."""
        length = shape[-1 if self.transposed else -2]
        return flags.reshape(shape[0], -1, length)[:, 0].flatten()


@dataclass(frozen=True)
class AttentionProduct:
    """A product of two quantized activations.

    Attributes:
        node: the matmul.
        first, second: queries and keys, or probabilities and values.
        of_probabilities: whether it is the second of an attention's products.
    """

    node: Node
    first: Operand
    second: Operand
    of_probabilities: bool


def find_products(gm: GraphModule) -> dict[Node, AttentionProduct]:
    """The products of the graph's attentions by each of their quantizers.

    A product whose quantizer something else reads too is left out.
    """
    found = {}
    for node in gm.graph.nodes:
        if not is_call(node, MATMULS) or len(node.args) < 2:
            continue
        quantizers = [_own_quantizer(gm, node, index) for index in (0, 1)]
        if None in quantizers:
            continue
        first, second = quantizers
        assert first is not None and second is not None
        of_probabilities = is_call(first.args[0], SOFTMAXES)
        if not of_probabilities and not _reaches_softmax(node):
            continue
        product = AttentionProduct(
            node,
            Operand(node, 0, first, transposed=False),
            Operand(node, 1, second, transposed=not of_probabilities),
            of_probabilities,
        )
        found[first] = found[second] = product
    return found


def place_next_to_products(gm: GraphModule) -> None:
    """Put each operand's quantizer just before its product, so that both operands are known there."""
    for product in dict.fromkeys(find_products(gm).values()):
        for operand in (product.first, product.second):
            node = operand.quantizer
            while node is not product.node:
                product.node.prepend(node)
                (node,) = node.users


def _own_quantizer(gm: GraphModule, product: Node, index: int) -> Node | None:
    """The quantizer of an operand that nothing but the product reads."""
    node = product.args[index]
    reader = product
    while isinstance(node, Node) and set(node.users) == {reader}:
        if is_fake_quant(gm, node):
            return node
        if index or not is_call(node, SHAPE_ONLY):
            return None  # values and keys are quantized last
        reader, node = node, node.args[0]
    return None


def _reaches_softmax(node: Node) -> bool:
    """Whether a product's rows become a softmax's, and nothing else reads them."""
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, SOFTMAXES):
            return argument(user, 1, "dim") in (-1, len(shape_of(user) or ()) - 1)
        scaled = is_call(user, _KEEPS_ROWS) and user.args[0] is node
        masked = is_call(user, _MASKS) or is_call(user, {aten.add.Tensor})
        if not (scaled and _one_a_row(user)) and not masked and not is_call(user, SHAPE_ONLY):
            return False
        node = user
    return False


def _one_a_row(node: Node) -> bool:
    """Whether all scores of a query are multiplied by the same number."""
    factor = node.args[1]
    if not isinstance(factor, Node):
        return True
    shape = shape_of(factor)
    return shape is not None and (not shape or bool(shape[-1] == 1))


def channels_of(gm: GraphModule, operand: Operand) -> OperandMap | None:
    """The linear that makes an operand, and the row of each of its channels; `None`: cannot be moved.

    Channels are those of `Operand.rows`.
    """
    try:
        mapped = operand_map(gm, operand.product, operand.index)
    except NotMapped:
        return None
    rows = operand.rows(mapped.rows)
    once = len(set(rows[0].tolist())) == rows.shape[1]
    if not once or not bool((rows == rows[0]).all()):
        return None
    return OperandMap(mapped.producer, rows[0], mapped.constants)


@dataclass(frozen=True)
class OutputReaders:
    """The linears that read softmax(QK^T) V, and which of their columns reads each channel of V."""

    linears: tuple[Node, ...]
    columns: Tensor


def readers_of(
    gm: GraphModule, product: AttentionProduct, values: OperandMap
) -> OutputReaders | None:
    """Who reads a product with values, channel by channel; `None`: others than linears do."""
    node = product.node
    while len(node.users) == 1 and is_call(next(iter(node.users)), SHAPE_ONLY):
        (node,) = node.users
    readers = list(node.users)
    if len(readers) == 1 and is_fake_quant(gm, readers[0]):
        readers = list(readers[0].users)
    if not readers or not all(is_call(r, {LINEAR}) for r in readers):
        return None
    try:
        mapped = value_map(gm, node, quantized=True)
    except NotMapped:
        return None
    column_of = {row: column for column, row in enumerate(mapped.rows.tolist())}
    if set(values.rows.tolist()) != set(column_of):
        return None
    columns = torch.tensor([column_of[row] for row in values.rows.tolist()])
    return OutputReaders(tuple(readers), columns)
