"""Global sampling of image-caption pairs over tar shards.

Every sample of every shard has nearly the same chance: a shard is drawn with probability
proportional to its bytes, then one of its samples not drawn before, uniformly. The draws are
independent, so a shard is walked when its first draw comes up and samples flow within seconds; with
bytes b_i and samples m_i of shard i, n draws find each of its samples with probability

    n * b_i / (sum_j b_j * m_i)

as long as no shard runs out. One that does leaves the draw, and its share goes to the others.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Sequence

from webdataset.shardlists import expand_urls

from qwt_fx.data import shard_index, stream_shard, tar_shard
from qwt_fx.data.sample_keys import USUAL, SampleKeys
from qwt_fx.data.samples import (
    SampleLocation,
    ScanCounts,
    complete_samples,
    dotted_names,
    random_order,
)
from qwt_fx.data.stream_shard import is_remote, must_stream
from qwt_fx.errors import ConfigError, DataError

log = logging.getLogger(__name__)

MAX_SHARDS = 1_000_000
# Streamed shards are read whole, so few of them must do; drawn by the seed.
STREAMED_AT_ONCE = 16

_BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)[^{}]*|([^{}]*))\}")


def expand(spec: str) -> list[str]:
    """Shards of a specification: brace ranges (`{0000..0575}`), sources joined by `::`.

    Returns:
        Paths and URLs in the order written, duplicates removed; `file:` is taken off.

    Raises:
        DataError: nothing given, unbalanced braces, or local files that do not exist: how many,
            and the first of them.
    """
    if sum(map(_expanded, spec.split("::"))) > MAX_SHARDS:
        raise DataError(f"{spec!r}: a brace range of more than {MAX_SHARDS} shards")
    try:
        urls: list[str] = expand_urls(spec)
    # braceexpand raises ValueError, webdataset asserts that ${NAME} is set as WDS_NAME.
    except (ValueError, AssertionError) as error:
        raise DataError(f"{spec!r}: cannot be expanded ({error})") from error
    shards = list(dict.fromkeys(re.sub(r"^file:(//)?", "", url.strip()) for url in urls))
    if not shards or not all(shards):
        raise DataError(f"{spec!r}: names no shard, wanted such as 'train-{{0000..0575}}.tar'")
    missing = [s for s in shards if not is_remote(s) and not os.path.isfile(s)]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        if folder := next((s for s in missing if os.path.isdir(s)), None):
            raise DataError(_not_shards(folder))
        hint = "; patterns with * are not expanded, use a brace range" if "*" in spec else ""
        raise DataError(f"{len(missing)} of {len(shards)} shards do not exist: {first}{hint}")
    if table := next((s for s in shards if s.lower().endswith((".csv", ".tsv"))), None):
        raise DataError(
            f"{table}: a table, wanted shards (.tar); for a table give --dataset-type csv"
        )
    return shards


def _not_shards(folder: str) -> str:
    """What a folder holds in the place of a shard, and how that is given."""
    tars = sorted(name for name in os.listdir(folder) if ".tar" in name or name.endswith(".tgz"))
    if tars:
        return (
            f"{folder}: a folder, wanted the shards in it by their names, such as "
            f"{os.path.join(folder, tars[0])}: a brace range {{000..031}} names many, :: joins them"
        )
    return (
        f"{folder}: a folder without shards, wanted .tar files; for class folders with images give "
        "--dataset-type imagefolder"
    )


def _expanded(source: str) -> int:
    """How many names the braces of one source stand for, before they fill memory."""
    sizes = (
        abs(int(last) - int(first)) + 1 if first else names.count(",") + 1
        for first, last, names in _BRACES.findall(source)
    )
    return math.prod(sizes)


def samples_in_order(
    shards: Sequence[str], counts: ScanCounts, keys: SampleKeys
) -> Iterator[SampleLocation]:
    """Every sample of every shard once, in the order written: nothing is drawn.

    `counts` is filled on the way, over all shards. Raises `DataError` as `sample_locations` does.
    """
    for shard in shards:
        one = ScanCounts()
        indexed = not must_stream(shard) and os.path.exists(shard_index.index_path(shard))
        for sample in _walk(shard, one, keys):
            if indexed:
                shard_index.check_headers(sample, one)
            yield sample
        counts.bytes_read += one.bytes_read
        counts.groups += one.groups
        counts.complete += one.complete


def _walk(shard: str, counts: ScanCounts, keys: SampleKeys) -> Iterator[SampleLocation]:
    """The samples of one shard, streamed, from its index or from its headers."""
    if must_stream(shard):
        return complete_samples(shard, stream_shard.groups(shard, counts, keys), counts, keys)
    if os.path.exists(shard_index.index_path(shard)):
        return complete_samples(shard, shard_index.read_groups(shard, counts), counts, keys)
    return complete_samples(shard, tar_shard.groups(shard, counts), counts, keys)


def sample_locations(
    shards: Sequence[str], n: int, seed: int, *, spare: int = 0, keys: SampleKeys = USUAL
) -> SampledShards:
    """Draw `n` samples, and up to `spare` more, from all of `shards`; `keys` say what a sample is.

    Reproducible from `seed` and the list of shards. Nothing is read before iteration.

    Raises:
        ConfigError: `n` < 1 or `spare` < 0.
        DataError: no shards, one that cannot be opened, or one of zero bytes. While iterating, a
            drawn shard that is damaged, cut off, has a stale index or holds no pairs.
    """
    if n < 1 or spare < 0:
        raise ConfigError(f"n = {n}, spare = {spare}: wanted n >= 1 and spare >= 0")
    return SampledShards(shards, n, seed, spare, keys)


class SampledShards(Iterator[SampleLocation]):
    """An iterator over drawn samples; each found at most once. Its counts grow while it runs.

    Attributes:
        shards_available: shards to draw from.
        shards_touched: shards drawn, and hence walked or streamed.
        streamed: how many of `shards_available` can only be streamed.
        bytes_read: of headers, indexes and streams; not of the members read later.
        incomplete: groups of files met that lack an image or a caption.
        hint: how names are split, where some of these show that it was not known.
        drawn: samples handed out so far, spare ones included.
        shortfall: by how many all shards together fall short of `n`; 0 until that is known.
    """

    def __init__(
        self, shards: Sequence[str], n: int, seed: int, spare: int, keys: SampleKeys
    ) -> None:
        self._n, self._spare, self._seed, self.keys = n, spare, seed, keys
        unique = list(dict.fromkeys(shards))
        if not unique:
            raise DataError("no shards to draw samples from")
        self.shards_available = len(unique)
        self.shards_touched = 0
        self.bytes_read = 0
        self.incomplete = 0
        self.hint = ""
        self.drawn = 0
        self.shortfall = 0
        self._active, self._held = self._weigh(unique)
        self.streamed = sum(shard.streamed for shard in self._active) + len(self._held)
        if self.streamed:
            log.warning(
                "%d of %d shards are compressed, pipe: or URL: each one drawn is read whole, "
                "%d of them at most unless more samples are needed",
                self.streamed, self.shards_available, min(self.streamed, STREAMED_AT_ONCE),
            )  # fmt: skip
        self._draws = self._draw()

    def __iter__(self) -> SampledShards:
        return self

    def __next__(self) -> SampleLocation:
        return next(self._draws)

    def _weigh(self, shards: list[str]) -> tuple[list[_Shard], list[_Shard]]:
        """The shards to draw from, weighted, and streamed ones held back until these run out."""
        bytes_of = {shard: _size(shard) for shard in shards if not is_remote(shard)}
        # A URL's size is unknown: take it for a typical one.
        mean = sum(bytes_of.values()) / len(bytes_of) if bytes_of else 1.0
        made = [
            _Shard(shard, f"{self._seed}:{i}", bytes_of.get(shard, mean))
            for i, shard in enumerate(shards)
        ]
        plain = [shard for shard in made if not shard.streamed]
        streamed = [shard for shard in made if shard.streamed]
        random.Random(f"{self._seed}:streamed").shuffle(streamed)
        now, held = streamed[:STREAMED_AT_ONCE], streamed[STREAMED_AT_ONCE:]
        for shard in now:  # they stand for those held back, too
            shard.weight *= len(streamed) / len(now)
        return plain + now, held

    def _draw(self) -> Iterator[SampleLocation]:
        """One sample a draw, until there are enough or no shard has any left."""
        rng = random.Random(f"{self._seed}:draws")
        wanted = self._n + self._spare
        cumulative = list(itertools.accumulate(shard.weight for shard in self._active))
        per_byte = wanted / cumulative[-1]
        while self.drawn < wanted:
            if not self._active:
                self._active = self._held[:STREAMED_AT_ONCE]
                del self._held[:STREAMED_AT_ONCE]
                cumulative = list(itertools.accumulate(shard.weight for shard in self._active))
            if not self._active:
                break
            shard = rng.choices(self._active, cum_weights=cumulative)[0]
            sample = self._take(shard, math.ceil(2 * per_byte * shard.weight) + 16)
            if sample is None:
                self._active.remove(shard)
                cumulative = list(itertools.accumulate(shard.weight for shard in self._active))
                continue
            self.drawn += 1
            yield sample
        self.shortfall = max(self._n - self.drawn, 0)

    def _take(self, shard: _Shard, expected: int) -> SampleLocation | None:
        """The shard's next sample; walks it first, or again where more is drawn than was kept."""
        if shard.total is None:
            self.shards_touched += 1
        if shard.total is None or len(shard.kept) <= shard.taken < shard.total:
            counts = ScanCounts()
            first = shard.total is None
            shard.walk(max(expected, 2 * shard.taken), counts, self.keys)
            self.bytes_read += counts.bytes_read
            self.incomplete += counts.groups - counts.complete if first else 0
            self.hint = self.hint or dotted_names(counts)
        if shard.taken >= len(shard.kept):
            return None
        sample = shard.kept[shard.taken]
        shard.taken += 1
        if shard.indexed:
            counts = ScanCounts()
            shard_index.check_headers(sample, counts)
            self.bytes_read += counts.bytes_read
        return sample


class _Shard:
    """A shard, and the beginning of a random order of its samples.

    Only the beginning is kept: with millions of pairs, a few hundred are drawn. A second walk with
    a larger `keep` finds the same order.
    """

    def __init__(self, path: str, seed: str, weight: float) -> None:
        self.path, self.seed, self.weight = path, seed, weight
        self.streamed = must_stream(path)
        self.indexed = not self.streamed and os.path.exists(shard_index.index_path(path))
        self.kept: list[SampleLocation] = []
        self.taken = 0
        self.total: int | None = None

    def walk(self, keep: int, counts: ScanCounts, keys: SampleKeys) -> None:
        """Find the first `keep` samples of the shard's random order; sets `kept` and `total`."""
        self.kept = random_order(_walk(self.path, counts, keys), keep, self.seed)
        self.total = counts.complete


def _size(shard: str) -> float:
    """Bytes of a local shard. Raises `DataError` when it cannot be found or is empty."""
    try:
        size = os.stat(shard).st_size
    except OSError as error:
        raise DataError(f"{shard}: cannot be opened ({error.strerror or error})") from error
    if size == 0:
        raise DataError(f"{shard}: the file is empty (0 bytes), wanted a tar; fetch it again")
    return float(size)
