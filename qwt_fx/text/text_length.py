"""The two lengths of a text tower's graph: any at run time, the whole context in its records.

Passes read the shapes recorded at capture (`node.meta["val"]`) to tell samples from positions and
calibrate on whole contexts. So a graph of dynamic length records the shapes of full length, with
the batch as its only symbol, exactly as a graph of fixed length does; only its input has both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from qwt_fx.graph.runner import placeholders

_SHORTEST = 3  # a context below this holds no text


def text_ids(inputs: Iterable[Any]) -> Tensor | None:
    """The input, when it is one tensor of token ids (n, context) int; else `None`."""
    values = list(inputs)
    if len(values) != 1 or not isinstance(values[0], Tensor):
        return None
    (ids,) = values
    integer = ids.dtype in (torch.int64, torch.int32)
    return ids if integer and ids.dim() == 2 and ids.shape[1] >= _SHORTEST else None


def record_full_length(gm: GraphModule, ids: Tensor) -> None:
    """Record the shapes that ids of full length (n, context) give, with a symbol for n.

    The ids themselves keep both symbols: torch checks inputs against them, and is told here that
    the whole context is as good as less.
    """
    (source,) = placeholders(gm)
    length = source.meta["val"].shape[1].node.expr

    def full_size(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        # Put in, not run again: torch 2.11 fixes the batch while a graph runs on symbols.
        found = size.node.expr.subs(length, ids.shape[1])
        if found.is_Integer:
            return int(found)
        symbols: Any = size.node.shape_env
        return symbols.create_symintnode(found, hint=None)

    def full(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return full_size(value)
        with value.fake_mode:
            return torch.empty_strided(
                [full_size(s) for s in value.shape],
                [full_size(s) for s in value.stride()],
                dtype=value.dtype,
                device=value.device,
            )

    for node in gm.graph.nodes:
        if node is not source and "val" in node.meta:
            node.meta["val"] = pytree.tree_map(full, node.meta["val"])
    constraints: Any = gm.range_constraints
    constraints[length] = ValueRanges(1, ids.shape[1])
