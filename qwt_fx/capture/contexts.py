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

    Raises `CaptureError` for autocast that is switched on.
    """
    for node in list(gm.graph.nodes):
        if is_call(node, _BEFORE):
            _require_no_effect(gm, node)
            part = node.args[_BEFORE[node.target]]
            _inline(gm, node, part, node.args[_BEFORE[node.target] + 1 :])
            if not part.users:
                gm.graph.erase_node(part)


def _require_no_effect(gm: GraphModule, node: Node) -> None:
    if node.target is _GRADIENTS:
        return
    device, dtype, enabled = node.args[:3]
    values = (n.meta.get("val") for n in gm.graph.nodes if n.op in ("placeholder", "get_attr"))
    if enabled and any(isinstance(v, Tensor) and v.device.type == device for v in values):
        raise CaptureError(
            f"{node.name}: the model computes a part under torch.autocast({device!r}, {dtype}), whose "
            "dtypes no captured graph can hold: take that block out of the model (or give it "
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
