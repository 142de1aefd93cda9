"""The sums every weight remedy of a layer reads: one pass over the calibration tokens.

With x the layer's quantized input and t what its output misses, t = wanted - (W x + b), the sums of 1,
x, t, x x^T, x t^T and t^2. A change of the weights by D and of the bias by c leaves t - D x - c.
Products are float32 over chunks of at most 4,096 tokens; the chunks are added in float64, in the
order of the batches. Solutions are float32 again: with a ridge of at least a thousandth of the mean
eigenvalue their rounding weighs less than the ridge does, and a 3072 x 3072 system takes half the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 4096
_SPLITS, _SPLIT_FROM = 4, 512
_ROWS = 256


@dataclass
class LayerSums:
    """Sums over tokens; inputs d, targets o. All float64.

    gram (d, d); cross (d, o); x (d,); t (o,); square: sum of t^2; count: tokens.
    """

    gram: Tensor
    cross: Tensor
    x: Tensor
    t: Tensor
    square: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> LayerSums:
        """No tokens yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zeros(inputs, inputs), zeros(inputs, outputs), zeros(inputs), zeros(outputs))

    @staticmethod
    def parts(x: Tensor, t: Tensor) -> Iterator[list[Tensor]]:
        """What tokens x (n, d), t (n, o), float32, add: chunk by chunk the fields, in their order."""
        for part, target in zip(torch.split(x, CHUNK), torch.split(t, CHUNK), strict=True):
            if len(part):
                yield [
                    _second_moment(part),
                    part.T @ target,
                    part.sum(dim=0).double(),
                    target.sum(dim=0).double(),
                    target.square().sum().double(),
                    torch.tensor(len(part)),
                ]

    def merge(self, part: Sequence[Tensor]) -> None:
        """Add what `parts` yielded for a chunk."""
        gram, cross, x, t, square, count = part
        self.gram += gram
        self.cross += cross
        self.x += x
        self.t += t
        self.square += float(square)
        self.count += int(count)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add tokens: x (n, d), t (n, o), float32."""
        for part in self.parts(x, t):
            self.merge(part)

    def absorb(self, other: LayerSums) -> None:
        """Take over all tokens of `other`, which has none afterwards: a wide Gram is 75 MB."""
        self.gram += other.gram
        self.cross += other.cross
        self.x += other.x
        self.t += other.t
        self.square += other.square
        self.count += other.count
        vars(other).update(vars(LayerSums.empty(0, 0, self.x.device)))

    @property
    def finite(self) -> bool:
        """Whether no sum overflowed or met a NaN."""
        # No other product of x with x or with t is larger than these (Cauchy-Schwarz).
        sums = (self.gram.diagonal(), self.x, self.t, torch.tensor(self.square))
        return all(bool(torch.isfinite(s).all()) for s in sums)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariance sums (d, d) and (d, o): what is left for a weight when a bias takes the means."""
        factor = -1.0 / max(self.count, 1)
        return (
            torch.addr(self.gram, self.x, self.x, alpha=factor),
            torch.addr(self.cross, self.x, self.t, alpha=factor),
        )

    def bias(self, change: Tensor) -> Tensor:
        """The change (o,) of the bias that leaves no mean error when the weights change by (o, d)."""
        return (self.t - change.to(torch.float64) @ self.x) / max(self.count, 1)

    def residual(self, change: Tensor | None, bias: Tensor) -> float:
        """Sum of squared errors left by changes of the weights (o, d) and the bias (o,).

        `None` is no change of the weights.
        """
        b = bias.double()
        if change is None:
            return self.square - 2.0 * float(b @ self.t) + self.count * float(b @ b)
        w = change.double()
        # A change repairs errors of its own size: float32 is exact enough for what it explains.
        unit = w.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        moved = ((w / unit).float() @ self.gram.float()).double() * unit
        explained = float((w * moved).sum()) - 2.0 * float((w.T * self.cross).sum())
        shift = 2.0 * float(b @ (w @ self.x)) - 2.0 * float(b @ self.t)
        return self.square + explained + shift + self.count * float(b @ b)


def _second_moment(x: Tensor) -> Tensor:
    """x^T x for x (n, d), computed above the diagonal in blocks and mirrored: 10/16 of the products."""
    d = x.shape[1]
    if d < _SPLIT_FROM:
        return x.T @ x
    gram = x.new_empty(d, d)
    edges = [d * part // _SPLITS for part in range(_SPLITS + 1)]
    for begin, end in itertools.pairwise(edges):
        torch.mm(x[:, begin:end].T, x[:, begin:], out=gram[begin:end, begin:])
        gram[end:, begin:end] = gram[begin:end, end:].T
    return gram


def refit(centred: tuple[Tensor, Tensor], ridge: float) -> Tensor | None:
    """The change (o, d) float64 of the weights that fits best, `None` where nothing can be solved.

    argmin over D of sum (t - D x - c)^2 + ridge mean(diag H) |D|^2 with c free, H the covariance sum of
    x: a ridge regression that pulls towards the weights as they are.

    centred: what `LayerSums.centred` returns.
    """
    gram, cross = centred
    mean = gram.diagonal().mean()
    if not bool(mean > 0.0):
        return None
    for dtype in (torch.float32, torch.float64):
        # In units of the mean eigenvalue: sums of large values would overflow float32. In parts, as
        # a quotient of the whole would be a float64 matrix more just where most is held.
        damped = torch.empty_like(gram, dtype=dtype)
        for target, rows in zip(torch.split(damped, _ROWS), torch.split(gram, _ROWS), strict=True):
            target.copy_(rows / mean)
        damped.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(damped)
        del damped  # as large as the Gram, and the solution takes a copy of its own
        if not int(info):
            return torch.cholesky_solve((cross / mean).to(dtype), factor).T.double()
    return None  # fewer tokens than channels and next to no ridge


def choose_refit(
    train: LayerSums, judge: LayerSums, ridges: tuple[float, ...]
) -> tuple[Tensor | None, float | None]:
    """The refit whose ridge is best on held-out tokens, solved again on every token, and that ridge.

    `(None, None)` where the held-out tokens are served best by no change but the bias's. `train` holds
    every token afterwards, `judge` none.
    """
    nothing = torch.zeros(len(train.t), len(train.x), dtype=torch.float64, device=train.x.device)
    unchanged = judge.residual(None, train.bias(nothing))
    errors: dict[float, float] = {}
    centred = [train.centred()]

    def error(ridge: float) -> float:
        if ridge not in errors:
            change = refit(centred[0], ridge)
            errors[ridge] = (
                math.inf if change is None else judge.residual(change, train.bias(change))
            )
        return errors[ridge]

    # The held-out error falls, then rises with the ridge: walk downhill from the middle.
    at = len(ridges) // 2
    for step in (-1, 1):
        while 0 <= at + step < len(ridges) and error(ridges[at + step]) < error(ridges[at]):
            at += step
    worth = error(ridges[at]) < unchanged
    centred.clear()
    train.absorb(judge)
    return (refit(train.centred(), ridges[at]), ridges[at]) if worth else (None, None)
