"""How much of the differences between channels to move into the weights (method W5).

RepQ-ViT moves all of it, r = s / mean(s). One channel a hundred times larger than the rest then makes
one column of the weight a hundred times larger, and the rows' quantizers lose that much. Here
r = (s / mean)^a is searched over a against the error of the linears' output, from activations and
weights together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwt_fx.histogram import Histogram, gather_mass
from qwt_fx.qparams import QuantSpec
from qwt_fx.range_search import channel_ranges, search_range

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Rounding with knowledge of the Gram leaves about this share of nearest rounding's output error.
_GPTQ_SHARE = 0.5


@dataclass(frozen=True)
class Rescale:
    """x' = x / scale - shift, (channels,) float64 each, and the strength it was made with.

    error: estimated squared error of the output, summed over the calibration tokens.
    """

    scale: Tensor
    shift: Tensor
    strength: float
    error: float


def choose_rescale(
    histogram: Histogram,
    weights: Sequence[Tensor],
    spec: QuantSpec,
    weight_bits: int | None,
    strengths: Sequence[float],
    *,
    shifts: bool,
) -> Rescale:
    """The rescale with the least estimated error of the output of the linears that read x.

    weights: (o, channels) each; spec: the input's quantizer; strengths: candidates for a in [0, 1];
    shifts: whether each channel may be centred too (not where nothing can take the shift back).
    """
    low, high = channel_ranges(histogram, spec.quant_max)
    width = high - low
    if not shifts:
        width = 2.0 * torch.maximum(high, -low)
    floor = float(width.max()) * 1e-6
    if floor <= 0.0:  # constant channels everywhere
        return Rescale(torch.ones_like(width), torch.zeros_like(width), 0.0, 0.0)
    width = width.clamp_min(floor)
    middle = (low + high) / 2.0 if shifts else torch.zeros_like(low)
    logarithm = width.log()
    centred = logarithm - logarithm.mean()
    columns = sum(w.double().square().sum(dim=0) for w in weights)
    assert isinstance(columns, Tensor)  # a group has a linear at least
    entries = histogram.entries()
    spread = histogram.variance * histogram.rows
    best: Rescale | None = None
    for strength in strengths:
        scale = (strength * centred).exp()
        shift = middle / scale
        mass = gather_mass(entries, columns * scale.square(), scale, shift)
        error = search_range(mass, spec).error
        if weight_bits is not None:
            error += _weight_error(
                weights, scale, float((spread / scale.square()).sum()), weight_bits
            )
        if best is None or error < best.error:
            best = Rescale(scale, shift, strength, error)
    assert best is not None  # strengths is not empty
    return best


def _weight_error(weights: Sequence[Tensor], scale: Tensor, spread: float, bits: int) -> float:
    """Output error of rounded weights W diag(scale): step^2 / 12 per weight times the inputs' spread."""
    total = 0.0
    for weight in weights:
        scaled = weight.double() * scale
        step = (scaled.amax(dim=1) - scaled.amin(dim=1)) / (2**bits - 1)
        total += float(step.square().sum()) / 12.0 * spread
    return _GPTQ_SHARE * total
