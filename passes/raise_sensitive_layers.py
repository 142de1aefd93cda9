"""8 bits for the layers whose quantization hurts the output most, under a stated budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batch, Batches, as_inputs
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.checkpoint.journal import NO_JOURNAL, Journal
from qwt_fx.errors import ConfigError, PreconditionError
from qwt_fx.graph.nodes import layer_name
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.measure.sensitivity import Sensitivity, measure_sensitivity
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_nodes, fake_quant_of
from qwt_fx.quant.layer_groups import LayerGroup, find_groups, weight_quantizer

BITS = 8


@dataclass(frozen=True)
class RaiseSensitiveLayers(Pass):
    """Give the most sensitive layers 8 bits, inputs and weights, until the budget is spent.

    Attributes:
        batches: calibration batches, a list of tuples of tensors (or of tensors).
        budget: weight bytes that may be added, as a share of the quantized weights' bytes, in [0, 1].
        samples: samples of the first batch that are used.
        journal: keeps what was measured.

    Stands between `InsertObservers` and calibration. Groups of layers are taken by how much of the
    output's error each byte removes; a group of which only the input has fewer bits costs nothing.
    Raises `ConfigError` for a budget out of range, `PreconditionError` for a calibrated graph.
    """

    batches: Batches
    budget: float
    samples: int = 64
    journal: Journal = field(default=NO_JOURNAL, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget <= 1.0:
            raise ConfigError(f"RaiseSensitiveLayers.budget: got {self.budget}, wanted 0 to 1")

    def requires(self, gm: GraphModule) -> None:
        """Observers must be there, and must not have seen data."""
        nodes = fake_quant_nodes(gm)
        if not nodes or any(fake_quant_of(gm, n).scale is not None for n in nodes):
            raise PreconditionError(
                f"{self.name}: wants a graph with observers, not calibrated yet"
            )

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        batches = DistributedBatches.of(self.batches)
        groups = {tuple(layer_name(n) for n in g.layers): g for g in find_groups(gm) if g.layers}
        chosen = self.journal.once(
            "sensitive layers",
            lambda: batches.ranks.from_first(lambda: self._chosen(gm, batches.batches[0])),
        )
        self.journal.commit()
        for layers, error, cost in chosen:
            _raise(gm, groups[tuple(layers)])
            yield Change(
                ", ".join(layers),
                f"{BITS} bits: {error:.3g} of the output's energy lost before, "
                f"{cost:.0f} bytes more",
            )

    def _chosen(
        self, gm: GraphModule, batch: Batch
    ) -> tuple[tuple[tuple[str, ...], float, float], ...]:
        """The groups to raise: their layers, the error they cause, the bytes they cost."""
        first = tuple(
            x[: self.samples] if isinstance(x, torch.Tensor) else x for x in as_inputs(batch)
        )
        # Ranges per channel: what both recipes make of the channels later comes close to that.
        trial = observe(copy.deepcopy(gm), [first])
        measured = measure_sensitivity(trial, first)
        total = sum(s.weights * s.weight_bits for s in measured if s.weight_bits is not None) / 8
        chosen = choose(measured, self.budget * total)
        return tuple((s.layers, s.error, cost) for s, cost in chosen)


def choose(measured: Sequence[Sensitivity], budget: float) -> list[tuple[Sensitivity, float]]:
    """The groups to raise and what each costs in bytes; the sum stays within the budget."""
    offers = []
    for one in measured:
        cost = 0.0 if one.weight_bits is None else one.weights * (BITS - one.weight_bits) / 8
        raisable = cost > 0.0 or (one.input_bits or BITS) < BITS
        if raisable:
            offers.append((one.error / max(cost, 1.0), one, cost))
    chosen, left = [], budget
    for _, one, cost in sorted(offers, key=lambda offer: -offer[0]):
        if cost <= left and budget > 0.0:
            chosen.append((one, cost))
            left -= cost
    return chosen


def _raise(gm: GraphModule, group: LayerGroup) -> None:
    modules: list[FakeQuant] = []
    if isinstance(group.quantizer, Node):
        modules.append(fake_quant_of(gm, group.quantizer))
    modules += [m for n in group.layers if (m := weight_quantizer(gm, n)) is not None]
    for module in modules:
        module.spec = replace(module.spec, bits=BITS)
