"""Copies of graphs that share tensors until one of them gets a tensor of its own.

Passes never write into a parameter: they register new ones. So a graph and its copy can share the rest,
which spares a large model's weights once for every copy.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule


def copy_sharing_tensors(gm: GraphModule) -> GraphModule:
    """A copy whose parameters and buffers lie where the original's do, in objects of their own.

    Moving or converting one (`.to`, `.half`) leaves the other alone; writing into a tensor in place
    changes both.
    """
    memo: dict[int, Any] = {}
    for tensor in (*gm.parameters(), *gm.buffers()):
        memo[id(tensor)] = _like(tensor, tensor.detach())
    return copy.deepcopy(gm, memo)


def own_tensors(gm: GraphModule) -> None:
    """Give a graph tensors that nothing else shares, in place; those tied to each other stay tied."""
    owned: dict[int, Tensor] = {}
    for module in gm.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in owned:
                    owned[id(tensor)] = _like(tensor, tensor.detach().clone())
                tensors[name] = owned[id(tensor)]  # type: ignore[assignment]


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` as a parameter where `tensor` is one."""
    return (
        nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    )
