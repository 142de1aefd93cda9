"""The range of one quantizer from all batches. Nothing in here changes a graph or a value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.calibrate.position_scales import find_token_scale, histograms_apart, mass_apart
from qwt_fx.calibrate.value_histogram import CountedValue, best_range, count_value
from qwt_fx.graph.aten import LINEAR
from qwt_fx.numerics.range_search import Range, search_range
from qwt_fx.numerics.rescale_search import Rescale, choose_rescale
from qwt_fx.numerics.split_histogram import SplitHistogram
from qwt_fx.quant.fake_quant import FakeQuant
from qwt_fx.quant.layer_groups import LayerGroup, lowest_weight_bits
from qwt_fx.quant.rescale import weight_and_bias

# Positions get scales, or the input a product, where that leaves at most this fraction of the error.
WORTH = 0.7


@dataclass(frozen=True)
class GroupRange:
    """The range found for a group's value, over the positions' scales where it has some.

    token_scale: see `FakeQuant`; `None` where no position has a scale of its own.
    """

    range: Range
    token_scale: Tensor | None = None


class RangeSearch:
    """Searches ranges and rescales for one group's value at the point the walk has reached.

    Attributes:
        name: of the quantizer, for messages and the journal.
        spec: what it becomes: one range for all channels, zero in it.
    """

    def __init__(self, walk: PairedWalk, group: LayerGroup, quantizer: FakeQuant) -> None:
        self.walk, self.group, self.name = walk, group, quantizer.name
        self.spec = replace(quantizer.spec.per_tensor(), include_zero=True)

    def best(self, moved: Rescale | None) -> GroupRange:
        """The range of the value, `moved` as it has been, with scales of positions if worth it.

        Raises `DataError` for values that are not finite.
        """

        def find() -> tuple[Range, Tensor | None]:
            whole, apart = self.whole(moved), self.apart()
            if apart is not None and apart.range.error < WORTH * whole.error:
                return apart.range, apart.token_scale
            return whole, None

        return GroupRange(*self.walk.journal.once(f"range of {self.name}", find))

    def whole(self, moved: Rescale | None = None) -> Range:
        """The range of all values, moved or not."""
        histogram = self._histogram  # every rank has a part in it
        importance = self._importance(len(histogram.first.total))
        return best_range(self.walk, histogram, importance, self.spec, moved)

    def apart(self) -> GroupRange | None:
        """The range beside scales of positions; `None` where no position stands out."""
        walk, group = self.walk, self.group
        wanted = walk.settings.token_scales and not self.spec.dynamic  # which scales every token
        token_scale = find_token_scale(walk, group) if wanted else None
        if token_scale is None:
            return None
        channels = walk.values(group.source)[0].shape[-1] if self._per_channel else 1
        importance = self._importance(channels)
        histograms = histograms_apart(walk, group, token_scale, channels)
        best = walk.batches.fitted(
            Range, lambda: search_range(mass_apart(histograms, importance), self.spec)
        )
        return GroupRange(best, token_scale)

    def rescale(self, *, shifts: bool, strengths: tuple[float, ...] | None = None) -> Rescale:
        """The rescale of the channels with the least estimated error of the layers' output."""
        candidates = strengths or self.walk.settings.strengths
        bits = lowest_weight_bits(self.walk.gm, self.group.layers)
        histogram, weights = self._histogram, self._weights()
        return self.walk.batches.fitted(
            Rescale,
            lambda: choose_rescale(histogram, weights, self.spec, bits, candidates, shifts=shifts),
        )

    def _weights(self) -> list[Tensor]:
        linears = [n for n in self.group.layers if n.target is LINEAR]
        return [weight_and_bias(self.walk.gm, n)[0] for n in linears]

    def _importance(self, channels: int) -> Tensor:
        """What a squared error of each channel counts, (channels,) float64."""
        weights = self._weights()
        if self.walk.settings.ranges == "output" and weights and channels == weights[0].shape[1]:
            return torch.stack([w.double().square().sum(dim=0) for w in weights]).sum(dim=0)
        device = self.walk.values(self.group.source)[0].device
        return torch.ones(channels, dtype=torch.float64, device=device)

    @property
    def _per_channel(self) -> bool:
        """Whether channels are counted apart: linears read them with different weights."""
        return bool(self.group.layers) and all(n.target is LINEAR for n in self.group.layers)

    @cached_property
    def _histogram(self) -> SplitHistogram:
        """The values of all batches on the first rank, of none on the others.

        Counted when first asked for: before anything moves, and not at all where the journal knows.
        """
        source = self.group.source
        return count_value(
            self.walk, CountedValue(self.name, source, source, apart=self._per_channel)
        )
