"""Calibration data: image-caption pairs drawn by a seed, decoded into batches in memory."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwt_fx.batches.kept_batches import KeptBatches
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.data.classes import ClassPrompts, folder_caption
from qwt_fx.data.decoding import Decoded, Transform, Undecodable, decode_in_order
from qwt_fx.data.imagefolder import list_images, read_csv
from qwt_fx.data.sample_keys import USUAL, SampleKeys
from qwt_fx.data.samples import FilePair, PairSource, random_order
from qwt_fx.data.shards import SampledShards, expand, sample_locations
from qwt_fx.errors import ConfigError, DataError

DATASET_TYPES = ("webdataset", "imagefolder", "csv")
MAX_BAD_SHARE = 0.1

Tokenizer = Callable[[list[str]], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationData:
    """Calibration batches and where they came from.

    Attributes:
        batches: (images (B, 3, H, W) float32, texts (B, context) int64); the last may be smaller.
        samples: pairs in all batches.
        skipped_samples: pairs drawn that could not be decoded.
        shards: shards available; 0 unless webdataset.
        shards_touched: shards drawn from; 0 unless webdataset.
        bytes_read: bytes of headers, indexes, images and captions read.
        notes: sentences that the user should read.
        captioned: every pair has a caption; the texts of others are those of an empty one.
    """

    batches: Sequence[tuple[Tensor, Tensor]]
    samples: int
    skipped_samples: int
    shards: int
    shards_touched: int
    bytes_read: int
    notes: list[str]
    captioned: bool = True


def load_calibration(
    spec: str,
    *,
    dataset_type: str = "webdataset",
    transform: Transform,
    tokenizer: Tokenizer,
    samples: int,
    batch_size: int,
    seed: int = 1,
    workers: int = 0,
    class_prompts: ClassPrompts | None = None,
    progress: Progress | None = None,
    store: ValueStore | None = None,
    keys: SampleKeys = USUAL,
) -> CalibrationData:
    """Draw, read, decode and tokenize `samples` pairs; the same for any number of `workers`.

    A pair that cannot be decoded is replaced by the next of the same draw while there is one.

    Args:
        spec: shards ("webdataset"), a directory ("imagefolder") or a file ("csv").
        dataset_type: one of `DATASET_TYPES`.
        transform: PIL RGB image to a (3, H, W) tensor, deterministic.
        tokenizer: list of B texts to (B, context) token ids.
        samples, batch_size: pairs in all, and a batch.
        seed: decides which pairs, and their order.
        workers: decoding processes; 0 decodes in this one.
        class_prompts: for "imagefolder": captions are prompts of the classes; without it, they
            are the folder names as words.
        progress: called as progress(done, total) after each pair.
        store: keeps the batches; by default a list in memory.
        keys: members of a shard's samples, or columns of a csv file; by default the usual ones.

    Raises:
        ConfigError: a number out of range or an unknown dataset type.
        DataError: missing or damaged data, no usable pair, or more than 10 % of the pairs bad.
    """
    for name, value, least in (("samples", samples, 1), ("batch_size", batch_size, 1),
                               ("workers", workers, 0)):  # fmt: skip
        if value < least:
            raise ConfigError(f"{name}: got {value}, wanted at least {least}")
    # As many as may be bad before the share of bad ones is an error.
    spare = samples // 9 + 1
    pairs = _draw(spec, dataset_type, samples, spare, seed, class_prompts, keys)
    batches: list[tuple[Tensor, Tensor]] | KeptBatches
    batches = [] if store is None else KeptBatches(store)
    collected = _Collected(spec, samples, batch_size, tokenizer, progress, batches)
    while (missing := samples - collected.good) > 0:
        before = collected.tried
        chunk = itertools.islice(pairs, missing)
        # A handful of replacements is not worth starting processes for.
        processes = workers if missing > 4 * workers else 0
        with closing(decode_in_order(chunk, transform, processes)) as results:
            for result in results:
                collected.add(result)
        if collected.tried == before:
            break
    collected.finish()
    shards = pairs if isinstance(pairs, SampledShards) else None
    return CalibrationData(
        batches=collected.batches,
        samples=collected.good,
        skipped_samples=len(collected.bad),
        shards=shards.shards_available if shards else 0,
        shards_touched=shards.shards_touched if shards else 0,
        bytes_read=collected.bytes_read + (shards.bytes_read if shards else 0),
        notes=[*_shard_notes(shards), *collected.notes()],
        captioned=collected.captioned,
    )


def _draw(
    spec: str,
    dataset_type: str,
    samples: int,
    spare: int,
    seed: int,
    class_prompts: ClassPrompts | None,
    keys: SampleKeys,
) -> Iterator[PairSource]:
    """The pairs drawn, spare ones last."""
    if dataset_type == "webdataset":
        return sample_locations(expand(spec), samples, seed, spare=spare, keys=keys)
    if dataset_type == "imagefolder":
        if keys.image or keys.caption:
            raise ConfigError(
                "--image-key and --caption-key: name members of shards or columns of a csv file; an "
                "imagefolder has neither, leave them out"
            )
        images = list_images(spec)
        files = random_order(images.files, samples + spare, f"{seed}:images")
        captions = _captions(images.classes, class_prompts, spec, seed)
        return iter([FilePair(path, captions(label)) for path, label in files])
    if dataset_type == "csv":
        return iter(random_order(read_csv(spec, keys), samples + spare, f"{seed}:images"))
    raise ConfigError(f"dataset type: got {dataset_type!r}, wanted one of {DATASET_TYPES}")


def _captions(
    folders: tuple[str, ...], class_prompts: ClassPrompts | None, spec: str, seed: int
) -> Callable[[int], str]:
    """A function from class index to a caption."""
    if class_prompts is None:
        return lambda label: folder_caption(folders[label])
    if class_prompts.folders != len(folders):
        raise DataError(
            f"{os.fspath(spec)}: {class_prompts.folders} class names for {len(folders)} class "
            "folders; wanted one for each folder, in sorted order"
        )
    rng = random.Random(f"{seed}:captions")
    return lambda label: rng.choice(class_prompts.prompts(class_prompts.class_of(label)))


def _shard_notes(shards: SampledShards | None) -> Iterator[str]:
    """What the user should know about the shards drawn from."""
    if shards is None:
        return
    if shards.streamed:
        yield (
            f"{shards.streamed} of {shards.shards_available} shards are compressed, pipe: or URL: "
            f"those drawn were read whole ({shards.shards_touched} shards touched in all)"
        )
    if shards.incomplete:
        yield (
            f"{shards.incomplete} samples of the shards drawn from were passed over: they lack an "
            f"image{' or a caption' * shards.keys.captioned}{shards.hint}"
        )


@dataclass
class _Collected:
    """Pairs on their way into batches."""

    spec: str
    wanted: int
    batch_size: int
    tokenizer: Tokenizer
    progress: Progress | None
    batches: list[tuple[Tensor, Tensor]] | KeptBatches
    pending: list[Decoded] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    good: int = 0
    bytes_read: int = 0
    captioned: bool = True

    @property
    def tried(self) -> int:
        """Pairs read so far."""
        return self.good + len(self.bad)

    def add(self, result: Decoded | Undecodable) -> None:
        """Take one result. Raises `DataError` once too many are bad or image sizes differ."""
        self.bytes_read += result.bytes_read
        if isinstance(result, Undecodable):
            self.bad.append(f"{result.where}: {result.reason}")
            # Even if every replacement were good: no need to read on.
            if len(self.bad) > MAX_BAD_SHARE * (self.wanted + len(self.bad)):
                raise self._too_many_bad()
            return
        self.shape = self.shape or result.image.shape
        if result.image.shape != self.shape:
            raise DataError(
                f"{self.spec}: the transform returned images of {self.shape} and "
                f"{result.image.shape}, wanted one size"
            )
        self.pending.append(result)
        self.good += 1
        self.captioned = self.captioned and bool(result.captions)
        if len(self.pending) == self.batch_size:
            self._flush()
        if self.progress is not None:
            self.progress(self.good, self.wanted)

    def finish(self) -> None:
        """Make the last batch. Raises `DataError` when nothing is left or too much was bad."""
        if self.bad and (not self.good or len(self.bad) > MAX_BAD_SHARE * self.tried):
            raise self._too_many_bad()
        if not self.good:
            raise DataError(f"{self.spec}: holds no image-caption pairs, wanted at least one")
        if self.pending:
            self._flush()

    def notes(self) -> Iterator[str]:
        """What the user should know about the pairs."""
        if self.bad:
            yield (
                f"{len(self.bad)} of {self.tried} samples could not be decoded and were skipped: "
                + "; ".join(self.bad[:3])
            )
        if self.good < self.wanted:
            yield f"asked for {self.wanted} samples, found {self.good}: using these {self.good}"

    def _flush(self) -> None:
        """Stack and tokenize the pending pairs."""
        texts = self.tokenizer([pair.caption for pair in self.pending])
        if texts.ndim != 2 or len(texts) != len(self.pending):
            raise DataError(
                f"the tokenizer returned {tuple(texts.shape)}, wanted "
                f"({len(self.pending)}, context)"
            )
        images = torch.from_numpy(np.stack([pair.image for pair in self.pending]))
        self.batches.append((images, texts.to(torch.int64)))
        self.pending = []

    def _too_many_bad(self) -> DataError:
        return DataError(
            f"{self.spec}: {len(self.bad)} of {self.tried} samples read so far cannot be decoded, "
            f"more than 10 % of the {self.wanted} asked for; the first: "
            + "; ".join(self.bad[:3])
            + ". Is this the right data?"
        )
