"""Observation: one batch runs through the graph, and each quantizer finds its range on the way.

Ranges are found one after another on activations that are already quantized upstream, from the
first batch, as RepQ-ViT's published code does. Where the graph proves that positions behind the
end of a text cannot matter, they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batch, Batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.ranks import Ranks
from qwt_fx.checkpoint.journal import NO_JOURNAL, Journal
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.settings import settings_of
from qwt_fx.errors import DataError, NotCalibratedError
from qwt_fx.graph.conditions import plain_conditions
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import tensor_of
from qwt_fx.graph.runner import run_all
from qwt_fx.quant.fake_quant import (
    FakeQuant,
    Mode,
    fake_quant_nodes,
    fake_quant_of,
    set_mode,
)
from qwt_fx.text.token_map import token_mask


def check_parameters(gm: GraphModule) -> None:
    """Raise `DataError`, naming the first, where a parameter holds NaN or infinite values.

    Buffers are left alone: masks hold infinities on purpose.
    """
    for name, value in gm.named_parameters():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise DataError(
                f"{name}: {bad} of {value.numel()} values of this parameter are NaN or infinite; "
                "check the checkpoint"
            )


def config_of(gm: GraphModule) -> QuantConfig:
    """The configuration the graph's observers were inserted with."""
    values = graph_info(gm).config
    return QuantConfig.from_dict(values) if values else QuantConfig()


@contextmanager
def masked_rows(gm: GraphModule, batch: Batch, nodes: Sequence[Node]) -> Iterator[str | None]:
    """Restrict the activation quantizers at `nodes` to rows that matter; yields why not, if not."""
    mask = token_mask(gm, batch, nodes)
    for node in nodes:
        fake_quant_of(gm, node).rows = mask.rows.get(node.name)
    try:
        yield mask.reason
    finally:
        for node in nodes:
            fake_quant_of(gm, node).rows = None


@plain_conditions()
def observe(gm: GraphModule, batches: Batches, journal: Journal = NO_JOURNAL) -> GraphModule:
    """Find the scale and zero point of every quantizer that has none; leaves them switched on.

    Args:
        gm: a graph with observers (`InsertObservers`), changed in place and returned.
        batches: a list of tuples of tensors (or of tensors); the first batch is observed.
        journal: keeps the ranges.

    Raises:
        NotCalibratedError: the graph has no observers.
        DataError: `batches` is empty or a generator, or an activation is not finite.
    """
    distributed = DistributedBatches.of(batches)
    nodes = fake_quant_nodes(gm)
    if not nodes:
        raise NotCalibratedError("the graph has no observers: run InsertObservers(config)(gm)")
    modules = [fake_quant_of(gm, n) for n in nodes]

    def find() -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        _observe(gm, distributed, nodes)
        return tuple((m.scale, m.zero_point) for m in modules)

    for module, (scale, zero_point) in zip(modules, journal.once("ranges", find), strict=True):
        if scale is not None:
            module.set_qparams(scale, zero_point)
    journal.commit()
    set_mode(gm, Mode.ON)
    return gm


def _observe(gm: GraphModule, batches: DistributedBatches, nodes: Sequence[Node]) -> None:
    activations = [n for n in nodes if not _is_weight(gm, n)]
    set_mode(gm, Mode.OBSERVE)
    masked = settings_of(config_of(gm)).token_masks == "all"

    def run() -> None:
        first = batches.batches[0]
        with masked_rows(gm, first, activations) if masked else nullcontext():
            run_all(gm, first)

    observe_on_first(batches.ranks, [fake_quant_of(gm, n) for n in nodes], run)


def observe_on_first(
    ranks: Ranks, modules: Sequence[FakeQuant], observation: Callable[[], object]
) -> None:
    """Make an observation on the first rank, which holds batch 0; the others get its qparams."""

    def qparams() -> list[tuple[Tensor | None, Tensor | None]]:
        observation()
        return [(m.scale, m.zero_point) for m in modules]

    for module, (scale, zero_point) in zip(modules, ranks.from_first(qparams), strict=True):
        if not ranks.first and scale is not None:
            module.set_qparams(scale, zero_point)


def _is_weight(gm: GraphModule, node: Node) -> bool:
    return tensor_of(gm, node.args[0]) is not None
