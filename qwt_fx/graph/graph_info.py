"""The records that travel with a captured graph.

`node.meta["layer"]` is the name of a linear, convolution or matmul in the source model;
`gm.meta["qwt_fx"]` is a `GraphInfo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch.fx import GraphModule

from qwt_fx.errors import PreconditionError

_INFO_KEY = "qwt_fx"

Record: TypeAlias = dict[str, Any]
"""A record as a report holds it: JSON values by name."""


@dataclass(frozen=True)
class Block:
    """A transformer block: its name in the source model and the node names of its boundary values."""

    name: str
    input: str
    output: str


@dataclass
class GraphInfo:
    """Records that belong to a graph, copied and saved with it.

    Attributes:
        blocks: transformer blocks in execution order.
        passes: what each pass that ran did: `{"pass", "changes", "skips"}`, in order.
        compensations: block name -> `{"r2", "r2_held_out", "applied", "parameters", ...}`.
        layers: layer name -> measurements of that layer (`sqnr_db`, ...).
        constant_token: the id whose keys and values are constants at position 0; `None` if none.
        end_of_text: the node, made of the ids alone, that tells the one position of each text the
            output reads, where nothing behind it matters and shorter ids are accepted; `None` for a
            graph of fixed length.
        context_length: the most ids a graph of any length takes; `None` for one of fixed length.
        fixed_length: why a graph of token ids has a fixed length; `None` for others.
        unstorable: why the graph cannot be saved, lowered or exported; `None` when it can.
    """

    blocks: list[Block] = field(default_factory=list)
    passes: list[Record] = field(default_factory=list)
    compensations: dict[str, Record] = field(default_factory=dict)
    layers: dict[str, Record] = field(default_factory=dict)
    unstorable: str | None = None
    constant_token: int | None = None
    end_of_text: str | None = None
    context_length: int | None = None
    fixed_length: str | None = None
    config: Record = field(default_factory=dict)


def graph_info(gm: GraphModule) -> GraphInfo:
    """The records of a captured graph. Raises `PreconditionError` for a graph without them."""
    info = gm.meta.get(_INFO_KEY)
    if not isinstance(info, GraphInfo):
        raise PreconditionError(
            "this GraphModule was not made by qwt_fx.capture: it has no block records; "
            "call qwt_fx.capture(model, example_inputs) first"
        )
    return info


def set_graph_info(gm: GraphModule, info: GraphInfo) -> None:
    """Attach records to a graph."""
    gm.meta[_INFO_KEY] = info


def has_graph_info(gm: GraphModule) -> bool:
    """Whether the graph carries qwt_fx records."""
    return isinstance(gm.meta.get(_INFO_KEY), GraphInfo)
