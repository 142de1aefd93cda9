"""Finds the blocks of a captured graph, whatever the model calls them.

A block is what the residual sums (`capture.residuals`) of one module make of a value of the same
shape: an attention and an MLP, or convolutions. The module is the innermost one whose name ends in an
index (`resblocks.3`, `layers.0.blocks.1`, `encoder_layer_0`) and that holds all layers of a branch;
`torch.export` records the modules of every node in `nn_module_stack`. Where such a module changes the
shape as well, or nothing has an index, the sums that follow on each other are the block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.capture.residuals import Flow, Residual, find_residuals, sizes_of
from qwt_fx.graph.graph_info import Block
from qwt_fx.graph.nodes import is_constant, weight_layers

_INDEXED = re.compile(r"(?:^|[._])\d+$")
_ROOT = re.compile(r"^L\[['\"]self['\"]\]\.?")


@dataclass(frozen=True)
class _Span:
    """A block by its boundary values."""

    name: str
    source: Node
    result: Node


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
    sizes = sizes_of(outputs[0])
    main = [n for n in dict.fromkeys(inputs) if sizes_of(n) == sizes]
    return (main[0], outputs[0]) if len(main) == 1 else None


def _module(residual: Residual, paths: dict[Node, str]) -> str:
    """The module a residual sum belongs to: that of its branch's layers, or its own if there is one."""
    several = len(residual.layers) > 1
    parts = [paths[n].split(".") for n in (residual.layers if several else (residual.result,))]
    alike = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    common = ".".join(names[0] for names in alike)
    return next(iter(_indexed_ancestors(common)), common)


def _chains(residuals: list[Residual], flow: Flow, layers: list[Node]) -> list[list[Residual]]:
    """The sums that follow on each other, with no layer between and of one shape."""
    chains: list[list[Residual]] = []
    for residual in residuals:
        last = chains[-1][-1].result if chains else None
        if (
            last is not None
            and sizes_of(chains[-1][0].source) == sizes_of(residual.result)
            and flow.reads(residual.source, last)
            and not any(flow.is_between(n, last, residual.source) for n in layers)
        ):
            chains[-1].append(residual)
        else:
            chains.append([residual])
    return chains


def _blocks_of(
    gm: GraphModule, module: str, residuals: list[Residual], flow: Flow, paths: dict[Node, str]
) -> Iterator[_Span]:
    """The module as a block, if it is one; else its residual sums; one of a single layer is none."""
    sums = [
        r
        for r in residuals
        if not any(o is not r and flow.is_between(r.result, o.source, o.result) for o in residuals)
    ]
    if module and sum(len(r.layers) for r in sums) > 1:
        boundary = _boundary([n for n, path in paths.items() if _inside(path, module)])
        if boundary and all(flow.is_between(r.result, *boundary) for r in sums):
            yield _Span(module, *boundary)
            return
    chains = _chains(sums, flow, list(weight_layers(gm))) if module else [[r] for r in sums]
    chains = [chain for chain in chains if sum(len(r.layers) for r in chain) > 1]
    for number, chain in enumerate(chains):
        source, result = chain[0].source, chain[-1].result
        name = (f"{module}@{number}" if number else module) or result.name
        yield _Span(name, source, result)


def find_blocks(gm: GraphModule) -> list[Block]:
    """The graph's blocks in execution order; an empty list when there are none.

    Each holds two linears or convolutions at least, and no other block.
    """
    flow = Flow(gm)
    paths = {node: module_path(node) for node in gm.graph.nodes if node.op == "call_function"}
    modules: dict[str, list[Residual]] = {}
    for residual in find_residuals(gm, flow):
        modules.setdefault(_module(residual, paths), []).append(residual)
    # Where there is a chain of numbered blocks, another sum is none: an MLP behind a pooling, say,
    # has one row for each sample, too few to fit anything on.
    numbered = {m: found for m, found in modules.items() if _INDEXED.search(m)}
    spans: list[_Span] = []
    for some in (numbered, modules):
        if not spans:
            spans = [s for m, found in some.items() for s in _blocks_of(gm, m, found, flow, paths)]
    spans = [s for s in spans if not any(_contains(s, other, flow) for other in spans)]
    spans.sort(key=lambda span: flow.position(span.result))
    return [Block(span.name, span.source.name, span.result.name) for span in spans]


def _contains(outer: _Span, inner: _Span, flow: Flow) -> bool:
    return (
        inner.result is not outer.result
        and flow.is_between(inner.result, outer.source, outer.result)
        and flow.reads(inner.source, outer.source)
    )
