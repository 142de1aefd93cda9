"""What the table says about one model."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node
from qwt_fx.inspect.report import layer_rows
from qwt_fx.measure.measure import sqnr_db
from zoo.models import Entry
from zoo.randomize import randomize

EVALUATION_SEED = 10_000


@dataclass(frozen=True)
class Figures:
    """One row of the table.

    Attributes:
        blocks: transformer blocks found.
        blocks_share: share of the output's energy that blocks replaced by identities do not
            give, 1 - cos^2 of the two outputs, in [0, 1].
        reparameterized: norms that were reparameterized.
        skipped: reason -> number of norms skipped for it.
        quantized, floating: layers and products of activations that are quantized, or not.
        compensated: blocks that QwT compensated at 4/4.
        w8a8, w4a4, w4a4_qwt: SQNR of the output in dB, on samples that calibrated nothing.
        seconds: of everything.
    """

    model: str
    parameters: int
    blocks: int
    blocks_share: float
    reparameterized: int
    skipped: dict[str, int]
    quantized: int
    floating: int
    compensated: int
    w8a8: float
    w4a4: float
    w4a4_qwt: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def blocks_share(gm: GraphModule, x: Tensor) -> float:
    """1 - cos^2 between the output and the output without the blocks; `x` is an input batch."""
    without = copy.deepcopy(gm)
    for block in graph_info(without).blocks:
        output, source = find_node(without, block.output), find_node(without, block.input)
        output.replace_all_uses_with(source)
    without.recompile()
    full, rest = run(gm, x).double().flatten(), run(without, x).double().flatten()
    return 1.0 - float((full @ rest) ** 2 / ((full @ full) * (rest @ rest)))


def measure(entry: Entry, samples: int, batch: int, seed: int, *, strict: bool = False) -> Figures:
    """Randomize, capture and quantize one model; calibrate on `samples` inputs, evaluate on `batch`."""
    begun = time.perf_counter()
    gm = capture(entry, seed, strict=strict)
    batches = [entry.inputs(batch, seed + k) for k in range(0, samples, batch)]
    unseen = entry.inputs(batch, EVALUATION_SEED + seed)
    exact = run(gm, unseen)
    found = {}
    for bits, compensation in ((8, "none"), (4, "none"), (4, "qwt")):
        config = QuantConfig(bits, bits, recipe="repq-vit", compensation=compensation)
        found[bits, compensation] = qwt_fx.quantize(gm, (batches[0],), batches, config)
    sqnr = {key: sqnr_db(exact, run(graph, unseen)) for key, graph in found.items()}
    last = found[4, "qwt"]
    norms = next(r for r in graph_info(last).passes if r["pass"] == "ReparameterizeLayerNorm")
    rows = [r for r in layer_rows(last, "model") if not r["name"].endswith(".compensation")]
    floating = [r for r in rows if r["w_bits"] is None and r["a_bits"] is None]
    return Figures(
        model=entry.name,
        parameters=sum(p.numel() for p in gm.parameters()),
        blocks=len(graph_info(gm).blocks),
        blocks_share=blocks_share(gm, unseen),
        reparameterized=len(norms["changes"]),
        skipped=dict(Counter(_general(reason) for _, reason in norms["skips"])),
        quantized=len(rows) - len(floating),
        floating=len(floating),
        compensated=sum(r["applied"] for r in graph_info(last).compensations.values()),
        w8a8=sqnr[8, "none"],
        w4a4=sqnr[4, "none"],
        w4a4_qwt=sqnr[4, "qwt"],
        seconds=time.perf_counter() - begun,
    )


def _general(reason: str) -> str:
    """A reason without the names of this model's nodes."""
    operator = re.sub(r"feeds \w+ \((\S+?)(\.\w+)?\)", r"feeds \1", reason)
    return re.sub(r"feeds ([a-z]+)_\d+, which", r"feeds \1, which", operator)


def capture(entry: Entry, seed: int, *, strict: bool = False) -> GraphModule:
    """The model with random weights, captured."""
    return qwt_fx.capture(random_model(entry, seed), (entry.inputs(2, seed),), strict=strict)


def random_model(entry: Entry, seed: int) -> nn.Module:
    """The model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return randomize(entry.build(), seed, entry.inputs(8, seed))


def run(gm: GraphModule, x: Tensor) -> Tensor:
    """The output of a graph, without gradients."""
    with torch.no_grad():
        output: Tensor = gm(x)
    return output
