"""The kept sources of graphs: there while the graph is, gone with it."""

from __future__ import annotations

import gc
import inspect
import linecache

import torch
from torch import nn
from torch.fx import GraphModule, graph_module, symbolic_trace

from qwt_fx.graph.graph_source import forget_source_with, recompile


def graph() -> GraphModule:
    return symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def kept() -> set[str]:
    gc.collect()
    return set(graph_module._loader.eval_cache)


def test_a_source_lives_as_long_as_its_graph() -> None:
    before = kept()
    gm = graph()
    forget_source_with(gm)
    name = gm.forward.__code__.co_filename
    assert kept() - before == {name}
    assert "def forward" in inspect.getsource(gm.forward)
    del gm
    assert kept() == before
    assert name not in linecache.cache


def test_recompiling_drops_the_old_source_and_keeps_the_new_one() -> None:
    before = kept()
    gm = graph()
    old = gm.forward.__code__.co_filename
    recompile(gm)
    new = gm.forward.__code__.co_filename
    assert new != old
    assert kept() - before == {new}
    assert gm(torch.ones(1, 2)).shape == (1, 2)
    assert "def forward" in inspect.getsource(gm.forward)
    del gm
    assert kept() == before
