"""How much of the differences between channels to move into the weights.

RepQ-ViT moves all of it, r = s / mean(s). One channel a hundred times larger than the rest then makes
one column of the weight a hundred times larger, and the rows' quantizers lose that much. Here
r = (s / mean)^a is searched over a against the error of the linears' output, from activations and
weights together.

A channel's own range is known less well than that of all channels together: moved by the ranges of
few samples, other samples are clipped. So each split of the samples is moved as the other says
when an error is estimated or a range is searched; with many samples both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.numerics.range_search import channel_ranges, search_range
from qwt_fx.numerics.split_histogram import Move, SplitHistogram

# Rounding with knowledge of the Gram leaves about this fraction of nearest rounding's output error.
_GPTQ_FRACTION = 0.5


@dataclass(frozen=True)
class Rescale:
    """x' = x / scale - shift, (channels,) float64 each, and the strength it was made with.

    error: estimated squared error of the output, summed over the calibration tokens.
    apart: scale and shift as each split of the samples alone would have them.
    """

    scale: Tensor
    shift: Tensor
    strength: float
    error: float
    apart: tuple[Move, ...]


def choose_rescale(
    values: SplitHistogram,
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
    whole = values.whole
    low, high = channel_ranges(whole, spec.quant_max)
    floor = float(_width(low, high, shifts=shifts).max()) * 1e-6
    if floor <= 0.0:  # constant channels everywhere
        still = (torch.ones_like(low), torch.zeros_like(low))
        return Rescale(*still, 0.0, 0.0, (still,) * len(values.fits))
    ranges = [(low, high)]
    if len(values.fits) > 1:
        ranges += [channel_ranges(fit, spec.quant_max) for fit in values.fits]
    columns = sum(w.double().square().sum(dim=0) for w in weights)
    assert isinstance(columns, Tensor)  # a group has a linear at least
    spread = whole.variance * whole.rows
    best: Rescale | None = None
    for strength in strengths:
        moves = [_move(*r, strength, floor, shifts=shifts) for r in ranges]
        (scale, shift), apart = moves[0], tuple(moves[1:] or moves)
        importance = [columns * own.square() for own, _ in apart]
        error = search_range(values.mass(importance, apart), spec).error
        if weight_bits is not None:
            error += _weight_error(
                weights, scale, float((spread / scale.square()).sum()), weight_bits
            )
        if best is None or error < best.error:
            best = Rescale(scale, shift, strength, error, apart)
    assert best is not None  # strengths is not empty
    return best


def _width(low: Tensor, high: Tensor, *, shifts: bool) -> Tensor:
    return high - low if shifts else 2.0 * torch.maximum(high, -low)


def _move(low: Tensor, high: Tensor, strength: float, floor: float, *, shifts: bool) -> Move:
    """Scale and shift that bring channels of these ranges together as far as `strength` says."""
    logarithm = _width(low, high, shifts=shifts).clamp_min(floor).log()
    scale = (strength * (logarithm - logarithm.mean())).exp()
    shift = (low + high) / 2.0 / scale if shifts else torch.zeros_like(low)
    return scale, shift


def _weight_error(weights: Sequence[Tensor], scale: Tensor, spread: float, bits: int) -> float:
    """Output error of rounded weights W diag(scale): step^2 / 12 per weight times the inputs' spread."""
    total = 0.0
    for weight in weights:
        scaled = weight.double() * scale
        step = (scaled.amax(dim=1) - scaled.amin(dim=1)) / (2**bits - 1)
        total += float(step.square().sum()) / 12.0 * spread
    return _GPTQ_FRACTION * total
