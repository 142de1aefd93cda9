"""SQNR of each transformer block's output: the floating-point graph against a quantized one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.graph import graph_info
from qwt_fx.graph.runner import Env, run_all


def block_outputs(gm: GraphModule, batch: Any) -> dict[str, Tensor]:
    """The value behind each block, by block name, for one batch."""
    names = {block.output: block.name for block in graph_info(gm).blocks}
    found: dict[str, Tensor] = {}

    def visit(node: Node, env: Env) -> None:
        for read in node.all_input_nodes:
            if read.name in names and names[read.name] not in found:
                found[names[read.name]] = env[read]

    run_all(gm, batch, visit)
    return found


def block_sqnr(
    reference: GraphModule, quantized: GraphModule, batches: Sequence[Any]
) -> dict[str, float | None]:
    """SQNR in dB of each block's output over the batches; `None` where both are equal.

    Both graphs read the model's input: errors of earlier blocks are in it, it is what arrives.
    """
    sums: dict[str, tuple[float, float]] = {}
    for batch in batches:
        exact, rounded = block_outputs(reference, batch), block_outputs(quantized, batch)
        for name in exact.keys() & rounded.keys():
            signal = float(exact[name].square().sum(dtype=torch.float64))
            noise = float((exact[name] - rounded[name]).square().sum(dtype=torch.float64))
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + signal, before[1] + noise
    return {
        block.name: _decibels(*sums[block.name])
        for block in graph_info(reference).blocks
        if block.name in sums
    }


def _decibels(signal: float, noise: float) -> float | None:
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and noise > 0.0 else None
