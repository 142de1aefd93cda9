"""The calibration batches of one rank, and what it knows of the others'."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from qwt_fx.batches.batch import Batch, Batches, add_to_digest, as_inputs, batch_size, check_batches
from qwt_fx.batches.ranks import Message, Ranks
from qwt_fx.errors import DataError

T = TypeVar("T")
Fitted = TypeVar("Fitted")


@dataclass(frozen=True)
class DistributedBatches(Iterable[Batch]):
    """Batches of which each rank holds every N-th; stands wherever a list of batches may.

    Attributes:
        batches: those of this rank, in order; batch 0 is the first of the first rank's.
        sizes: samples of every batch, all ranks' together.
        ranks: the processes that share.
    """

    batches: Sequence[Batch]
    sizes: list[int]
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        check_batches(self.sizes)
        if len(self.sizes) < self.ranks.world:
            raise DataError(
                f"{len(self.sizes)} calibration batches for {self.ranks.world} processes: each needs "
                "one at least; use a smaller --batch-size, more --calib-samples or fewer processes"
            )

    @classmethod
    def of(cls, batches: Batches) -> DistributedBatches:
        """Distributed batches as they are; a list of batches as those of a rank that is alone.

        Raises `DataError` for a generator, or no batch.
        """
        if isinstance(batches, DistributedBatches):
            return batches
        listed = check_batches(batches)
        return cls(listed, [batch_size(b) for b in listed])

    def map(self, change: Callable[[Batch], Batch]) -> DistributedBatches:
        """The same batches with other tensors in each."""
        return DistributedBatches([change(batch) for batch in self.batches], self.sizes, self.ranks)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches."""
        return iter(self.batches)

    @property
    def numbers(self) -> range:
        """The number of each of this rank's batches among all of them."""
        return self.ranks.numbers(len(self.sizes))

    @property
    def samples(self) -> int:
        """Samples of all batches."""
        return sum(self.sizes)

    def of_mine(self, every: Iterable[T]) -> list[T]:
        """Of one thing for each batch, those for this rank's."""
        listed = list(every)
        return [listed[number] for number in self.numbers]

    def fitted(self, kind: Callable[..., Fitted], make: Callable[[], Fitted]) -> Fitted:
        """A dataclass, `kind`, that the first rank makes of what all have sent it."""
        return kind(**self.ranks.from_first(lambda: vars(make())))

    def first_samples(self, count: int = 32) -> Batch:
        """The first samples of this rank's first batch."""
        first: Batch = tree_map_only(Tensor, lambda x: x[:count] if x.dim() else x, self.batches[0])
        return first

    def digest(self) -> str:
        """SHA-256 of every value of this rank's batches."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for value in tree_leaves(as_inputs(batch)):
                if isinstance(value, Tensor):
                    add_to_digest(digest, value)
                else:
                    digest.update(repr(value).encode())
        return digest.hexdigest()

    def in_order(self, messages: Callable[[int], Iterable[Message]]) -> Iterator[Message]:
        """On the first rank, what `messages(k)` yields for the k-th batch of each rank, in the order of
        all batches; nothing on the others, which must exhaust the iterator too.
        """
        return self.ranks.in_order(messages(k) for k in range(len(self.batches)))
