"""Which output row of a linear ends up in which channel of an attention's operands and output.

Attention mixes the values of different tokens, never different channels. So a scale of one channel
of the values can be moved from the attention's output into the row of the linear that made it, and
one of a query's channel into the row that made the key's. The map is read from the graph: channel
numbers are sent through the very ops that move elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import LINEAR, MATMULS, SDPA, SHAPE_ONLY, SOFTMAXES
from qwt_fx.graph.nodes import argument, is_call, is_move, shape_of, tensor_of
from qwt_fx.graph.runner import Env, Value
from qwt_fx.graph.sample_ids import resolve, run_move
from qwt_fx.quant.fake_quant import is_fake_quant
from qwt_fx.quant.norms import weight_node

aten = torch.ops.aten

_BATCH = 2  # stands for every symbol of a size


@dataclass(frozen=True)
class ValueMap:
    """The linear whose rows become the values, and the row of each channel of the output, (d,).

    `constants` are the `where` calls between that put a constant of all rows at some positions.
    """

    producer: Node
    rows: Tensor
    attention: Node
    constants: tuple[Node, ...] = ()


@dataclass(frozen=True)
class OperandMap:
    """The linear whose rows become an operand of a product of activations, each used by nothing else.

    `rows` has the operand's shape, with two samples, and one number for each element; `constants` as
    in `ValueMap`.
    """

    producer: Node
    rows: Tensor
    constants: tuple[Node, ...] = ()


class NotMapped(Exception):
    """The channels cannot be followed; the message says why."""


def value_map(gm: GraphModule, output: Node, *, quantized: bool = False) -> ValueMap:
    """Follow the channels of `output`, what a linear behind an attention reads.

    quantized: the values may have a quantizer of their own. Raises `NotMapped` where `output` is not
    attention's output moved about, where its values are not one linear's rows, each used once and by
    nothing else.
    """
    attention = _attention_behind(gm, output)
    index = 1 if attention.target in MATMULS else 2
    if not quantized and _is_quantized(gm, attention.args[index]):
        raise NotMapped("its values are quantized")
    operand = operand_map(gm, attention, index)
    ids = _through_attention(attention, operand.rows, output)
    rows = ids.reshape(-1, ids.shape[-1])
    if not bool((rows == rows[0]).all()):
        raise NotMapped("its channels change from token to token")
    row_of_channel = rows[0]
    if len(set(row_of_channel.tolist())) != len(row_of_channel):
        raise NotMapped("several of its channels share a value row")
    return ValueMap(operand.producer, row_of_channel, attention, operand.constants)


def operand_map(gm: GraphModule, product: Node, index: int) -> OperandMap:
    """Follow the channels of one operand of an attention, or of one of its products.

    Raises `NotMapped` where the operand is not one linear's rows, read by nothing else.
    """
    producer = _linear_behind(gm, product.args[index])
    rows, others = _follow(gm, producer, product, index)
    if bool(torch.isin(rows, others).any()):
        raise NotMapped("something else reads the values")
    constants = tuple(user for user in producer.users if _is_override(user, producer))
    return OperandMap(producer, rows, constants)


def feeds_attention(gm: GraphModule, linear: Node) -> bool:
    """Whether some of the linear's rows become, moved about, the keys or values of an attention."""
    pending, seen = list(linear.users), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, {SDPA}) and set(node.args[1:3]) & (seen | {linear}):
            return True
        if is_call(node, MATMULS) and len(node.all_input_nodes) == 2:
            return True
        if is_move(node) or is_fake_quant(gm, node):
            pending += node.users
    return False


def _is_override(node: Node, source: Node) -> bool:
    return is_call(node, {aten.where.self}) and node.args[2] is source


def _attention_behind(gm: GraphModule, node: Node) -> Node:
    while is_call(node, SHAPE_ONLY):
        source = node.args[0]
        if not isinstance(source, Node):
            break
        node = source
    if is_call(node, {SDPA}):
        if argument(node, 7, "enable_gqa", False):
            raise NotMapped("attention groups queries")
        return node
    if is_call(node, MATMULS) and _is_probability(gm, node.args[0]):
        return node
    raise NotMapped("it is not the output of an attention")


