"""Batches of tensors in a store: each is read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwt_fx.batches.value_store import Kept, ValueStore


class KeptBatches(Sequence[tuple[Tensor, Tensor]]):
    """Batches on the disk where the store has a budget, in memory where it has none.

    They are read only a few times in a calibration, activations many times: memory is for those.
    """

    def __init__(self, store: ValueStore) -> None:
        self._store = store
        self._batches: list[tuple[Kept, ...]] = []

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, Tensor]], store: ValueStore) -> KeptBatches:
        """Some batches, kept."""
        kept = cls(store)
        for batch in batches:
            kept.append(batch)
        return kept

    def append(self, batch: tuple[Tensor, Tensor]) -> None:
        """Keep one more batch."""
        kept = tuple(self._store.keep(tensor, in_memory=False) for tensor in batch)
        self._batches.append(kept)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return tuple(tensor.load() for tensor in self._batches[index])

    def column(self, index: int, device: str | torch.device) -> Sequence[tuple[Tensor]]:
        """One tensor of each batch alone, as a model's only input."""
        return _Column([batch[index] for batch in self._batches], device)


class _Column(Sequence[tuple[Tensor]]):
    def __init__(self, tensors: list[Kept], device: str | torch.device) -> None:
        self._tensors, self._device = tensors, device

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: Any) -> Any:
        return (self._tensors[index].load().to(self._device),)
