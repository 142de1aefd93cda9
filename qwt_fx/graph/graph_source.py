"""The source texts that torch.fx keeps of graphs: kept as long as their graph, not for ever.

torch.fx generates Python for a graph at each `recompile` and keeps every text, so that tracebacks can
quote it. A service that loads one artifact after another would grow by each of them.
"""

from __future__ import annotations

import copy
import linecache
import weakref

from torch import nn
from torch.fx import GraphModule, graph_module


def recompile(gm: GraphModule) -> None:
    """Recompile a graph; its old source goes now, the new one with the graph."""
    _forget(_source_name(gm))
    gm.recompile()
    forget_source_with(gm)


def forget_source_with(gm: GraphModule) -> None:
    """Let the kept source of a graph, as compiled now, go when the graph goes."""
    weakref.finalize(gm, _forget, _source_name(gm)).atexit = False


def _source_name(gm: GraphModule) -> str:
    return str(gm.forward.__code__.co_filename)


def _forget(name: str) -> None:
    graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


def copy_sharing_tensors(gm: GraphModule) -> GraphModule:
    """A copy whose parameters and buffers lie where the original's do, in objects of their own.

    Moving or converting one (`.to`, `.half`) leaves the other alone; writing into a tensor in place
    changes both. `copy.deepcopy` of the copy shares nothing any more.
    """
    memo: dict[int, object] = {}
    for tensor in (*gm.parameters(), *gm.buffers()):
        alias = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(alias, tensor.requires_grad) if is_parameter else alias
    return copy.deepcopy(gm, memo)
