"""Percentile range search, vectorized over channels.

For each p in {0.999, 0.9999, 0.99999} the range is (quantile(1 - p), quantile(p)) and the candidate
with the least mean squared error wins, the first of equals (RepQ-ViT's published code).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qwt_fx.qparams import (
    LOG_SQRT2,
    QuantSpec,
    dequantize_log_sqrt2,
    fake_quantize_log_sqrt2,
    qparams_from_range,
    quantize_log_sqrt2,
)

PERCENTILES = (0.999, 0.9999, 0.99999)
# Above this size the published code switches from torch.quantile, whose rank is a float32, to
# numpy's percentile, whose rank is a float64.
_FLOAT32_RANKS = 16_000_000


def _rank(p: float, count: int) -> float:
    if count > _FLOAT32_RANKS:
        return p * (count - 1)
    return float(torch.tensor(p, dtype=torch.float32) * (count - 1))


# A core's cache holds some tensors of so many elements: beyond it every operator waits for memory.
CACHED = 1 << 16
_SAMPLE = 1 << 16
_BLOCK = 64


def _outermost(rows: Tensor, keep: int, *, largest: bool) -> Tensor:
    """The `keep` largest (or smallest) values of each row of (channels, n), sorted, outermost first."""
    count = rows.shape[1]
    if len(rows) == 1 and count > 16 * _SAMPLE:
        # topk moves every value about. A sample tells where the tail begins, and few lie beyond.
        sample = rows[0, :: count // _SAMPLE]
        rank = min(math.ceil(2.0 * keep / count * len(sample)) + 16, len(sample))
        begin = sample.topk(rank, largest=largest, sorted=True).values[-1]
        tail = _beyond(rows[0], begin, largest=largest)
        if len(tail) >= keep:
            rows = tail[None]
    return rows.topk(keep, dim=1, largest=largest, sorted=True).values


def _beyond(row: Tensor, begin: Tensor, *, largest: bool) -> Tensor:
    """The values of (n,) that are at least `begin` (or at most), in any order, where they are few."""
    whole = row[: len(row) - len(row) % _BLOCK].view(-1, _BLOCK)
    # Most blocks hold none, and their extremes are found in one pass that writes next to nothing.
    hit = whole[whole.amax(dim=1) >= begin] if largest else whole[whole.amin(dim=1) <= begin]
    few = torch.cat([hit.flatten(), row[whole.numel() :]])
    return few[few >= begin if largest else few <= begin]


class _Tails:
    """Both sorted tails of each row of a (channels, n) tensor: enough for the outer quantiles."""

    def __init__(self, rows: Tensor, lowest_p: float) -> None:
        self.count = rows.shape[1]
        keep = min(self.count, math.ceil((1.0 - lowest_p) * self.count) + 2)
        self._top = _outermost(rows, keep, largest=True)
        self._bottom = _outermost(rows, keep, largest=False)

    def _interpolate(self, below: Tensor, above: Tensor, fraction: float) -> Tensor:
        return torch.lerp(below, above, fraction)

    def upper(self, p: float) -> Tensor:
        """quantile(p) of each row with linear interpolation, (channels,)."""
        rank = _rank(p, self.count)
        below = math.floor(rank)
        above = min(below + 1, self.count - 1)
        last = self.count - 1
        return self._interpolate(
            self._top[:, last - below], self._top[:, last - above], rank - below
        )

    def lower(self, p: float) -> Tensor:
        """quantile(1 - p) of each row with linear interpolation, (channels,)."""
        rank = _rank(1.0 - p, self.count)
        below = math.floor(rank)
        above = min(below + 1, self.count - 1)
        return self._interpolate(self._bottom[:, below], self._bottom[:, above], rank - below)


def _channels_first(x: Tensor, ch_axis: int | None) -> Tensor:
    if ch_axis is None:
        return x.reshape(1, -1)
    first = x.movedim(ch_axis, 0)
    # The order within a channel is free. As it lies in memory the rest is one dimension, and the
    # copy a transposition of two, which torch does in blocks.
    rest = sorted(range(1, first.dim()), key=first.stride, reverse=True)
    return first.permute(0, *rest).reshape(len(first), -1).contiguous()


def search_affine(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the affine quantizer with the least mean squared error.

    `x`: any shape, float. Returns (channels,) per channel or () per tensor, float32.
    """
    rows = _channels_first(x.detach().float(), spec.ch_axis)
    tails = _Tails(rows, min(PERCENTILES))
    best: tuple[Tensor, Tensor] | None = None
    best_error = rows.new_full((rows.shape[0],), math.inf, dtype=torch.float64)
    for p in PERCENTILES:
        scale, zero_point = qparams_from_range(tails.lower(p), tails.upper(p), spec)
        error = _squared_error(rows, scale, zero_point, spec)
        if best is None:
            best, best_error = (scale, zero_point), error
            continue
        better = error < best_error
        best = (torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1]))
        best_error = torch.where(better, error, best_error)
    assert best is not None  # PERCENTILES is not empty
    scale, zero_point = best
    return (scale, zero_point) if spec.ch_axis is not None else (scale[0], zero_point[0])


def _squared_error(rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Squared error of each row's quantizer, (channels,) float64; computed in parts that fit a cache."""
    found = rows.new_zeros(len(rows), dtype=torch.float64)
    low, high = spec.quant_min - zero_point[:, None], spec.quant_max - zero_point[:, None]
    columns = min(rows.shape[1], CACHED)
    channels = max(1, CACHED // columns)
    for begin in range(0, len(rows), channels):
        part = slice(begin, begin + channels)
        bounds: Any = (low[part], high[part])
        if len(bounds[0]) == 1:  # numbers are clamped to in half the time
            bounds = tuple(map(float, bounds))
        for x in torch.split(rows[part], columns, dim=1):
            # `fake_quantize_affine` in steps: the error of clamp(round(x / s), low, high).
            steps = x / scale[part, None]
            error = steps.round().clamp_(*bounds).sub_(steps)
            found[part] += (
                torch.dot(error[0], error[0]) if len(error) == 1 else error.square_().sum(1)
            )
    return found * scale.double().square()


def search_log_sqrt2(x: Tensor, spec: QuantSpec) -> Tensor:
    """Scale, () float32, of the log-sqrt2 quantizer with the least mean squared error."""
    flat = x.detach().float().reshape(1, -1)
    tails = _Tails(flat, min(PERCENTILES))
    best, best_error = flat.new_ones(()), math.inf
    for p in PERCENTILES:
        # An all-zero tensor has no scale; the smallest normal number keeps a / s finite.
        scale = tails.upper(p)[0].clamp_min(torch.finfo(torch.float32).tiny)
        if spec.reserve_zero:
            codes = quantize_log_sqrt2(flat, scale, spec.bits)
            restored = dequantize_log_sqrt2(codes, scale, spec.bits)
        else:
            restored = fake_quantize_log_sqrt2(flat, scale, spec.bits)
        error = float(restored.sub_(flat).square_().mean())
        if error < best_error:
            best, best_error = scale, error
    return best


def search(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (`None` for log-sqrt2) of the quantizer that `spec` describes."""
    if spec.scheme == LOG_SQRT2:
        return search_log_sqrt2(x, spec), None
    return search_affine(x, spec)
