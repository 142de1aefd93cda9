"""Which dimension of a value holds its channels: 1 behind convolutions, the last behind linears."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import CONVOLUTIONS, LAYER_NORM, LINEAR, RMS_NORM
from qwt_fx.graph.nodes import is_call, is_move, shape_of
from qwt_fx.graph.sample_ids import resolve, run_move

aten = torch.ops.aten
_LAST = frozenset({LINEAR, LAYER_NORM, RMS_NORM, aten.embedding.default})
_BATCH = 2  # stands for every symbol of a size


def channel_axes(gm: GraphModule) -> dict[Node, int]:
    """The dimension of the channels of every value where it is known, counted from the first.

    Operators on elements keep it; what a move makes of it is tried out on channel numbers.
    """
    axes: dict[Node, int] = {}
    for node in gm.graph.nodes:
        shape = shape_of(node)
        if node.op not in ("call_function", "call_module") or shape is None:
            continue
        if is_call(node, _LAST):
            axes[node] = len(shape) - 1
        elif is_call(node, CONVOLUTIONS):
            axes[node] = 1
        elif is_move(node) and node.args[0] in axes:
            axis = _moved(node, axes[node.args[0]])
            if axis is not None:
                axes[node] = axis
        elif not is_move(node):
            alike = [n for n in node.all_input_nodes if len(shape_of(n) or ()) == len(shape)]
            known = [axes[n] for n in alike if n in axes]
            if known:
                axes[node] = known[0]
    return axes


def _moved(node: Node, axis: int) -> int | None:
    source = node.args[0]
    assert isinstance(source, Node)  # the caller looked it up
    sizes = [resolve(s, _BATCH) for s in shape_of(source) or ()]
    ids = torch.arange(sizes[axis]).reshape(-1, *[1] * (len(sizes) - 1 - axis)).expand(sizes)
    try:
        found = run_move(node, {source: ids}, _BATCH)
    except (KeyError, RuntimeError, IndexError):
        return None
    if not isinstance(found, Tensor):
        return None
    for at in range(found.dim()):
        wanted = torch.arange(sizes[axis]).reshape(-1, *[1] * (found.dim() - 1 - at))
        if found.shape[at] == sizes[axis] and bool((found == wanted).all()):
            return at
    return None
