"""The records that travel with a captured graph.

`node.meta["layer"]` is the name of a linear, convolution or matmul in the source model;
`gm.meta["qwt_fx"]` is a `GraphInfo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch.fx import GraphModule

from qwt_fx.errors import PreconditionError
from qwt_fx.graph.input_check import UNKNOWN, Input, InputCheck

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
        inputs: what the graph may be called with, which every call checks; empty where not known.
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
    inputs: list[Input] = field(default_factory=list)


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
    """Attach records to a graph; its inputs are checked from now on, those of its copies too."""
    gm.meta[_INFO_KEY] = info
    _check_calls(gm)


def _check_calls(gm: GraphModule) -> None:
    hooks = gm._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if isinstance(hook, InputCheck)]:
        del hooks[key]
    if inputs := graph_info(gm).inputs:
        gm.register_forward_pre_hook(InputCheck(gm, inputs), with_kwargs=True)
    if _check_calls not in gm._deepcopy_hooks:  # torch.fx copies no other hooks
        gm._register_deepcopy_hook(_check_calls)


def has_graph_info(gm: GraphModule) -> bool:
    """Whether the graph carries qwt_fx records."""
    return isinstance(gm.meta.get(_INFO_KEY), GraphInfo)


def recorded_inputs(gm: GraphModule) -> list[Input]:
    """What the graph may be called with; of a graph without records, as many values as it reads."""
    if has_graph_info(gm) and (inputs := graph_info(gm).inputs):
        return inputs
    return [Input(node.name, UNKNOWN) for node in gm.graph.find_nodes(op="placeholder")]
