"""Image-caption data for retrieval: every sample of the shards once, in order, with all captions."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwt_fx.data.data import MAX_BAD_SHARE, Tokenizer
from qwt_fx.data.decoding import Decoded, Transform, Undecodable, decode_in_order
from qwt_fx.data.sample_keys import USUAL, SampleKeys
from qwt_fx.data.samples import CaptionedSample, ScanCounts
from qwt_fx.data.shards import expand, samples_in_order
from qwt_fx.errors import ConfigError, DataError


@dataclass(frozen=True)
class RetrievalBatch:
    """Some images and all of their captions.

    Attributes:
        images: (b, 3, h, w) float32.
        tokens: (c, context) int64, the captions image by image.
        captions: (b,) int64, how many each image has.
        identities: (c,) int64, equal where the token ids of two captions are equal.
        tried: samples read for this batch, those that cannot be used included.
        messages: what is wrong with those.
    """

    images: Tensor
    tokens: Tensor
    captions: Tensor
    identities: Tensor
    tried: int
    messages: list[str]


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
        keys: which members of a sample are its image and its captions.
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
    keys: SampleKeys = USUAL
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
        for batch in self.batches():
            self.count(batch.tried, batch.messages)
            if len(batch.images):
                yield batch
        self.judge()

    def batches(self, first: int = 0, step: int = 1) -> Iterator[RetrievalBatch]:
        """Every `step`-th batch from `first` on, also those without a usable sample.

        A batch is made of `batch_size` samples behind one another, usable or not, so that it is the
        same whoever reads the others. Nothing is counted: that is for `count` to do, batch by batch.
        """
        counts = ScanCounts()
        places = map(CaptionedSample.of, samples_in_order(self.shards, counts, self.keys))
        rest = itertools.islice(places, self.tried, None)
        chosen = _slices(rest, self.batch_size, first, step)
        pending: list[Decoded | Undecodable] = []
        with closing(decode_in_order(chosen, self.transform, self.workers)) as results:
            for result in results:
                pending.append(result)
                if len(pending) == self.batch_size:
                    yield self._batch(pending)
                    pending = []
        if pending:
            yield self._batch(pending)
        self.incomplete = counts.groups - counts.complete

    def count(self, tried: int, messages: list[str]) -> None:
        """Take note of a batch's samples, the batches being in order."""
        self.tried += tried
        self.skipped += len(messages)
        self.messages += messages[: 3 - len(self.messages)]

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

    def judge(self) -> None:
        """Raise `DataError` when too many samples were skipped to call this an evaluation."""
        if self.skipped > MAX_BAD_SHARE * self.tried:
            raise DataError(
                f"{self.spec}: {self.skipped} of {self.tried} samples cannot be decoded, more than "
                "10 %; the first: " + "; ".join(self.messages) + ". Is this the right data?"
            )

    def _batch(self, results: list[Decoded | Undecodable]) -> RetrievalBatch:
        pending = [r for r in results if isinstance(r, Decoded)]
        bad = [r for r in results if isinstance(r, Undecodable)]
        messages = [f"{r.where}: {r.reason}" for r in bad]
        if not pending:
            none = torch.empty(0, dtype=torch.int64)
            return RetrievalBatch(torch.empty(0), none, none, none, len(results), messages)
        shapes = {pair.image.shape: None for pair in pending}
        if len(shapes) > 1:
            raise DataError(
                f"{self.spec}: the transform returned images of {' and '.join(map(str, shapes))}, "
                "wanted one size"
            )
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
            tried=len(results),
            messages=messages,
        )


def _slices(
    places: Iterator[CaptionedSample], size: int, first: int, step: int
) -> Iterator[CaptionedSample]:
    """Every `step`-th run of `size` places, from number `first` on."""
    for number in itertools.count():
        run = list(itertools.islice(places, size))
        if not run:
            return
        if number % step == first:
            yield from run


def _identities(tokens: Tensor) -> Tensor:
    """A 64-bit digest of each row (c, context) -> (c,) int64."""
    rows = tokens.contiguous().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
