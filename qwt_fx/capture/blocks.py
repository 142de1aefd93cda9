"""Finds transformer blocks in a captured graph, whatever the model calls them.

A block is the innermost module whose name ends in an index (`resblocks.3`, `blocks.3`,
`layers.0.blocks.1`, `encoder.layer.3`, `encoder_layer_0`) and that contains an attention, a norm
and at least two linears. `torch.export` records the modules of every node in `nn_module_stack`.
"""

from __future__ import annotations

import re

from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import LAYER_NORM, LINEAR, RMS_NORM, SDPA, SOFTMAXES
from qwt_fx.graph.graph_info import Block
from qwt_fx.graph.nodes import is_constant

_INDEXED = re.compile(r"(?:^|[._])\d+$")
_ROOT = re.compile(r"^L\[['\"]self['\"]\]\.?")


def module_path(node: Node) -> str:
    """Qualified name of the innermost module that made the node; "" for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return _ROOT.sub("", path)


def _indexed_ancestors(path: str) -> list[str]:
    """Prefixes of the path whose last component ends in an index, innermost first."""
    parts = path.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [p for p in reversed(prefixes) if _INDEXED.search(p)]


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def _is_attention(node: Node) -> bool:
    return node.op == "call_function" and (node.target is SDPA or node.target in SOFTMAXES)


def _holds_a_block(nodes: list[Node]) -> bool:
    linears = sum(n.target is LINEAR for n in nodes)
    norms = sum(n.target in (LAYER_NORM, RMS_NORM) for n in nodes)
    return linears >= 2 and norms >= 1


def _boundary(nodes: list[Node]) -> tuple[Node, Node] | None:
    """The value a block reads and the value it returns; `None` where either is not single.

    Values that depend on no input (masks, tables) and sizes are not inputs of a block.
    """
    members = set(nodes)
    inputs = [
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in members
        and isinstance(source.meta.get("val"), Tensor)
        and not is_constant(source)
    ]
    outputs = [n for n in nodes if any(user not in members for user in n.users)]
    outputs = [n for n in outputs if isinstance(n.meta.get("val"), Tensor)]
    if not inputs or len(outputs) != 1:
        return None
    # A block may read more than its main input (a shared bias): the main one has its output's shape.
    shape = outputs[0].meta["val"].shape
    main = [n for n in dict.fromkeys(inputs) if n.meta["val"].shape == shape]
    return (main[0], outputs[0]) if len(main) == 1 else None


def find_blocks(gm: GraphModule) -> list[Block]:
    """The graph's transformer blocks in execution order; an empty list when there are none."""
    paths = {node: module_path(node) for node in gm.graph.nodes if node.op == "call_function"}
    blocks: dict[str, Block | None] = {}
    for attention in (n for n in paths if _is_attention(n)):
        for module in _indexed_ancestors(paths[attention]):
            if module in blocks:
                break
            nodes = [n for n, path in paths.items() if _inside(path, module)]
            if not _holds_a_block(nodes):
                continue
            boundary = _boundary(nodes)
            blocks[module] = boundary and Block(module, boundary[0].name, boundary[1].name)
            break
    return [block for block in blocks.values() if block is not None]
