"""Histograms that merge exactly: integer counts on a fixed grid made of float32 bit patterns.

The grid depends on no data, so counts of any batches, in any order, add up to the same histogram.
A bin is a sign, an exponent and the first 4 bits of the mantissa: 16 bins an octave, 6 % wide at
most, from 2^-40 to 2^24; smaller values count as 0, larger ones fall into the last bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHIFT = 19  # keeps 4 of float32's 23 mantissa bits
_LOWEST = (127 - 40) << 4
_OCTAVES = 64
_MAGNITUDES = _OCTAVES << 4
BINS = 2 * _MAGNITUDES + 1  # negative, zero, positive


LARGEST = 2.0 ** (_OCTAVES - 40)


def bin_of(x: Tensor) -> Tensor:
    """Index of each float32 value's bin, int32, 0..BINS - 1, rising with the value."""
    bits = x.contiguous().view(torch.int32)
    # In place: for a batch of a wide layer each temporary is 100 MB.
    magnitude = (bits & 0x7FFFFFFF).bitwise_right_shift_(_SHIFT).sub_(_LOWEST - 1)
    magnitude.clamp_(0, _MAGNITUDES)
    # The sign bit as 1 or -1.
    return magnitude.mul_((bits >> 31).bitwise_or_(1)).add_(_MAGNITUDES)


def _edges() -> tuple[Tensor, Tensor]:
    """Centre and half width of each bin, (BINS,) float64."""
    patterns = (torch.arange(_MAGNITUDES + 1, dtype=torch.int32) + _LOWEST) << _SHIFT
    edges = patterns.view(torch.float32).double()
    centres, half_widths = (edges[:-1] + edges[1:]) / 2, (edges[1:] - edges[:-1]) / 2
    zero = edges.new_zeros(1)
    return (
        torch.cat([-centres.flip(0), zero, centres]),
        torch.cat([half_widths.flip(0), zero, half_widths]),
    )


@dataclass(frozen=True)
class Mass:
    """Weighted values: `weight` spread over value +- half_width, each (k,) float64."""

    value: Tensor
    half_width: Tensor
    weight: Tensor


class Histogram:
    """Counts of each channel's values, and their exact minimum, maximum, mean and variance.

    Attributes:
        counts: (channels, BINS) int64.
        low, high: (channels,) float32.
        total, square: (channels,) float64 sums of x and x^2.
        rows: number of rows seen.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(channels, BINS, dtype=torch.int64, device=device)
        self.low = torch.full((channels,), torch.inf, device=device)
        self.high = torch.full((channels,), -torch.inf, device=device)
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.square = torch.zeros_like(self.total)
        self.rows = 0

    @staticmethod
    def part(rows: Tensor) -> list[Tensor]:
        """What rows (n, channels) of any float dtype add: counts, low, high, total, square, rows."""
        if not len(rows):
            return []
        x = rows.float()
        channels = x.shape[1]
        offsets = torch.arange(channels, dtype=torch.int32, device=x.device) * BINS
        index = bin_of(x).add_(offsets)
        flat = torch.bincount(index.flatten(), minlength=channels * BINS)
        return [
            flat.reshape(channels, BINS).to(torch.int32),  # travels between processes
            x.amin(dim=0),
            x.amax(dim=0),
            x.sum(dim=0).double(),
            x.square().sum(dim=0).double(),
            torch.tensor(len(x)),
        ]

    def merge(self, part: Sequence[Tensor]) -> None:
        """Add what `part` returned for some rows."""
        if not part:
            return
        counts, low, high, total, square, rows = part
        self.counts += counts
        self.low = torch.minimum(self.low, low)
        self.high = torch.maximum(self.high, high)
        self.total += total
        self.square += square
        self.rows += int(rows)

    def as_part(self) -> list[Tensor]:
        """What all the rows seen add to another histogram."""
        if not self.rows:
            return []
        sums = [self.counts, self.low, self.high, self.total, self.square]
        return [*sums, torch.tensor(self.rows)]

    def add(self, rows: Tensor) -> None:
        """Count rows (n, channels) of any float dtype."""
        self.merge(self.part(rows))

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (channels,) float64."""
        return self.total / max(self.rows, 1)

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, (channels,) float64."""
        return (self.square / max(self.rows, 1) - self.mean.square()).clamp_min(0.0)

    def values(self) -> tuple[Tensor, Tensor]:
        """Centre and half width of each channel's bins, (channels, BINS) float64.

        Centres never leave the values seen: the outermost bins end at the exact extremes.
        """
        centres, half_widths = (v.to(self.counts.device) for v in _edges())
        low, high = self.low.double()[:, None], self.high.double()[:, None]
        return centres.clamp(low, high), half_widths.expand(len(self.counts), -1)

    def quantiles(self, percentiles: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """(quantile(1 - p), quantile(p)) of each channel for each p, up to half a bin.

        (channels,) float64 each.
        """
        low, high = self.low.double(), self.high.double()
        centres = _edges()[0].to(self.counts.device)
        cumulative = self.counts.cumsum(dim=1)
        count = cumulative[:, -1].double()
        quantiles = []
        for p in percentiles:
            pair = []
            for fraction in (1.0 - p, p):
                # The first bin whose cumulative count, an integer, exceeds the rank.
                rank = torch.clamp(fraction * (count - 1.0), min=0.0).floor().to(torch.int64)
                index = torch.searchsorted(cumulative, rank[:, None], right=True)[:, 0]
                pair.append(centres[index.clamp_max(BINS - 1)].clamp(low, high))
            quantiles.append((pair[0], pair[1]))
        return quantiles

    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every bin that holds something: channel, centre, half width, count, each (k,)."""
        centres, half_widths = self.values()
        channel, bin_index = self.counts.nonzero(as_tuple=True)
        return (
            channel,
            centres[channel, bin_index],
            half_widths[channel, bin_index],
            self.counts[channel, bin_index].double(),
        )


def gather_mass(
    entries: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Mass:
    """The values x / scale - shift of all channels together, channel c weighted by weight[c].

    entries: those of a `Histogram`; weight, scale, shift: (channels,) float64. Values are binned
    again on the same grid, so what was moved is at most one bin less exact.
    """
    channel, value, half_width, count = entries
    amount = count * weight[channel]
    if not bool((amount > 0.0).any()):  # weights of zeros: no value disturbs anything
        amount = count
    if scale is not None:
        value, half_width = value / scale[channel], half_width / scale[channel]
    if shift is not None:
        value = value - shift[channel]
    index = bin_of(value.float())
    empty = torch.zeros(BINS, dtype=torch.float64, device=value.device)
    products = (amount, amount * value, amount * half_width)
    sums = [empty.clone().index_add_(0, index, v) for v in products]
    keep = sums[0] > 0
    total = sums[0][keep]
    return Mass(sums[1][keep] / total, sums[2][keep] / total, total)
