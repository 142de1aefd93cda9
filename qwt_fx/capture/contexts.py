"""Contexts that a model computes a part of itself in: gradients on or off, autocast.

`torch.export` keeps such a part as a graph of its own behind a higher-order operator. A graph for
inference needs no gradients, and autocast that is switched off, or is for a device that the graph is
not on, changes nothing: those parts are put in line. Autocast that is on chooses a dtype operator by
operator when it runs, which no graph of plain operators says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.errors import CaptureError
from qwt_fx.graph.nodes import get_attr, is_call

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_BEFORE = {_AUTOCAST: 4, _GRADIENTS: 1}  # the context's own arguments stand before the part


def inline_contexts(gm: GraphModule) -> None:
    """Put the parts that a model computes in such contexts in line, in place.

    Raises what `refuse_autocast` does.
    """
    refuse_autocast(gm)
    for node in list(gm.graph.nodes):
        if is_call(node, _BEFORE):
            part = node.args[_BEFORE[node.target]]
            _inline(gm, node, part, node.args[_BEFORE[node.target] + 1 :])
            if not part.users:
                gm.graph.erase_node(part)


def refuse_autocast(gm: GraphModule) -> None:
    """Raise `CaptureError` for a part under autocast that is on, for a device of the graph's inputs."""
    devices = {
        value.device.type
        for node in gm.graph.nodes
        if node.op in ("placeholder", "get_attr")
        and isinstance(value := node.meta.get("val"), Tensor)
    }
    parts = [m for m in gm.modules() if isinstance(m, GraphModule)]
    for node in (n for part in parts for n in part.graph.nodes if is_call(n, {_AUTOCAST})):
        device, dtype, enabled = node.args[:3]
        if enabled and device in devices:
            raise CaptureError(
                f"{node.name}: the model computes a part under torch.autocast({device!r}, {dtype}), "
                "whose dtypes no captured graph can hold: take that block out of the model (or give it "
                f"enabled=False), or convert the model, model.to({dtype})"
            )


def _inline(gm: GraphModule, node: Node, part: Node, inputs: tuple[Node, ...]) -> None:
    body = get_attr(gm, str(part.target))
    inline_contexts(body)
    values = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                results = inner.args[0]
            elif inner.op == "get_attr":  # a constant of the part's own
                name = f"{part.target}.{inner.target}"
                values[inner] = gm.graph.get_attr(name)
                values[inner].meta = inner.meta
            elif inner.op != "placeholder":
                values[inner] = gm.graph.node_copy(inner, values.__getitem__)
    for reader in list(node.users):  # each takes one of the results
        reader.replace_all_uses_with(values[results[reader.args[1]]])
        gm.graph.erase_node(reader)
    gm.graph.erase_node(node)