def _is_probability(gm: GraphModule, node: object) -> bool:
    while isinstance(node, Node) and (is_call(node, SHAPE_ONLY) or is_fake_quant(gm, node)):
        node = node.args[0]
    return is_call(node, SOFTMAXES)


def _is_quantized(gm: GraphModule, node: object) -> bool:
    while isinstance(node, Node) and is_call(node, SHAPE_ONLY):
        node = node.args[0]
    return is_fake_quant(gm, node)


def _linear_behind(gm: GraphModule, node: object) -> Node:
    while isinstance(node, Node):
        if is_call(node, {LINEAR}):
            if weight_node(gm, node) is None:
                raise NotMapped("the weight of its values is computed")
            if argument(node, 2, "bias") is not None and tensor_of(gm, node.args[2]) is None:
                raise NotMapped("the bias of its values is computed")
            return node
        if is_call(node, {aten.where.self}):
            node = node.args[2]
            continue
        if not is_move(node) and not is_fake_quant(gm, node):
            break
        node = node.args[0]
    raise NotMapped("its values do not come from a linear through moves alone")


def _features(gm: GraphModule, linear: Node) -> Tensor:
    """Row numbers (2, ..., o) in the shape of a linear's output."""
    shape, weight = shape_of(linear), tensor_of(gm, weight_node(gm, linear))
    if shape is None or weight is None:
        raise NotMapped("the shape of its values is not known")
    sizes = [resolve(s, _BATCH) for s in shape]
    return torch.arange(len(weight)).expand(*sizes[:-1], len(weight))


def _move(node: Node, env: Env) -> Value:
    """What an op that moves elements makes of channel numbers."""
    try:
        return run_move(node, env, _BATCH)
    except KeyError as error:
        raise NotMapped(f"{error} decides how the values move") from error
    except (RuntimeError, IndexError) as error:
        raise NotMapped(f"{node.name}: {str(error).splitlines()[0]}") from error


def _follow(gm: GraphModule, producer: Node, product: Node, at: int) -> tuple[Tensor, Tensor]:
    """Row numbers where a product reads one of its operands, and those read by anything else."""
    env: Env = {producer: _features(gm, producer)}
    values: Tensor | None = None
    others: list[Tensor] = []
    pending = [producer]
    while pending:
        source = pending.pop(0)
        for user in source.users:
            if user is product:
                for index, operand in enumerate(user.args):
                    if operand is source and index == at:
                        values = env[source]
                    elif operand is source:
                        others.append(env[source].flatten())
            elif _is_override(user, source) or is_fake_quant(gm, user):
                env[user] = env[source]
                pending.append(user)
            elif is_move(user):
                env[user] = _move(user, env)
                pending.append(user)
            else:
                others += [t.flatten() for t in _tensors(env[source])]
    if values is None:
        raise NotMapped("its values do not come from a linear through moves alone")
    return values, torch.cat(others) if others else torch.empty(0, dtype=torch.int64)


def _tensors(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _through_attention(attention: Node, values: Tensor, output: Node) -> Tensor:
    """Row numbers at the linear behind the attention."""
    heads = values.reshape(-1, *values.shape[-2:])
    if not bool((heads == heads[:, :1]).all()):
        raise NotMapped("the values' channels change from token to token")
    shape = shape_of(attention)
    if shape is None:
        raise NotMapped("the shape of the attention's output is not known")
    sizes = [resolve(s, _BATCH) for s in shape]
    env: Env = {attention: values[..., :1, :].expand(sizes)}
    chain = [output]
    while chain[-1] is not attention:
        source = chain[-1].args[0]
        assert isinstance(source, Node)  # _attention_behind walked the same way
        chain.append(source)
    for node in reversed(chain[:-1]):
        env[node] = _move(node, env)
    ids: Tensor = env[output]
    return ids
