"""Token ids that stand in for activations, and what may be concluded from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Adding this to a score makes its softmax weight exactly 0 in float32; Hugging Face's masks hold the
# most negative number instead of -inf.
_HIDDEN = -1e30


@dataclass
class Tokens:
    """Token ids of an activation, same shape (int32, expanded where constant).

    Attention scores also have `columns`, the id of each key, and `causal` once masked.
    """

    ids: Tensor
    columns: Tensor | None = None
    causal: bool = False


class NotProved(Exception):
    """The graph does something the proof does not cover."""


def row_ids(tokens: Tokens) -> Tensor:
    """The id of each last-dimension row. Raises when a row mixes ids."""
    ids = tokens.ids
    first = ids[..., :1]
    expanded = ids.dim() > 0 and ids.stride(-1) == 0  # constant without looking
    if not expanded and not bool((ids == first).all()):
        raise NotProved("rows of an activation mix positions")
    return first.squeeze(-1)


def is_causal_mask(mask: Tensor, queries: Tensor, keys: Tensor) -> bool:
    """Whether every key behind its query, by position, is hidden. Shapes broadcast to the scores."""
    behind = keys > queries
    hidden = ~mask if mask.dtype is torch.bool else mask <= _HIDDEN
    try:
        return bool((hidden | ~behind).all())
    except RuntimeError:  # shapes that do not broadcast: not a mask of these scores
        return False


def check_same_samples(queries: Tensor, keys: Tensor, length: int, where: str) -> None:
    """Raise unless every query (..., l) meets keys (..., s) of its own sample alone."""
    samples = (keys // length)[..., :1]
    same_keys = bool((keys // length == samples).all())
    if not same_keys or not torch.equal(queries // length, samples.expand_as(queries)):
        raise NotProved(f"{where}: attention crosses samples")
