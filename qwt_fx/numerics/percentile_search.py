"""Percentile range search, vectorized over channels.

For each p in {0.999, 0.9999, 0.99999} the range is (quantile(1 - p), quantile(p)) and the candidate
with the least mean squared error wins, the first of equals (RepQ-ViT's published code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from qwt_fx.numerics.qparams import (
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
_BLOCK = 32
_WORTH = 12  # blocks a value looked for, from which looking at blocks is faster


def _outermost(rows: Tensor, keep: int, *, largest: bool) -> Tensor:
    """The `keep` largest (or smallest) values of each row of (channels, n), sorted, outermost first."""
    count = rows.shape[1]
    blocks = count // _BLOCK
    if blocks >= _WORTH * keep:
        # topk moves every value about. The outermost ones lie in the blocks of the outermost
        # extremes, which are found in one pass that writes next to nothing.
        whole = rows[:, : blocks * _BLOCK].reshape(len(rows), blocks, _BLOCK)
        extremes = whole.amax(dim=2) if largest else whole.amin(dim=2)
        chosen = extremes.topk(keep, dim=1, largest=largest, sorted=False).indices
        few = whole.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
        rows = torch.cat([few, rows[:, blocks * _BLOCK :]], dim=1)
    return rows.topk(keep, dim=1, largest=largest, sorted=True).values


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
    candidates = [qparams_from_range(tails.lower(p), tails.upper(p), spec) for p in PERCENTILES]
    errors = _squared_errors(rows, candidates, spec)
    best, best_error = candidates[0], errors[0]
    for candidate, error in zip(candidates[1:], errors[1:], strict=True):
        better = error < best_error
        best = (
            torch.where(better, candidate[0], best[0]),
            torch.where(better, candidate[1], best[1]),
        )
        best_error = torch.where(better, error, best_error)
    scale, zero_point = best
    return (scale, zero_point) if spec.ch_axis is not None else (scale[0], zero_point[0])


def _squared_errors(
    rows: Tensor, candidates: Sequence[tuple[Tensor, Tensor]], spec: QuantSpec
) -> Tensor:
    """Squared error of each row's quantizer with each candidate, (candidates, channels) float64.

    Computed in parts that fit a cache, where all candidates read them.
    """
    errors = rows.new_zeros(len(candidates), len(rows), dtype=torch.float64)
    columns = min(rows.shape[1], CACHED)
    channels = max(1, CACHED // columns)
    for begin in range(0, len(rows), channels):
        part = slice(begin, begin + channels)
        quantizers = [_Quantizer.of(s[part, None], z[part, None], spec) for s, z in candidates]
        for x in torch.split(rows[part], columns, dim=1):
            for index, quantizer in enumerate(quantizers):
                errors[index, part] += quantizer.squared_steps(x)
    scales = torch.stack([scale for scale, _ in candidates]).double()
    return errors * scales.square()


@dataclass(frozen=True)
class _Quantizer:
    """`fake_quantize_affine` of some rows, in steps: clamp(round(x / scale), low, high)."""

    scale: Tensor
    low: Tensor | float
    high: Tensor | float

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Self:
        """scale, zero_point: (channels, 1)."""
        low, high = spec.quant_min - zero_point, spec.quant_max - zero_point
        if len(scale) == 1:  # numbers are clamped to in half the time
            return cls(scale, float(low), float(high))
        return cls(scale, low, high)

    def squared_steps(self, x: Tensor) -> Tensor:
        """Squared error of (channels, n), summed over each row, in squares of its step."""
        steps = x / self.scale
        error: Any = steps.round()
        error = error.clamp_(self.low, self.high).sub_(steps)
        return torch.dot(error[0], error[0]) if len(error) == 1 else error.square_().sum(1)


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
