"""Rounds a linear's weight to integers so that its OUTPUT changes least (GPTQ, arXiv 2210.17323).

With H = E[x x^T] of the layer's quantized input, the error of rounded weights W_q is
tr((W_q - W) H (W_q - W)^T). GPTQ (arXiv 2210.17323) rounds one input channel after another and
moves each error into the channels that are not rounded yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwt_fx.errors import DataError
from qwt_fx.numerics.qparams import QuantSpec, qparams_from_range

_SHRINK = torch.linspace(0.4, 1.0, 25)
_DAMPING = 0.01  # of the mean diagonal of H, as published
_COLUMNS = 128  # rounded between two updates of all remaining columns


def row_qparams(
    weight: Tensor, importance: Tensor, spec: QuantSpec, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each output row, (o,) float32, for weights (o, i).

    The range is the fraction of the row's extremes with the least squared error weighted by
    `importance` (i,), the mean square of each input channel. A symmetric row has the zero point
    2^(bits - 1).
    """
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    if symmetric:
        # The codes reach one step further below zero than above.
        codes = 2 ** (spec.bits - 1)  # below zero
        reach = torch.maximum(high * (codes / max(codes - 1, 1)), -low)
        low, high = -reach, reach * ((codes - 1) / codes)
    best = qparams_from_range(low, high, spec)
    best_error = torch.full_like(low, torch.inf)
    for fraction in _SHRINK:
        scale, zero = qparams_from_range(low * fraction, high * fraction, spec)
        if symmetric:
            zero = torch.full_like(zero, 2 ** (spec.bits - 1))
        codes = round_codes(weight, scale, zero, spec)
        miss = (codes - zero[:, None]).mul_(scale[:, None]).sub_(weight).square_()
        error = miss @ importance.to(miss.dtype)
        better = error <= best_error
        best_error = torch.where(better, error, best_error)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
    return best


def round_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Nearest codes, float, of weights (o, i) or of one column (o, 1)."""
    codes = torch.round(weight / scale[:, None]) + zero_point[:, None]
    return codes.clamp_(spec.quant_min, spec.quant_max)


def round_to_nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The dequantized nearest codes, (o, i)."""
    codes = round_codes(weight, scale, zero_point, spec)
    return (codes - zero_point[:, None]) * scale[:, None]


def gptq(
    weight: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec
) -> Tensor:
    """Dequantized weights (o, i) whose output error under `gram` is small.

    gram: (i, i), a positive semi-definite second moment of the layer's input. Channels are rounded
    in falling order of their second moment; dead channels (no input at all) keep nearest codes.
    """
    h = gram.to(torch.float32)
    mean = float(h.diagonal().mean())
    if mean <= 0.0:
        return round_to_nearest(weight, scale, zero_point, spec)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    inverse_order = torch.argsort(order)
    h = h[order][:, order]
    factor = _inverse_factor(h, _DAMPING * mean)
    del h
    # Channels are rows here: each step works on contiguous memory.
    left = weight.float().T[order].contiguous()
    rounded = torch.empty_like(left)
    low, high = spec.quant_min - zero_point, spec.quant_max - zero_point
    for begin in range(0, len(left), _COLUMNS):
        end = min(begin + _COLUMNS, len(left))
        block, local = left[begin:end], factor[begin:end, begin:end]
        errors = torch.empty_like(block)
        for i in range(end - begin):
            nearest = torch.round(block[i] / scale).clamp_(low, high).mul_(scale)
            rounded[begin + i] = nearest
            torch.sub(block[i], nearest, out=errors[i]).div_(local[i, i])
            if i + 1 < end - begin:
                block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1.0)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1.0)
    return rounded[inverse_order].T.contiguous()


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (h + damping)^-1; a matrix that is too singular gets more damping.

    Raises `DataError` for a matrix with values that are not finite, which none would help.
    """
    if not bool(torch.isfinite(h).all()):
        raise DataError("the second moment of a layer's input is NaN or infinite")
    while True:
        damped = h.flip(0, 1)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed):
            # With the channels reversed h = R R^T for an upper R, and R^-1 is the factor wanted.
            reverse = _invert_lower(lower)
            if bool(torch.isfinite(reverse).all()):
                return reverse.flip(0, 1)
        damping *= 10.0  # ends: h is bounded by its trace, and damping outgrows it


def _invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix (n, n), by quarters: most of the work is matrix products."""
    n = len(lower)
    if n <= _COLUMNS:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    middle = n // 2
    inverse = torch.zeros_like(lower)
    first = inverse[:middle, :middle] = _invert_lower(lower[:middle, :middle])
    last = inverse[middle:, middle:] = _invert_lower(lower[middle:, middle:])
    torch.mm(last @ lower[middle:, :middle], first, out=inverse[middle:, :middle]).neg_()
    return inverse
