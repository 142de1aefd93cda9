"""Copies of graphs that share tensors until one of them gets a tensor of its own.

Passes never write into a parameter: they register new ones. So a graph and its copy can share the rest,
which spares a large model's weights once for every copy.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.fx import GraphModule


def copy_sharing_tensors(gm: GraphModule) -> GraphModule:
    """A copy whose parameters and buffers lie where the original's do, in objects of their own.

    Moving or converting one (`.to`, `.half`) leaves the other alone; writing into a tensor in place
    changes both. `copy.deepcopy` of the copy shares nothing any more.
    """
    memo: dict[int, Any] = {}
    for tensor in (*gm.parameters(), *gm.buffers()):
        alias = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(alias, tensor.requires_grad) if is_parameter else alias
    return copy.deepcopy(gm, memo)
