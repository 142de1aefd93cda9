"""Least squares of one scale and one shift per channel (QwT-v2, arXiv 2505.20932).

With m the output of a linear and e what the block's output misses, channel by channel

    e_c ~ (a_c - 1) m_c + c_c

so that a * m + c is what the linear should have returned. Both fold into the linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to each channel's variance, relative to it: a - 1 shrinks by 1 / (1 + ridge).
RIDGES = (0.0, 0.1, 0.3, 1.0, 3.0)


@dataclass
class ChannelMoments:
    """Sums over tokens of m, e, m^2, m e and e^2 per channel, each (d,) float64."""

    m: Tensor
    e: Tensor
    mm: Tensor
    me: Tensor
    ee: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> ChannelMoments:
        """No tokens yet."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone())

    @staticmethod
    def part(m: Tensor, e: Tensor) -> list[Tensor]:
        """What tokens m (n, d) and e (n, d) of any float dtype add: the fields, in their order."""
        x, y = m.double(), e.double()
        sums = [x, y, x.square(), x * y, y.square()]
        return [*(s.sum(dim=0) for s in sums), torch.tensor(len(m))]

    def merge(self, part: Sequence[Tensor]) -> None:
        """Add what `part` returned for some tokens."""
        m, e, mm, me, ee, count = part
        self.m += m
        self.e += e
        self.mm += mm
        self.me += me
        self.ee += ee
        self.count += int(count)

    def add(self, m: Tensor, e: Tensor) -> None:
        """Add tokens: m (n, d) and e (n, d), any float dtype."""
        self.merge(self.part(m, e))

    def __add__(self, other: ChannelMoments) -> ChannelMoments:
        return ChannelMoments(
            self.m + other.m,
            self.e + other.e,
            self.mm + other.mm,
            self.me + other.me,
            self.ee + other.ee,
            self.count + other.count,
        )

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Scale a and shift c, (d,) float64 each; a stays 1 where it would not be positive."""
        count = max(self.count, 1)
        variance = self.mm - self.m.square() / count
        covariance = self.me - self.m * self.e / count
        varies = variance > 1e-12 * self.mm
        slope = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 0.0)
        scale = 1.0 + slope / (1.0 + ridge)
        # A weight's scale must be positive: a is folded into it.
        scale = torch.where(scale > 0.0, scale, 1.0)
        return scale, (self.e - (scale - 1.0) * self.m) / count

    def residual(self, scale: Tensor, shift: Tensor) -> float:
        """Sum of squares of e - (a - 1) m - c."""
        slope = scale - 1.0
        squares = self.ee + slope.square() * self.mm + self.count * shift.square()
        products = slope * self.me + shift * self.e - slope * shift * self.m
        return float((squares - 2.0 * products).sum())

    def r2(self, scale: Tensor, shift: Tensor) -> float:
        """1 - residual / sum of squares about the mean, all channels together."""
        total = float((self.ee - self.e.square() / max(self.count, 1)).sum())
        return 1.0 - self.residual(scale, shift) / total if total > 0.0 else 0.0


@dataclass(frozen=True)
class AffineFit:
    """Scale and shift, (d,) float64 each, and R^2 on the fitted and held-out tokens."""

    scale: Tensor
    shift: Tensor
    r2: float
    r2_held_out: float | None
    ridge: float | None

    def correction(self, m: Tensor) -> Tensor:
        """(a - 1) m + c, in m's shape (..., d) and dtype."""
        return ((self.scale - 1.0) * m.double() + self.shift).to(m.dtype)


def fit_affine(train: ChannelMoments, held_out: ChannelMoments | None) -> AffineFit:
    """The fit whose ridge is best on held-out tokens, refitted on all of them.

    Without held-out tokens, plain least squares.
    """
    if held_out is None:
        scale, shift = train.solve(0.0)
        return AffineFit(scale, shift, train.r2(scale, shift), None, None)
    _, ridge = min((held_out.residual(*train.solve(ridge)), ridge) for ridge in RIDGES)
    r2_held_out = held_out.r2(*train.solve(ridge))
    everything = train + held_out
    scale, shift = everything.solve(ridge)
    return AffineFit(scale, shift, everything.r2(scale, shift), r2_held_out, ridge)
