"""Scales of single positions that are far larger than the others, and the values beside them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.graph.sample_ids import batch_axis
from qwt_fx.numerics.histogram import Histogram, Mass, gather_mass
from qwt_fx.quant.layer_groups import LayerGroup

_APART = 4.0  # a position this many times larger than the median one may get its own scale


def find_token_scale(walk: PairedWalk, group: LayerGroup) -> Tensor | None:
    """Powers of two that bring the few far larger positions down to the others.

    (length, 1) for values (samples, length, channels), (length, 1, 1) for (length, samples, channels);
    `None` where no position stands out, or too many do.
    """
    values = walk.values(group.source)
    batch = batch_axis(group.source)
    if values[0].dim() != 3 or batch not in (0, 1):
        return None
    largest = list(walk.batches.in_order(lambda index: [values[index].abs().amax(dim=(batch, 2))]))
    factor: Tensor | None = walk.batches.ranks.from_first(
        lambda: _factors(torch.stack(largest).amax(dim=0), walk.first_is_constant)
    )
    if factor is None:
        return None
    return factor[:, None] if batch == 0 else factor[:, None, None]


def _factors(largest: Tensor, first_is_constant: bool) -> Tensor | None:
    """The power of two for each position, (length,), from the largest value there."""
    if first_is_constant:
        largest[0] = largest.median()
    ratio = largest / largest.median().clamp_min(torch.finfo(torch.float32).tiny)
    apart = ratio >= _APART
    if not bool(apart.any()) or int(apart.sum()) > max(1, len(ratio) // 8):
        return None
    return torch.where(apart, ratio.log2().ceil(), 0.0).exp2()


def histograms_apart(
    walk: PairedWalk, group: LayerGroup, token_scale: Tensor, channels: int
) -> dict[float, Histogram]:
    """The values with every position divided by its scale, by scale; on the first rank."""
    values = walk.values(group.source)
    factors = sorted(set(token_scale.flatten().tolist()))
    histograms = {factor: Histogram(channels, token_scale.device) for factor in factors}

    def parts(index: int) -> Iterator[tuple[float, list[Tensor]]]:
        for factor in factors:
            chosen = token_scale.flatten() == factor
            if walk.first_is_constant:
                chosen[0] = False
            x = values[index]
            picked = x[:, chosen] if token_scale.dim() == 2 else x[chosen]
            yield factor, Histogram.part(picked.reshape(-1, channels) / factor)

    for factor, part in walk.batches.in_order(parts):
        histograms[factor].merge(part)
    return histograms


def mass_apart(histograms: dict[float, Histogram], importance: Tensor) -> Mass:
    """All values together; a position's scale multiplies its error again."""
    parts = [
        gather_mass(histogram.entries(), importance * factor**2)
        for factor, histogram in histograms.items()
    ]
    joined = (torch.cat([getattr(p, f) for p in parts]) for f in ("value", "half_width", "weight"))
    return Mass(*joined)
