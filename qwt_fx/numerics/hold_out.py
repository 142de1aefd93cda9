"""Which calibration samples judge a fit instead of making it."""

from __future__ import annotations

import torch
from torch import Tensor


def held_out_samples(total: int, fraction: float) -> Tensor:
    """Which of `total` samples are held out, bool (total,): evenly spread, at least one of them."""
    if fraction <= 0.0:
        return torch.zeros(total, dtype=torch.bool)
    marks = torch.floor(torch.arange(total + 1, dtype=torch.float64) * fraction)
    chosen = marks[1:] > marks[:-1]
    if not bool(chosen.any()):
        chosen[-1] = True
    return chosen
