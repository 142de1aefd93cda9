"""A node stands for the floating-point node that it, or what it was put behind, is named after."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import GraphModule, Node
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.graph.graph_info import Block, graph_info
from qwt_fx.graph.nodes import find_node

X = tokens(2, 3, seed=0)


def _graphs() -> tuple[GraphModule, GraphModule]:
    floating = qwt_fx.capture(randomize(Tower(2)), (X,))
    return floating, copy.deepcopy(floating)


def _doubled(gm: GraphModule, node: Node) -> Node:
    with gm.graph.inserting_after(node):
        return gm.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2.0))


def test_nodes_correspond_by_name() -> None:
    floating, gm = _graphs()
    twin = Correspondence(floating).twin
    pairs = zip(gm.graph.nodes, floating.graph.nodes, strict=True)
    assert all(twin(ours) is theirs for ours, theirs in pairs)


def test_a_node_nobody_told_of_has_no_twin() -> None:
    floating, gm = _graphs()
    new = _doubled(gm, find_node(gm, graph_info(gm).blocks[0].output))
    with pytest.raises(PreconditionError, match=f"no node '{new.name}'"):
        Correspondence(floating).twin(new)


def test_inserted_nodes_stand_for_what_they_were_put_behind_and_blocks_stay() -> None:
    floating, gm = _graphs()
    blocks = list(graph_info(gm).blocks)
    source = find_node(gm, blocks[0].output)
    first = _doubled(gm, source)
    Correspondence.inserted(first, behind=source)
    second = _doubled(gm, first)
    Correspondence.inserted(second, behind=first)
    twin = Correspondence(floating).twin
    assert twin(first) is twin(second) is find_node(floating, source.name)
    assert graph_info(gm).blocks == blocks


def test_a_node_in_anothers_place_bounds_its_blocks() -> None:
    floating, gm = _graphs()
    first, second = graph_info(gm).blocks
    assert first.output == second.input
    old = find_node(gm, first.output)
    new = _doubled(gm, old)
    Correspondence.replaced(gm, old, new)
    assert graph_info(gm).blocks == [
        Block(first.name, first.input, new.name),
        Block(second.name, new.name, second.output),
    ]
    assert Correspondence(floating).twin(new) is find_node(floating, old.name)


def test_copies_of_a_graph_remember() -> None:
    floating, gm = _graphs()
    old = find_node(gm, graph_info(gm).blocks[0].output)
    new = _doubled(gm, old)
    Correspondence.replaced(gm, old, new)
    copied = find_node(copy.deepcopy(gm), new.name)
    assert Correspondence(floating).twin(copied).name == old.name
