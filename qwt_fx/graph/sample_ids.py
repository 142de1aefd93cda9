"""Which sample each row of an activation belongs to, whatever the order of its dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from qwt_fx.graph.aten import SHAPE_ONLY
from qwt_fx.graph.nodes import is_call, shape_of
from qwt_fx.graph.runner import Env, Value

aten = torch.ops.aten


Size: TypeAlias = int | torch.SymInt


def resolve(size: Size, batch: int) -> int:
    """A recorded size with its symbol, the number of samples, set to `batch`."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def run_move(node: Node, env: Env, batch: int) -> Value:
    """Run an op that only moves elements on other elements; symbolic sizes become those of `batch`.

    Raises `KeyError` for an argument that is neither in `env` nor a recorded size.
    """

    def value(n: Node) -> Value:
        if n in env:
            return env[n]
        recorded = n.meta.get("val")
        if isinstance(recorded, int | torch.SymInt):
            return resolve(recorded, batch)
        raise KeyError(n.name)

    target = node.target
    if target in (aten.view.default, aten._unsafe_view.default):
        target = aten.reshape.default
    assert callable(target)  # call_function nodes hold a callable
    args, kwargs = map_arg((node.args, node.kwargs), value)
    return target(*args, **kwargs)


def sample_ids(node: Node, shape: Sequence[int], batch: int, channels: int = -1) -> Tensor | None:
    """Sample number of each row, (rows,) int64, of an activation of this shape; `None` if unknown.

    Rows are all dimensions but that of the channels, flattened. Where batch and positions were
    flattened into one dimension, the nearest value that has them apart is followed through the moves
    between.
    """
    chain = [node]
    while (axis := batch_axis(chain[-1])) is None:
        source = chain[-1].args[0] if is_call(chain[-1], SHAPE_ONLY) else None
        if not isinstance(source, Node):
            return None
        chain.append(source)
    sizes = [resolve(s, batch) for s in chain[-1].meta["val"].shape]
    view = [1] * len(sizes)
    view[axis] = batch
    env: Env = {chain[-1]: torch.arange(batch).reshape(view).expand(sizes)}
    for move in reversed(chain[:-1]):
        env[move] = run_move(move, env, batch)
    ids: Tensor = env[node]
    return ids.select(channels, 0).flatten() if tuple(ids.shape) == tuple(shape) else None


def batch_axis(node: Node) -> int | None:
    """The dimension whose size is the number of samples and nothing else."""
    for axis, size in enumerate(shape_of(node) or ()):
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
            return axis
    return None
