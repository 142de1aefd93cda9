"""Histograms of one value over all calibration batches, the samples in two splits, and its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.errors import DataError
from qwt_fx.graph.sample_ids import sample_ids
from qwt_fx.numerics.histogram import LARGEST, Histogram
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.numerics.range_search import Range, search_range
from qwt_fx.numerics.rescale_search import Rescale
from qwt_fx.numerics.split_histogram import SplitHistogram


def _last_dim(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _as_they_are(flags: Tensor, shape: Sequence[int]) -> Tensor:
    del shape
    return flags


@dataclass(frozen=True)
class CountedValue:
    """A value on the quantized path, and how it is laid out for counting.

    Attributes:
        name: of its quantizer, for messages.
        source: the value.
        tokens: a node with the same elements, one token a row of its last dimension: whose rows count
            and whose sample each belongs to is known of it.
        apart: whether channels are counted apart.
        first: whether position 0 counts where constants stand in for it.
        rows: lays a batch's value out as (rows, channels).
        flags: one flag a row of `tokens`, of that shape less the last dimension, as one a row of `rows`.
    """

    name: str
    source: Node
    tokens: Node
    apart: bool
    first: bool = False
    rows: Callable[[Tensor], Tensor] = _last_dim
    flags: Callable[[Tensor, Sequence[int]], Tensor] = _as_they_are

    def keep(self, walk: PairedWalk, index: int, shape: Sequence[int]) -> Tensor | None:
        """Which rows of a batch count, (rows,) bool; `None` for all of them."""
        behind_end = walk.settings.token_masks == "all"
        mask = walk.mask(self.tokens, index, behind_end=behind_end, first=self.first)
        return None if mask is None else self.flags(mask, shape)


def count_value(walk: PairedWalk, value: CountedValue) -> SplitHistogram:
    """The values of all batches on the first rank, of none on the others.

    Raises `DataError` for values that are not finite or too large.
    """
    values = walk.values(value.source)
    first = values[0]
    channels = value.rows(first[:1]).shape[1] if value.apart else 1
    splits = [Histogram(channels, first.device) for _ in range(2)]

    def parts(index: int) -> Iterator[tuple[int, list[Tensor]]]:
        x = values[index]
        check_range(x, value.name)
        rows = value.rows(x)
        mask = value.keep(walk, index, x.shape)
        for split, chosen in _rows_of_splits(walk, value, x.shape, index):
            keep = mask if chosen is None else chosen
            if mask is not None and chosen is not None:
                keep = mask & chosen.to(mask.device)
            kept = rows if keep is None else rows[keep]
            yield split, Histogram.part(kept if value.apart else kept.reshape(-1, 1))

    for split, part in walk.batches.in_order(parts):
        splits[split].merge(part)
    return SplitHistogram(*splits)


def best_range(
    walk: PairedWalk,
    histogram: SplitHistogram,
    importance: Tensor,
    spec: QuantSpec,
    moved: Rescale | None,
) -> Range:
    """The range of counted values, moved or not, that disturbs least.

    importance: what a squared error of each channel counts, moved or not, (channels,) float64.
    """
    moves = () if moved is None else moved.apart
    weights = [importance] * max(len(moves), 1)
    return walk.batches.fitted(Range, lambda: search_range(histogram.mass(weights, moves), spec))


def check_range(x: Tensor, name: str) -> None:
    """Raise `DataError` unless all values are finite and at most 2^24 in size."""
    low, high = torch.aminmax(x)  # NaN where any value is
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise DataError(
            f"{name}: NaN or infinite values in the tensor to quantize; "
            "check the weights and the calibration inputs"
        )
    if largest > LARGEST:
        raise DataError(
            f"{name}: values up to {largest:g} in the tensor to quantize, wanted at "
            "most 2^24; check the weights and the calibration inputs, or use "
            "--recipe repq-vit"
        )


def _rows_of_splits(
    walk: PairedWalk, value: CountedValue, shape: Sequence[int], index: int
) -> Iterator[tuple[int, Tensor | None]]:
    """Which split of the samples a batch belongs to, or, of the only batch, each of its rows."""
    number, sizes = walk.batches.numbers[index], walk.batches.sizes
    ids = None
    if len(sizes) == 1:
        of = tuple(shape) if value.tokens is value.source else (*shape[:-2], shape[-1], shape[-2])
        ids = sample_ids(value.tokens, of, sizes[0])
    if ids is None:
        yield number % 2, None
    else:
        ids = value.flags(ids, shape)
        for split in (0, 1):
            yield split, ids % 2 == split
