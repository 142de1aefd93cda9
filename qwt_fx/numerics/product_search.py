"""Scales of an attention's queries and keys, and ranges of its probabilities, by what they disturb.

Q K^T stays what it is when a channel of Q is divided by r and the same channel of K is multiplied by
it; softmax(Q K^T) does when K is shifted, which adds the same to all scores of a query. So differences
between the channels of both go where one quantizer for all of them loses least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwt_fx.numerics.qparams import (
    AFFINE,
    LOG_SQRT2,
    QuantSpec,
    dequantize_log_sqrt2,
    fake_quantize_affine,
    quantize_log_sqrt2,
)
from qwt_fx.numerics.range_search import Range, channel_ranges, search_range
from qwt_fx.numerics.split_histogram import Move, SplitHistogram

# How far from the largest probability a range may end, as powers of two.
_REACH = torch.cat([torch.linspace(0.0, 2.0, 9), torch.linspace(2.5, 6.0, 8)])


@dataclass(frozen=True)
class Balance:
    """Q' = Q / scale, K' = K * scale - shift, (channels,) float64 each, and what both lose by it.

    error: estimated squared error of the scores less their mean over the keys, over all tokens.
    apart: scale and shift as each split of the samples alone would have them.
    """

    scale: Tensor
    shift: Tensor
    strength: float
    error: float
    apart: tuple[Move, ...]


def choose_balance(
    queries: SplitHistogram,
    keys: SplitHistogram,
    specs: tuple[QuantSpec, QuantSpec],
    strengths: Sequence[float],
    *,
    shifts: bool,
) -> Balance:
    """The balance of queries and keys with the least estimated error of the scores.

    specs: of both quantizers; strengths: candidates for how much of the differences is moved; shifts:
    whether keys may be centred.
    """
    levels = specs[0].quant_max
    ranges = [
        (*channel_ranges(q, levels), *channel_ranges(k, levels))
        for q, k in zip((queries.whole, *queries.fits), (keys.whole, *keys.fits), strict=True)
    ]
    best: Balance | None = None
    for strength in strengths:
        moves = [_balance(*r, strength, shifts=shifts) for r in ranges]
        (scale, shift), apart = moves[0], tuple(moves[1:])
        own = Balance(scale, shift, strength, 0.0, apart)
        error = sum(r.error for r in balanced_ranges(queries, keys, specs, own))
        if best is None or error < best.error:
            best = replace(own, error=error)
    assert best is not None  # strengths is not empty
    return best


def balanced_ranges(
    queries: SplitHistogram,
    keys: SplitHistogram,
    specs: tuple[QuantSpec, QuantSpec],
    balance: Balance | None,
) -> tuple[Range, Range]:
    """The ranges of both operands, moved as `balance` says.

    An error of a query's channel counts as much as that channel of the keys varies (what all keys of a
    sample share changes no probability), one of a key's as large as that of the queries is.
    """
    varies, size = keys.whole.variance, queries.whole.square / max(queries.whole.rows, 1)
    if balance is None:
        return (
            search_range(queries.mass([varies]), specs[0]),
            search_range(keys.mass([size]), specs[1]),
        )
    q_moves = [(scale, torch.zeros_like(shift)) for scale, shift in balance.apart]
    k_moves = [(scale.reciprocal(), shift) for scale, shift in balance.apart]
    return (
        search_range(
            queries.mass([varies * s.square() for s, _ in balance.apart], q_moves), specs[0]
        ),
        search_range(keys.mass([size / s.square() for s, _ in balance.apart], k_moves), specs[1]),
    )


def _balance(
    q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor, strength: float, *, shifts: bool
) -> Move:
    """Scale and shift that bring a channel's ranges in both together as far as `strength` says."""
    q_width = 2.0 * torch.maximum(q_high, -q_low)
    k_width = k_high - k_low if shifts else 2.0 * torch.maximum(k_high, -k_low)
    floors = [w.max().clamp_min(1e-30) * 1e-6 for w in (q_width, k_width)]
    ratio = q_width.clamp_min(floors[0]) / k_width.clamp_min(floors[1])
    logarithm = ratio.log()
    # Half of the ratio evens both out; the common part is either quantizer's own scale.
    scale = (strength * (logarithm - logarithm.mean()) / 2.0).exp()
    middle = (k_low + k_high) / 2.0
    return scale, middle * scale if shifts else torch.zeros_like(scale)


@dataclass(frozen=True)
class ProbabilityRange:
    """The scheme and scale of a quantizer of probabilities, and the squared error of their product."""

    scheme: str
    scale: Tensor
    error: float


def probability_ranges(
    largest: float, spec: QuantSpec, schemes: Sequence[str]
) -> list[tuple[str, Tensor]]:
    """Candidates for a quantizer of softmax(QK^T): scheme and scale, () float32.

    largest: of all probabilities; schemes: candidates of `QuantSpec.scheme`.
    """
    largest = max(largest, torch.finfo(torch.float32).tiny)
    steps = {scheme: spec.quant_max if scheme == AFFINE else 1 for scheme in schemes}
    return [
        (scheme, torch.tensor(largest * 2.0**-reach, dtype=torch.float32) / step)
        for scheme, step in steps.items()
        for reach in _REACH.tolist()
    ]


def product_errors(
    p: Tensor, v: Tensor, candidates: Sequence[tuple[str, Tensor]], spec: QuantSpec
) -> Tensor:
    """Squared error of each candidate's product with the values, (candidates,) float64.

    p: probabilities (..., queries, keys); v: values (..., keys, d), weighted by what an error of each
    channel counts.
    """
    errors = [_product_error(p, v, scheme, scale, spec) for scheme, scale in candidates]
    return torch.tensor(errors, dtype=torch.float64)


def least_error(candidates: Sequence[tuple[str, Tensor]], errors: Tensor) -> ProbabilityRange:
    """The candidate whose products, of all batches together, are disturbed least."""
    best = int(errors.argmin())
    return ProbabilityRange(*candidates[best], float(errors[best]))


def _product_error(p: Tensor, v: Tensor, scheme: str, scale: Tensor, spec: QuantSpec) -> float:
    if scheme == LOG_SQRT2:
        codes = quantize_log_sqrt2(p, scale, spec.bits)
        rounded = dequantize_log_sqrt2(codes, scale, spec.bits)
    else:
        zero = torch.zeros_like(scale)
        rounded = fake_quantize_affine(p, scale, zero, spec.quant_min, spec.quant_max)
    product = torch.matmul(rounded.sub_(p), v)
    return float(product.square_().sum(dtype=torch.float64))
