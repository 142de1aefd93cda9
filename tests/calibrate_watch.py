"""What the walk of `CalibrateLayers` holds at each group, and what a run from the inputs gives there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.layer_settings import LayerSettings
from qwt_fx.passes import CalibrateLayers, InsertObservers, calibrate_layers

Watcher = Callable[..., None]


def settings(**fields: Any) -> LayerSettings:
    """The settings named, and nothing else done to a layer: no remedy is on by default."""
    none: dict[str, Any] = {
        "reparameterization": 0.0, "fold_values": False, "input_scales": False, "refit": False,
        "target": "local", "rounding": "nearest", "bias_correction": False, "token_scales": False,
        "ranges": "tensor",
    }  # fmt: skip
    return LayerSettings(**(none | fields))


def calibrated(
    model: nn.Module,
    batches: list[Tensor],
    chosen: LayerSettings,
    bits: tuple[int, int] = (16, 4),
    **options: Any,
) -> GraphModule:
    """A model's graph with bits of weights and of activations, calibrated and with its observers."""
    reference = qwt_fx.capture(model, (batches[0],))
    gm = copy.deepcopy(reference)
    InsertObservers(QuantConfig(*bits))(gm)
    CalibrateLayers(reference, batches, chosen, **options)(gm)
    return gm


def watch(monkeypatch: pytest.MonkeyPatch, watcher: Watcher) -> None:
    """Call `watcher(walk, group, layers, sums)` once a group's range is set and its layers summed."""
    original = calibrate_layers.layer_sums

    def watched(walk: Any, group: Any, layers: list[Node], *rest: Any) -> Any:
        sums = original(walk, group, layers, *rest)
        watcher(walk, group, layers, sums)
        return sums

    monkeypatch.setattr(calibrate_layers, "layer_sums", watched)


def run_to(gm: GraphModule, node: Node, x: Tensor, known: dict[Node, Any] | None = None) -> Any:
    """Value of a node for one batch of inputs, by recursion from the node."""
    known = {} if known is None else known
    if node not in known:
        if node.op == "placeholder":
            known[node] = x
        elif node.op == "get_attr":
            value: Any = gm
            for name in str(node.target).split("."):
                value = getattr(value, name)
            known[node] = value
        else:
            args, kwargs = (map_arg(a, lambda n: run_to(gm, n, x, known))
                            for a in (node.args, node.kwargs))  # fmt: skip
            function = gm.get_submodule(node.target) if node.op == "call_module" else node.target
            with torch.no_grad():
                known[node] = function(*args, **kwargs)
    return known[node]


def linear(gm: GraphModule, name: str) -> Node:
    """The linear of a name in the source model."""
    (node,) = (
        n
        for n in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        if n.meta["layer"] == name
    )
    return node
