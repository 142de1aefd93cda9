"""A text tower's records are those of its whole context; its input alone knows any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_clip import small_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import qwt_fx
from qwt_fx.clip.clip import TextTower
from qwt_fx.graph.runner import placeholders, run_all
from qwt_fx.text.text_length import text_ids

CONTEXT = 12


def _ids(batch: int, length: int = CONTEXT) -> Tensor:
    return torch.randint(1, 1000, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    return qwt_fx.capture(TextTower(small_model()), (_ids(2),))


def _recorded(value: Any) -> list[FakeTensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, FakeTensor)]


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_recorded_are_those_of_the_whole_context(graph: GraphModule, batch: int) -> None:
    ids, seen = _ids(batch), 0
    (source,) = placeholders(graph)
    symbol = source.meta["val"].shape[0].node.expr

    def size(recorded: Any) -> int:
        return int(
            recorded if isinstance(recorded, int) else recorded.node.expr.subs(symbol, batch)
        )

    def check(node: Any, env: dict[Any, Any]) -> None:
        nonlocal seen
        for read in node.all_input_nodes:
            if read is source or read not in env or "val" not in read.meta:
                continue
            recorded, real = read.meta["val"], env[read]
            if isinstance(real, Tensor):
                assert tuple(map(size, recorded.shape)) == tuple(real.shape), read.name
                assert recorded.dtype == real.dtype, read.name
            else:
                assert size(recorded) == real, read.name
            seen += 1

    run_all(graph, ids, check)
    assert seen > 20


def test_no_record_but_the_inputs_holds_the_length(graph: GraphModule) -> None:
    (source,) = placeholders(graph)
    batch, length = (s.node.expr for s in source.meta["val"].shape)
    found: set[Any] = set()
    for node in graph.graph.nodes:
        if node is not source:
            for value in _recorded(node.meta.get("val")):
                for size in (*value.shape, *value.stride()):
                    if isinstance(size, torch.SymInt):
                        found |= size.node.expr.free_symbols
    assert found == {batch}
    assert length not in found


def test_the_graph_runs_at_lengths_up_to_the_context(graph: GraphModule) -> None:
    (source,) = placeholders(graph)
    length = source.meta["val"].shape[1].node.expr
    constraints: Any = graph.range_constraints
    allowed = constraints[length]
    assert (int(allowed.lower), int(allowed.upper)) == (1, CONTEXT)
    for tokens in (3, 7, CONTEXT):
        assert graph(_ids(2, tokens)).shape == graph(_ids(2)).shape


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ((torch.zeros(2, 8),), "not integers"),
        ((torch.zeros(2, 8, dtype=torch.bool),), "not ids"),
        ((torch.zeros(8, dtype=torch.int64),), "no samples"),
        ((torch.zeros(2, 2, dtype=torch.int64),), "no room for a text"),
        ((torch.zeros(2, 8, dtype=torch.int64),) * 2, "two inputs"),
        ((), "none"),
        ((3,), "not a tensor"),
    ],
)
def test_only_one_tensor_of_token_ids_has_a_text_length(inputs: tuple[Any, ...], why: str) -> None:
    assert text_ids(inputs) is None, why


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_token_ids_are_found(dtype: torch.dtype) -> None:
    ids = torch.zeros(2, 8, dtype=dtype)
    assert text_ids((ids,)) is ids
