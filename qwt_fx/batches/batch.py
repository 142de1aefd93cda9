"""One calibration batch, and a list of them: what users may give, and how it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from qwt_fx.errors import DataError

Item = TypeVar("Item")

Batch: TypeAlias = Tensor | Sequence[Any]
"""The positional inputs of a call: one tensor, or a tuple of what the model takes, tensors above all."""

Batches: TypeAlias = Iterable[Batch]
"""What is calibrated on: a list of batches, or whatever else can be walked more than once."""


def as_inputs(batch: Batch) -> tuple[Any, ...]:
    """A calibration batch as positional inputs: a tensor alone is a one-input model's batch."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, tuple | list):
        return tuple(batch)
    raise DataError(
        f"a calibration batch is a {type(batch).__name__}, wanted a tensor or a tuple of tensors"
    )


def check_batches(batches: Iterable[Item]) -> Sequence[Item]:
    """A re-iterable of batches as a sequence. Raises `DataError` for a generator or no batch."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches: got {type(batches).__name__}, wanted a list of tensors or tuples of tensors"
        )
    if iter(batches) is batches:
        raise DataError(
            "batches: got a generator, which can be walked once only, but calibration walks the "
            "batches more than once; give a list"
        )
    listed = batches if isinstance(batches, Sequence) else list(batches)
    if len(listed) == 0:
        raise DataError("batches: no calibration batch was given")
    return listed


def batch_size(batch: Batch) -> int:
    """Number of samples of a batch."""
    return int(as_inputs(batch)[0].shape[0])


def add_to_digest(digest: hashlib._Hash, value: Tensor) -> None:
    """Add a tensor's dtype, shape and values."""
    digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
