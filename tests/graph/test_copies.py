"""Copies of graphs share tensors until one of them changes its own."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from toys import Tower, randomize, tokens

from qwt_fx import QuantConfig, api
from qwt_fx.graph.graph_source import copy_sharing_tensors


class Tied(nn.Module):
    """Two layers of one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.shift


def addresses(gm: GraphModule) -> list[int]:
    return [t.data_ptr() for t in (*gm.parameters(), *gm.buffers())]


def test_a_copy_lies_where_its_original_does_and_moves_alone() -> None:
    gm = symbolic_trace(Tied())
    x = torch.randn(2, 3)
    before = gm(x)
    copied = copy_sharing_tensors(gm)
    assert addresses(copied) == addresses(gm)
    assert copied.first.weight is copied.second.weight is not gm.first.weight
    assert torch.equal(copied(x), before)
    copied.double()
    assert gm.first.weight.dtype is gm.shift.dtype is torch.float32
    assert torch.equal(gm(x), before)
    copied.requires_grad_(False)
    assert gm.first.weight.requires_grad


def test_owned_tensors_are_nobody_elses_and_ties_stay() -> None:
    gm = symbolic_trace(Tied())
    copied = copy.deepcopy(copy_sharing_tensors(gm))
    assert not set(addresses(copied)) & set(addresses(gm))
    assert copied.first.weight is copied.second.weight
    assert isinstance(copied.first.weight, nn.Parameter)
    assert [n for n, _ in copied.named_buffers()] == ["shift"]


def test_a_converted_graph_shares_nothing_with_what_it_was_made_from() -> None:
    x = tokens(8)
    graph = api.capture(randomize(Tower(1)), (x,))
    exact = graph(x)
    prepared = api.prepare(graph, QuantConfig())
    assert set(addresses(prepared)) <= set(addresses(graph))
    api.calibrate(prepared, [x])
    converted = api.convert(prepared)
    reparameterized = api.reparameterize(graph, [x])
    assert not set(addresses(reparameterized)) & set(addresses(graph))
    assert torch.equal(graph(x), exact)
    expected = converted(x)
    for gm in (graph, prepared):
        for tensor in (*gm.parameters(), *gm.buffers()):
            tensor.data.zero_()
    assert torch.equal(converted(x), expected)
