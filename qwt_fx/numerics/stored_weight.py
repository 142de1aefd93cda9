"""What is stored of a fitted weight W (d, e): dense, two factors of low rank, or 8-bit integers.

Each way is a function of W and of the Gram that W was fitted on, and returns the factors, as they
will be read back, whose product stands in for W. A fit is judged with these, not with W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

INT8_MAX = 127  # codes of a symmetric 8-bit weight: -127..127, around the zero point 128
INT8_ZERO_POINT = 128


class Storage(Protocol):
    """How a weight is stored."""

    def __call__(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
        """Factors, float64, whose product replaces `weight` (d, e); gram (d, d) is X^T X."""
        ...


@dataclass(frozen=True)
class Dense:
    """One matrix; `half`: in half precision, where it fits half's range."""

    half: bool = False

    def __call__(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
        """See `Storage`."""
        return (_rounded(weight) if self.half else weight,)


@dataclass(frozen=True)
class LowRank:
    """W ~ A B of at most this rank with the least |X (W - A B)| on the data.

    The best rank-R approximation of G^(1/2) W, with G = X^T X, projects it on its first R right
    singular vectors V, which are the eigenvectors of W^T G W. So A = W V (d, R) and B = V^T (R, e).
    """

    rank: int
    half: bool = False

    def __call__(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
        """See `Storage`."""
        _, vectors = torch.linalg.eigh(weight.T @ gram @ weight)
        rank = min(self.rank, *weight.shape)
        kept = vectors[:, -rank:].flip(1)
        factors = (weight @ kept, kept.T)
        return tuple(map(_rounded, factors)) if self.half else factors


@dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit integers with one scale per output channel."""

    def __call__(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
        """See `Storage`."""
        scale = int8_scale(weight).double()
        codes = torch.round(weight / scale).clamp(-INT8_MAX, INT8_MAX)
        return (codes * scale,)


def int8_scale(weight: Tensor) -> Tensor:
    """Scale (e,) float32 of each output channel of weight (d, e); 1 for a channel of zeros."""
    scale = (weight.abs().amax(dim=0).double() / INT8_MAX).float()
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def fits_half(weight: Tensor) -> bool:
    """Whether every value is in half precision's range."""
    return bool(torch.isfinite(weight.half()).all())


def _rounded(weight: Tensor) -> Tensor:
    return weight.half().to(weight.dtype) if fits_half(weight) else weight
