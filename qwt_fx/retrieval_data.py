"""Image-caption data for retrieval: every sample of the shards once, in order, with all captions."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwt_fx.data import MAX_BAD_SHARE
from qwt_fx.decoding import Decoded, Transform, Undecodable, decode_in_order
from qwt_fx.errors import ConfigError, DataError
from qwt_fx.samples import CaptionedSample, ScanCounts
from qwt_fx.shards import expand, samples_in_order

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class RetrievalBatch:
    """Some images and all of their captions.

    Attributes:
        images: (b, 3, h, w) float32.
        tokens: (c, context) int64, the captions image by image.
        captions: (b,) int64, how many each image has.
        identities: (c,) int64, equal where the token ids of two captions are equal.
        tried: samples read so far in all, those that cannot be used included.
        skipped: how many of these cannot be used.
    """

    images: Tensor
    tokens: Tensor
    captions: Tensor
    identities: Tensor
    tried: int
    skipped: int


@dataclass
class RetrievalReader:
    """One walk through retrieval data; iterate it once.

    A sample that cannot be decoded is skipped and counted, as in calibration; `finish` then says
    whether that is too much.

    Attributes:
        spec: shards, brace ranges, joined by `::`.
        transform: PIL RGB image to a (3, H, W) tensor, deterministic.
        tokenizer: list of texts to (n, context) token ids.
        batch_size: images a batch.
        workers: decoding processes; 0 decodes in this one.
        tried, skipped: samples read and skipped so far; set before the walk to go on behind
            the first `tried` samples.
        messages: what is wrong with the first few skipped ones.
        incomplete: groups of files without an image or a caption, known after the walk.
    """

    spec: str
    transform: Transform
    tokenizer: Tokenizer
    batch_size: int
    workers: int = 0
    tried: int = 0
    skipped: int = 0
    messages: list[str] = field(default_factory=list)
    incomplete: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError(
                f"batch_size {self.batch_size}, workers {self.workers}: wanted >= 1 and >= 0"
            )
        self.shards = expand(self.spec)

    def __iter__(self) -> Iterator[RetrievalBatch]:
        """Batches in the order of the shards. Raises `DataError` for damaged shards."""
        counts = ScanCounts()
        places = map(CaptionedSample.of, samples_in_order(self.shards, counts))
        rest = itertools.islice(places, self.tried, None)
        pending: list[Decoded] = []
        with closing(decode_in_order(rest, self.transform, self.workers)) as results:
            for result in results:
                self.tried += 1
                if isinstance(result, Undecodable):
                    self._skip(result)
                    continue
                if pending and result.image.shape != pending[0].image.shape:
                    raise DataError(
                        f"{self.spec}: the transform returned images of {pending[0].image.shape} "
                        f"and {result.image.shape}, wanted one size"
                    )
                pending.append(result)
                if len(pending) == self.batch_size:
                    yield self._batch(pending)
                    pending = []
        if pending:
            yield self._batch(pending)
        self.incomplete = counts.groups - counts.complete
        self._judge()

    def notes(self) -> Iterator[str]:
        """What the user should know, after the walk."""
        if self.incomplete:
            yield f"{self.incomplete} samples were passed over: they lack an image or a caption"
        if self.skipped:
            first = "; ".join(self.messages) or "all of them before the interruption"
            yield (
                f"{self.skipped} of {self.tried} samples could not be decoded and were skipped: "
                + first
            )

    def _skip(self, result: Undecodable) -> None:
        self.skipped += 1
        if len(self.messages) < 3:
            self.messages.append(f"{result.where}: {result.reason}")

    def _judge(self) -> None:
        """Raise `DataError` when too many samples were skipped to call this an evaluation."""
        if self.skipped > MAX_BAD_SHARE * self.tried:
            raise DataError(
                f"{self.spec}: {self.skipped} of {self.tried} samples cannot be decoded, more than "
                "10 %; the first: " + "; ".join(self.messages) + ". Is this the right data?"
            )

    def _batch(self, pending: list[Decoded]) -> RetrievalBatch:
        texts = [caption for pair in pending for caption in pair.captions]
        tokens = self.tokenizer(texts).to(torch.int64)
        if tokens.ndim != 2 or len(tokens) != len(texts):
            raise DataError(
                f"the tokenizer returned {tuple(tokens.shape)}, wanted ({len(texts)}, context)"
            )
        return RetrievalBatch(
            images=torch.from_numpy(np.stack([pair.image for pair in pending])),
            tokens=tokens,
            captions=torch.tensor([len(pair.captions) for pair in pending]),
            identities=_identities(tokens),
            tried=self.tried,
            skipped=self.skipped,
        )


def _identities(tokens: Tensor) -> Tensor:
    """A 64-bit digest of each row (c, context) -> (c,) int64."""
    rows = tokens.contiguous().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
