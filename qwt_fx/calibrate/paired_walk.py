"""A floating-point graph and a quantized one, advanced in step over the calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.precision import wide
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.calibrate.block_compensation import BlockCompensation
from qwt_fx.checkpoint.journal import NO_JOURNAL, Journal
from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.config.layer_settings import LayerSettings
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node, is_call
from qwt_fx.graph.pass_base import Change, Skip
from qwt_fx.graph.runner import BlockRunner, EachBatch
from qwt_fx.graph.sample_ids import sample_ids
from qwt_fx.numerics.hold_out import held_out_samples
from qwt_fx.numerics.rescale_search import Rescale
from qwt_fx.numerics.second_moments import CHUNK
from qwt_fx.quant.attention_products import find_products
from qwt_fx.quant.fake_quant import is_fake_quant
from qwt_fx.quant.layer_groups import LayerGroup, residual_of, rows_of
from qwt_fx.text.token_map import token_masks

aten = torch.ops.aten


class PairedWalk:
    """Both graphs at the point reached, and which rows of which batch are used for what.

    A batch's index counts the batches of this rank; `batches` knows all of them.

    Between two groups the quantized graph holds, for every batch, the values that later nodes still
    read: at most a block's widest value and its residual. The floating-point graph is one step ahead: it
    holds the outputs that the group's layers aim at. Nothing is stored beyond that. `store` keeps the
    values; the two graphs share its budget.
    """

    def __init__(
        self,
        gm: GraphModule,
        reference: GraphModule,
        batches: DistributedBatches,
        groups: list[LayerGroup],
        settings: LayerSettings,
        journal: Journal = NO_JOURNAL,
        store: ValueStore | None = None,
        compensation: CompensationSettings | None = None,
    ) -> None:
        self.gm = gm
        self.reference = reference
        self.settings = settings
        self.journal = journal
        self.batches = batches
        store = store or ValueStore()
        self._quantized = BlockRunner(gm, batches.batches, store)
        self._floating = BlockRunner(reference, batches.batches, store)
        held_out = held_out_samples(batches.samples, settings.hold_out)
        self._judges = batches.of_mine(torch.split(held_out, batches.sizes))
        boundary = [find_node(gm, b.input) for b in graph_info(gm).blocks]
        products = dict.fromkeys(find_products(gm).values())
        operands = [o.tokens for p in products for o in (p.first, p.second)]
        known = [*(g.source for g in groups), *boundary, *operands]
        self._tokens = token_masks(gm, batches.batches, known)
        self.twin = Correspondence(reference).twin
        self._position = {node: at for at, node in enumerate(reference.graph.nodes)}
        layers = [layer for g in groups for layer in g.layers]
        self._outputs = {layer: self._output_of(layer) for layer in layers}
        self._sums = self._sums_of(groups)
        self._targets = {g: self._targets_of(g) for g in groups if settings.target == "fp"}
        self._blocks: BlockCompensation | None = None
        if compensation is not None:
            self._blocks = BlockCompensation(
                compensation, self._quantized, self._floating, batches, journal, self._tokens
            )

    def release(self) -> None:
        """Drop everything that is held: the walk is over."""
        self._quantized.release()
        self._floating.release()

    def advance(self, group: LayerGroup) -> None:
        """Run the quantized graph up to the value a group reads, the other up to what it aims at."""
        ours = self._targets.pop(group, set())
        if ours:  # first: the widest value there is let go before the one here is made
            self._floating.pinned = ours.union(*self._targets.values())
            self._floating.advance(max(ours, key=self._position.__getitem__))
        self._quantized.advance(group.source)

    def compensate(self, group: LayerGroup | None) -> Iterator[Change | Skip]:
        """Compensate the blocks that end before the value a group reads; `None`: all that are left."""
        if self._blocks is not None:
            self._floating.pinned = set().union(*self._targets.values())
            yield from self._blocks.up_to(None if group is None else group.source)

    def _targets_of(self, group: LayerGroup) -> set[Node]:
        """The floating-point nodes whose values a group's layers are fitted with."""
        targets = set()
        for layer in group.layers:
            if layer in self._sums:
                targets.add(self._sums[layer])
                continue
            targets.add(self._outputs[layer] or self.twin(group.source))
            if (residual := residual_of(layer)) is not None:
                targets.add(self.twin(residual))
        return targets

    def _sums_of(self, groups: list[LayerGroup]) -> dict[Node, Node]:
        """The floating-point sum of each layer's output and a residual that is known before it.

        It says what both say, in half the memory.
        """
        sums = {}
        order = {node: at for at, node in enumerate(self.gm.graph.nodes)}
        for group in groups:
            for layer in group.layers:
                output, residual = self._outputs[layer], residual_of(layer)
                if output is None or residual is None or order[residual] > order[group.source]:
                    continue
                if residual_of(output) is self.twin(residual):
                    (sums[layer],) = output.users
        return sums

    def _output_of(self, layer: Node) -> Node | None:
        """The floating-point layer, if the rows of its output are those of the value it reads."""
        twin = self.twin(layer)
        if not is_call(twin, {LINEAR}):
            return None
        source = layer.args[0]
        if isinstance(source, Node) and is_fake_quant(self.gm, source):
            source = source.args[0]
        return twin if isinstance(source, Node) and twin.args[0] is self.twin(source) else None

    def values(self, node: Node) -> Sequence[Tensor]:
        """The quantized path's value of each of this rank's batches, (samples, ...)."""
        return EachBatch(self._quantized.envs, node)

    def floating(self, node: Node, index: int) -> Tensor:
        """The floating-point path's value of one batch."""
        value: Tensor = self._floating.envs[index][self.twin(node)]
        return value

    def floating_output(self, layer: Node, index: int) -> Tensor | None:
        """The floating-point layer's output of one batch; `None` where it is not held."""
        twin = self._outputs[layer]
        return None if twin is None else self._floating.envs[index].get(twin)

    def missing_in_sum(self, layer: Node, index: int) -> Tensor | None:
        """What the layer should add to the quantized residual stream; `None` where that is not held."""
        if layer not in self._sums:
            return None
        residual = residual_of(layer)  # of the graph as it is now: compensation changes it
        assert residual is not None
        total: Tensor = self._floating.envs[index][self._sums[layer]]
        ours: Tensor = self._quantized.envs[index][residual]
        return wide(total) - wide(ours)

    def gap(self, node: Node, index: int) -> Tensor | None:
        """Floating-point value minus quantized value of one batch; `None` before they are known."""
        ours = self._quantized.envs[index].get(node)
        theirs = self._floating.envs[index].get(self.twin(node))
        return None if ours is None or theirs is None else wide(theirs) - wide(ours)

    def rescaled(self, origin: Node, rescale: Rescale) -> None:
        """Bring the values up to date where the quantized graph makes x / scale - shift at `origin`."""

        def change(value: Tensor) -> Tensor:
            scale, shift = (v.to(value.dtype) for v in (rescale.scale, rescale.shift))
            return value / scale - shift

        self.revise(origin, change)

    def revise(self, origin: Node, change: Callable[[Tensor], Tensor]) -> None:
        """Bring the values up to date where the quantized graph makes others at `origin`."""
        self._quantized.revise(origin, change)

    def reach(self, node: Node) -> None:
        """Run the quantized graph up to a node: a later one, or one put in at the point reached."""
        self._quantized.advance(node)

    def mask(
        self, source: Node, index: int, *, behind_end: bool, first: bool = False
    ) -> Tensor | None:
        """Which rows of a batch count, (rows,) bool; `None` for all of them.

        behind_end: leave out positions behind the end of a text where they provably cannot matter.
        first: position 0 counts even where constants stand in for it.
        """
        first = first or not self.first_is_constant
        name = Correspondence.name_of(source)
        return self._tokens[index].counting(name, behind_end=behind_end, first=first)

    @property
    def first_is_constant(self) -> bool:
        """Whether position 0 reaches other positions through constants alone."""
        return graph_info(self.gm).constant_token is not None

    def rows(self, source: Node, layer: Node, index: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of a batch's rows that are summed for a layer, and which of them judge.

        weight: the layer's, (o, ...). A layer with more inputs than outputs is summed over a fixed
        random part of the rows.
        """
        number = self.batches.numbers[index]
        batch = self.batches.sizes[number]
        x = self._quantized.envs[index][source]
        samples = None
        if layer.target is aten.linear.default:
            count = x.numel() // x.shape[-1]
            samples = sample_ids(source, x.shape, batch)
        else:
            count = rows_of(layer, weight, x).shape[0]
        if samples is None:
            samples = torch.arange(count) * batch // count
        keep = torch.arange(count)
        mask = self.mask(source, index, behind_end=self.settings.token_masks != "none")
        if mask is not None and len(mask) == count:
            keep = keep[mask.cpu()]
        inputs, outputs = weight.flatten(1).shape[1], len(weight)
        tokens = max(self.settings.tokens_per_input * inputs, CHUNK)  # a narrow layer's cost little
        tokens_per_batch = -(-tokens // len(self.batches.sizes))
        if inputs > outputs and tokens_per_batch < len(keep):
            generator = torch.Generator().manual_seed(number)
            chosen = torch.randperm(len(keep), generator=generator)[:tokens_per_batch]
            keep = keep[chosen.sort().values]
        return keep.to(x.device), self._judges[index][samples[keep]].to(x.device)
