"""Attention on token ids: a row keeps its query's id, if no key lies behind its query."""

from __future__ import annotations

import torch
from torch import Tensor

from qwt_fx.text.token_ids import NotProved, Tokens, row_ids

# Adding this to a score makes its softmax weight exactly 0 in float32; Hugging Face's masks hold the
# most negative number instead of -inf.
_HIDDEN = -1e30


def attend(
    query: Tokens, key: Tokens, value: Tokens, mask: Tensor | None, length: int, where: str
) -> Tokens:
    """The result of `scaled_dot_product_attention`: each row has its query's id.

    mask: bool or added to the scores; length: positions a sample; where: the node's name. Raises
    `NotProved` where samples meet or a key may lie behind its query.
    """
    queries, keys = row_ids(query), row_ids(key)
    _check_same_samples(queries, keys, length, where)
    if not torch.equal(keys, row_ids(value)):
        raise NotProved(f"{where}: keys and values are in different order")
    if not isinstance(mask, Tensor) or not _is_causal(mask, queries, keys, length):
        raise NotProved(f"{where}: attention is not causal")
    return _rows(queries, value.ids.shape[-1])


def score(query: Tokens, key: Tokens, length: int, where: str) -> Tokens:
    """Q K^T, (..., l, d) and (..., d, s): scores that remember their keys' ids."""
    queries, keys = row_ids(query), row_ids(Tokens(key.ids.transpose(-2, -1)))
    _check_same_samples(queries, keys, length, where)
    return Tokens(_rows(queries, keys.shape[-1]).ids, keys)


def mask_scores(scores: Tokens, mask: Tensor, length: int) -> Tokens:
    """Scores beside a mask, which makes them causal if it hides every key behind its query."""
    assert scores.columns is not None  # callers pass attention scores
    causal = scores.causal or _is_causal(mask, scores.ids[..., 0], scores.columns, length)
    return Tokens(scores.ids, scores.columns, causal)


def weigh(weights: Tokens, value: Tokens, where: str) -> Tokens:
    """The softmax of masked scores times the values."""
    if not weights.causal or weights.columns is None:
        raise NotProved(f"{where}: attention is not causal")
    if not torch.equal(weights.columns, row_ids(value)):
        raise NotProved(f"{where}: keys and values are in different order")
    return _rows(row_ids(weights), value.ids.shape[-1])


def causal_mask(queries: Tokens, keys: Tokens) -> Tensor:
    """What `is_causal=True` stands for, bool (l, s)."""
    shape = (queries.ids.shape[-2], keys.ids.shape[-2])
    return torch.ones(shape, dtype=torch.bool, device=queries.ids.device).tril()


def _rows(ids: Tensor, features: int) -> Tokens:
    return Tokens(ids[..., None].expand(*ids.shape, features))


def _is_causal(mask: Tensor, queries: Tensor, keys: Tensor, length: int) -> bool:
    """Whether every key behind its query, by position, is hidden. Shapes broadcast to the scores."""
    behind = (keys % length)[..., None, :] > (queries % length)[..., :, None]
    hidden = ~mask if mask.dtype is torch.bool else mask <= _HIDDEN
    try:
        return bool((hidden | ~behind).all())
    except RuntimeError:  # shapes that do not broadcast: not a mask of these scores
        return False


def _check_same_samples(queries: Tensor, keys: Tensor, length: int, where: str) -> None:
    """Raise unless every query (..., l) meets keys (..., s) of its own sample alone."""
    samples = (keys // length)[..., :1]
    same_keys = bool((keys // length == samples).all())
    if not same_keys or not torch.equal(queries // length, samples.expand_as(queries)):
        raise NotProved(f"{where}: attention crosses samples")
