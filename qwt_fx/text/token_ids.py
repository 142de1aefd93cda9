"""Token ids that stand in for activations, what may be concluded from them, and by which operators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

ELEMENTWISE = frozenset(
    {
        aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor,
        aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.gelu.default,
        aten.sigmoid.default, aten.silu.default, aten.relu.default, aten.tanh.default,
        aten.erf.default, aten.pow.Tensor_Scalar, aten.to.dtype, aten.clone.default,
        aten.contiguous.default,
    }
)  # fmt: skip
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
SAME_IDS = VIEWS | {aten.reshape.default, aten.to.dtype, aten.clone.default}
# What these return depends on the shape of their tensor argument alone.
FOLLOWERS = frozenset({aten.eq.Scalar, aten.reshape.default, aten.logical_and.default})
READ_SHAPE = frozenset(
    {
        aten.sym_size.int, aten.new_full.default, aten.new_zeros.default, aten.new_ones.default,
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    }
)  # fmt: skip


@dataclass
class Tokens:
    """Token ids of an activation, same shape (int32, expanded where constant).

    Attention scores also have `columns`, the id of each key, and `causal` once masked.
    """

    ids: Tensor
    columns: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class TokenMask:
    """Rows that matter, for the nodes asked about.

    Attributes:
        rows: what a node stands for (`Correspondence.name_of`) -> bool (rows,), rows = all dimensions
            but the last, flattened.
        positions: the same -> position of each row, (rows,) int.
        reason: why no mask applies; `None` when it does.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, Tensor] = field(default_factory=dict)
    reason: str | None = None

    def counting(self, name: str, *, behind_end: bool, first: bool) -> Tensor | None:
        """Which rows of the nodes of a name count, bool (rows,); `None` for all of them.

        behind_end: leave out positions behind the end of a text where they provably cannot matter.
        first: whether position 0 counts. It does not where attention alone reads it, and constants
            were put in its place there; its error is nobody's then, and may exceed all others.
        """
        rows = self.rows.get(name) if behind_end else None
        if first or name not in self.positions:
            return rows
        moving = self.positions[name] != 0
        return moving if rows is None else rows & moving


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


def follows_first(node: Node, source: Node, by_value: set[Node], by_first: set[Node]) -> bool:
    """Whether only the id at position 0 of each sample decides the value: no later one does."""
    if node.target is aten.select.int and node.args[0] is source:
        return node.args[1:] == (1, 0)
    reads = [n for n in node.all_input_nodes if n in by_value or n in by_first]
    return node.target in FOLLOWERS and bool(reads) and by_first.issuperset(reads)


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
