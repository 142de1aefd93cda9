"""Streaming least squares in float64: Y = [X 1] [W; b] from sums over batches.

QwT (arXiv 2411.13918) eq. 5 solves (X^T X)^-1 X^T Y with a float32 inverse. A block that reads a
LayerNorm output makes that matrix exactly singular, because sum_c (x_c - beta_c) / gamma_c = 0 ties
the channels to the constant column; float64 sums and a scaled ridge or a cut-off solve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from qwt_fx.numerics.stored_weight import Dense, Storage

# Ridge strengths relative to the mean eigenvalue of the centred Gram; 0 means a cut-off alone.
RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_EIGENVALUE_CUT = 1e-12  # relative to the largest eigenvalue: singular values below 1e-6

DENSE = Dense()


@dataclass
class Moments:
    """Sums over tokens of the augmented regressor z = [x 1] and the target y, float64.

    gram: (d + 1, d + 1) sum z z^T; cross: (d + 1, e) sum z y^T; square: sum of y^2; count: tokens.
    """

    gram: Tensor
    cross: Tensor
    square: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> Moments:
        """No tokens yet, `inputs` = d, `outputs` = e."""
        gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        return cls(gram, gram.new_zeros(inputs + 1, outputs))

    @staticmethod
    def part(x: Tensor, y: Tensor) -> list[Tensor]:
        """What tokens x (n, d), y (n, e) of any float dtype add: the fields, in their order."""
        z = torch.cat([x.double(), x.new_ones(x.shape[0], 1, dtype=torch.float64)], dim=1)
        target = y.double()
        return [z.T @ z, z.T @ target, target.square().sum(), torch.tensor(x.shape[0])]

    def merge(self, part: Sequence[Tensor]) -> None:
        """Add what `part` returned for some tokens."""
        gram, cross, square, count = part
        self.gram += gram
        self.cross += cross
        self.square += float(square)
        self.count += int(count)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x (n, d), y (n, e), any float dtype."""
        self.merge(self.part(x, y))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.count + other.count,
        )

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of x (d,) and y (e,)."""
        count = max(self.count, 1)
        return self.gram[-1, :-1] / count, self.cross[-1] / count

    def centred(self) -> tuple[Tensor, Tensor]:
        """Sums about the means: x x^T (d, d) and x y^T (d, e)."""
        mean_x, mean_y = self.means()
        return (
            self.gram[:-1, :-1] - self.count * torch.outer(mean_x, mean_x),
            self.cross[:-1] - self.count * torch.outer(mean_x, mean_y),
        )

    def total(self) -> float:
        """Sum of squares of y about its mean per output channel."""
        return self.square - float(self.cross[-1].square().sum()) / max(self.count, 1)

    def residual(self, weight: Tensor, bias: Tensor) -> float:
        """Sum of squared residuals of y - x W - b. weight (d, e), bias (e,)."""
        full = torch.cat([weight.double(), bias.double()[None]], dim=0)
        explained = float((full * (self.gram @ full)).sum()) - 2.0 * float(
            (full * self.cross).sum()
        )
        return self.square + explained

    def r2(self, weight: Tensor, bias: Tensor) -> float:
        """1 - residual / total over all output channels together; 0 where y does not vary."""
        total = self.total()
        return 1.0 - self.residual(weight, bias) / total if total > 0.0 else 0.0


@dataclass(frozen=True)
class Fit:
    """A fitted linear as it will be stored, and R^2 on the fitted and held-out tokens.

    factors: float64, their product is the weight (d, e); bias (e,) float64.
    """

    factors: tuple[Tensor, ...]
    bias: Tensor
    r2: float
    r2_held_out: float | None
    ridge: float | None

    @property
    def weight(self) -> Tensor:
        """The product of the factors, (d, e) float64."""
        return product(self.factors)


def product(factors: tuple[Tensor, ...]) -> Tensor:
    """Matrix product of factors in order."""
    return reduce(torch.matmul, factors)


def solve_minimum_norm(moments: Moments) -> tuple[Tensor, Tensor]:
    """Minimum-norm least squares on [x 1]: singular values below 1e-6 of the largest are cut."""
    values, vectors = torch.linalg.eigh(moments.gram)
    keep = values > values[-1] * _EIGENVALUE_CUT
    inverse = torch.where(keep, 1.0 / torch.where(keep, values, torch.ones_like(values)), 0.0)
    full = vectors @ (inverse[:, None] * (vectors.T @ moments.cross))
    return full[:-1], full[-1]


class _RidgePath:
    """Solutions for many ridges from one eigendecomposition of the centred Gram."""

    def __init__(self, moments: Moments) -> None:
        self._mean_x, self._mean_y = moments.means()
        self._gram, cross = moments.centred()
        self._values, self._vectors = torch.linalg.eigh(self._gram)
        self._projected = self._vectors.T @ cross

    def solve(self, ridge: float, storage: Storage) -> tuple[tuple[Tensor, ...], Tensor]:
        """Factors of the weight (d, e) and bias (e,) for a ridge relative to the mean eigenvalue."""
        values = self._values.clamp_min(0.0)
        keep = values > values[-1] * _EIGENVALUE_CUT
        added = ridge * values.mean()
        shifted = values + added
        inverse = torch.where(keep, 1.0 / torch.where(keep, shifted, torch.ones_like(values)), 0.0)
        weight = self._vectors @ (inverse[:, None] * self._projected)
        # With the ridge in its Gram, a weight of low rank minimizes the ridge objective, too.
        gram = self._gram.clone()
        gram.diagonal().add_(added)
        factors = storage(weight, gram)
        return factors, self._mean_y - self._mean_x @ product(factors)


def fit_original(moments: Moments, storage: Storage = DENSE) -> Fit:
    """Least squares judged on the tokens that fitted it, as published."""
    weight, bias = solve_minimum_norm(moments)
    factors = storage(weight, moments.centred()[0])
    stored = product(factors)
    if stored is not weight:
        mean_x, mean_y = moments.means()
        bias = mean_y - mean_x @ stored
    return Fit(factors, bias, moments.r2(stored, bias), None, None)


def fit_held_out(train: Moments, held_out: Moments, storage: Storage = DENSE) -> Fit:
    """Ridge regression whose strength is the best on held-out tokens, refitted on all of them.

    `r2_held_out` is that of the fit that never saw the held-out tokens. Both it and the choice of
    the ridge look at the weight as `storage` will keep it.
    """
    path = _RidgePath(train)
    candidates = []
    for ridge in RIDGES:
        factors, bias = path.solve(ridge, storage)
        candidates.append((held_out.residual(product(factors), bias), ridge))
    least, ridge = min(candidates)
    total = held_out.total()
    r2_held_out = 1.0 - least / total if total > 0.0 else 0.0
    everything = train + held_out
    factors, bias = _RidgePath(everything).solve(ridge, storage)
    return Fit(factors, bias, everything.r2(product(factors), bias), r2_held_out, ridge)
