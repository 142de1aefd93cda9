"""Ranges that disturb a layer's output least, from histograms over every calibration batch.

The error of an input quantizer as its layer sees it is ||(Q(X) - X) W^T||^2. Rounding errors of
different channels are nearly uncorrelated, so it is the sum over channels of the squared error times
||W_c||^2, and a histogram per channel is all that it takes (ranges from all batches, the
extremes among the candidates, the output's error as the objective).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwt_fx.numerics.histogram import Histogram, Mass
from qwt_fx.numerics.qparams import QuantSpec, qparams_from_range

# Fractions of each extreme that a range may reach, 1 = the extreme itself.
_COARSE = torch.cat(
    [torch.tensor([0.0]), 2.0 ** torch.linspace(-6.0, 0.0, 25, dtype=torch.float64)]
)
_FINE = torch.linspace(0.84, 1.19, 15, dtype=torch.float64)
CHANNEL_PERCENTILES = (0.99, 0.999, 0.9999, 1.0)


@dataclass(frozen=True)
class Range:
    """Qparams of a per-tensor quantizer, () float32 each, and its weighted squared error."""

    scale: Tensor
    zero_point: Tensor
    error: float


def squared_error(mass: Mass, scale: Tensor, zero_point: Tensor, quant_max: int) -> Tensor:
    """Weighted squared error of each candidate quantizer, (candidates,) float64.

    scale, zero_point: (candidates,). Exact for values spread evenly over their bins: the squared
    error, rounding and clipping, is integrated over each bin.
    """
    s, z = scale.double()[:, None], zero_point.double()[:, None]
    value, half_width = mass.value[None], mass.half_width[None]
    # In place: a table of candidates and bins is large, and making it takes longer than filling it.
    mean = _error_integral(value + half_width, s, z, quant_max)
    mean -= _error_integral(value - half_width, s, z, quant_max)
    mean /= (2.0 * half_width).clamp_min(torch.finfo(torch.float64).tiny)
    codes = (value / s).round_().add_(z).clamp_(0, quant_max)
    point = codes.sub_(z).mul_(s).sub_(value).square_()
    return torch.where(half_width > 0.0, mean, point) @ mass.weight


def _error_integral(x: Tensor, s: Tensor, z: Tensor, quant_max: int) -> Tensor:
    """Integral from the lowest level to x of the squared error (t - Q(t))^2 dt."""
    low, high = -z * s, (quant_max - z) * s
    inside = x.clamp(low, high)
    outside = x - inside
    rest = inside.sub_(low)
    steps = (rest / s).round_()
    rest -= steps * s
    # Each whole step between two levels contributes s^3 / 12; the rest lies around a level.
    sawtooth = steps.mul_(s**3).div_(12.0).add_(rest.pow_(3).div_(3.0))
    return sawtooth.add_(outside.pow_(3).div_(3.0))


def search_range(mass: Mass, spec: QuantSpec, extra: tuple[tuple[float, float], ...] = ()) -> Range:
    """The per-tensor range with the least weighted squared error.

    `extra` are further (low, high) candidates, such as percentiles. Two grids of fractions of both
    extremes are searched, the second around the best of the first.
    """
    value = mass.value
    low = float((value - mass.half_width).min().clamp(max=0.0))
    high = float((value + mass.half_width).max().clamp(min=0.0))
    lows, highs = low * _COARSE, high * _COARSE
    pairs = torch.cartesian_prod(lows, highs)
    if extra:
        pairs = torch.cat([pairs, torch.tensor(extra, dtype=torch.float64)])
    best = _best(mass, spec, pairs)
    around = torch.cartesian_prod(best[0] * _FINE, best[1] * _FINE).clamp(low, high)
    low_high = _best(mass, spec, torch.cat([torch.stack([best]), around]))
    scale, zero_point = qparams_from_range(low_high[0], low_high[1], spec)
    error = squared_error(mass, scale[None], zero_point[None], spec.quant_max)
    return Range(scale, zero_point, float(error[0]))


def _best(mass: Mass, spec: QuantSpec, pairs: Tensor) -> Tensor:
    """The (low, high) pair with the least error, (2,) float64."""
    pairs = pairs[(pairs[:, 1] > pairs[:, 0])]
    if not len(pairs):
        return torch.zeros(2, dtype=torch.float64)
    scale, zero_point = qparams_from_range(pairs[:, 0], pairs[:, 1], spec)
    errors = squared_error(mass, scale.to(mass.value.device), zero_point, spec.quant_max)
    return pairs[int(errors.argmin())]


def channel_ranges(histogram: Histogram, levels: int) -> tuple[Tensor, Tensor]:
    """The (low, high) of each channel with the least squared error at `levels` steps.

    (channels,) float64 each; percentiles and the extremes are the candidates.
    """
    channel, value, _, count = histogram.entries()
    best_error = torch.full_like(histogram.total, torch.inf)
    best_low, best_high = histogram.low.double(), histogram.high.double()
    ranges = [*histogram.quantiles(CHANNEL_PERCENTILES[:-1]), (best_low, best_high)]
    for low, high in ranges:
        step = (high - low) / levels
        outside = (value - value.clamp(low[channel], high[channel])).square_().mul_(count)
        error = torch.zeros_like(best_error).index_add_(0, channel, outside)
        error += histogram.rows * step.square() / 12.0
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, low, best_low)
        best_high = torch.where(better, high, best_high)
    return best_low, best_high
