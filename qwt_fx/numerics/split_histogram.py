"""Histograms of two splits of the calibration samples, each moved as the other one says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwt_fx.numerics.histogram import Histogram, Mass, gather_mass

Move = tuple[Tensor, Tensor]
"""Scale and shift, (channels,) float64 each: x / scale - shift."""


@dataclass(frozen=True)
class SplitHistogram:
    """A tensor's histograms over the even and the odd batches, of the same channels.

    Either may be empty: then there is nothing to judge by but the whole.
    """

    first: Histogram
    second: Histogram

    @cached_property
    def whole(self) -> Histogram:
        """Both splits together."""
        whole = Histogram(len(self.first.counts), self.first.counts.device)
        for split in (self.first, self.second):
            whole.merge(split.as_part())
        return whole

    @property
    def fits(self) -> tuple[Histogram, ...]:
        """Whose ranges decide how a split is moved: for each, `mass` moves the other one."""
        both = (self.first, self.second)
        return both if all(split.rows for split in both) else (self.whole,)

    @cached_property
    def _moved(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Entries of each split beside the one it is moved by, as channels of their own."""
        entries = [split.entries() for split in reversed(self.fits)]
        channels = len(self.first.counts)
        numbered = [(e[0] + at * channels, *e[1:]) for at, e in enumerate(entries)]
        channel, value, half_width, count = (torch.cat(v) for v in zip(*numbered, strict=True))
        return channel, value, half_width, count

    def mass(self, weights: Sequence[Tensor], moves: Sequence[Move] = ()) -> Mass:
        """All values together; with `moves`, one for each of `fits`, each split as the other says.

        weights: what a squared error of each channel counts, (channels,) float64, one for all or one
        for each of `moves`.
        """
        if not moves:
            return gather_mass(self.whole.entries(), *weights)
        scale, shift = (torch.cat(v) for v in zip(*moves, strict=True))
        return gather_mass(self._moved, torch.cat(list(weights)), scale, shift)
