"""Global sampling: every sample of every shard has nearly the same chance."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from shard_files import pairs, write_sparse_shard, write_tar

from qwt_fx.data.shards import STREAMED_AT_ONCE, expand, sample_locations
from qwt_fx.errors import ConfigError, DataError


def shard(path: Path, samples: int, image_size: int = 20_000) -> str:
    """A shard of equal samples; the images are never decoded here."""
    members = [
        (f"{path.stem}-{i:04d}.{extension}", data)
        for i in range(samples)
        for extension, data in (("jpg", b"\xff" * image_size), ("txt", b"a caption"))
    ]
    return write_tar(path, members)


def keys(shards: list[str], n: int, seed: int, spare: int = 0) -> list[str]:
    return [sample.key for sample in sample_locations(shards, n, seed, spare=spare)]


# --- expand


def test_brace_ranges_and_joined_sources_expand_in_order(tmp_path: Path) -> None:
    for name in ("a-00.tar", "a-01.tar", "b.tar"):
        (tmp_path / name).touch()
    spec = f"{tmp_path}/a-{{00..01}}.tar::file:{tmp_path}/b.tar::pipe:cat x.tar"
    assert expand(spec) == [
        f"{tmp_path}/a-00.tar",
        f"{tmp_path}/a-01.tar",
        f"{tmp_path}/b.tar",
        "pipe:cat x.tar",
    ]


def test_a_shard_named_twice_counts_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 2)
    assert expand(f"{path}::{path}") == [path]


def test_missing_shards_are_counted_and_the_first_named(tmp_path: Path) -> None:
    (tmp_path / "a-1.tar").touch()
    with pytest.raises(DataError, match=r"5 of 6 shards do not exist: .*a-0\.tar, .*a-2\.tar, "):
        expand(f"{tmp_path}/a-{{0..5}}.tar")


def test_a_glob_gets_a_hint() -> None:
    with pytest.raises(DataError, match="use a brace range"):
        expand("nowhere/*.tar")


@pytest.mark.parametrize("spec", ["", "a.tar::", "{a.tar", "${NOT_SET_ANYWHERE}/a.tar"])
def test_a_bad_specification_is_one_clear_error(spec: str) -> None:
    with pytest.raises(DataError):
        expand(spec)


def test_an_absurd_brace_range_is_refused_before_it_fills_memory() -> None:
    for spec in ("{0..99999}/{0..99999}.tar", "{a,b}" * 30, "a::{0..9999999}"):
        with pytest.raises(DataError, match="more than 1000000 shards"):
            expand(spec)
    many = [f"pipe:{i}" for i in range(3000)]
    assert expand("pipe:{0..999}::pipe:{1000..1999}::pipe:{2000..2999}") == many


# --- the draw


def test_inclusion_counts_over_200_seeds_pass_a_chi_square_test(tmp_path: Path) -> None:
    """Counts of every sample against its exact inclusion probability n * b_i / (B * m_i).

    Counts are not independent: n is fixed (negative correlation between shards), and within shard
    i two samples are both found with probability n (n-1) p_i^2 / (m_i (m_i - 1)), p_i = b_i / B.
    So the statistic whitens with the exact covariance, whose rank is M - 1 = 89. No shard can run
    out, as n = 6 does not exceed the smallest shard. Critical values: chi-square with 89 degrees
    of freedom at 0.001 and 0.999.
    """
    sizes, n, seeds = (6, 12, 24, 48), 6, 200
    shards = [shard(tmp_path / f"s{i}.tar", m) for i, m in enumerate(sizes)]
    share = [Path(path).stat().st_size for path in shards]
    p = [size / sum(share) for size in share]
    inclusion = torch.tensor(
        [n * p[i] / m for i, m in enumerate(sizes) for _ in range(m)], dtype=torch.float64
    )
    # "Nearly the same chance": only the tar's padding to 10 KiB is between them.
    assert inclusion.max() / inclusion.min() < 1.1

    owner = torch.tensor([i for i, m in enumerate(sizes) for _ in range(m)])
    both = n * (n - 1) * (inclusion / n)[:, None] * (inclusion / n)[None, :]
    m = torch.tensor(sizes, dtype=torch.float64)[owner]
    both = torch.where(owner[:, None] == owner[None, :], both * (m / (m - 1))[:, None], both)
    both.diagonal().copy_(inclusion)
    covariance = seeds * (both - inclusion[:, None] * inclusion[None, :])

    found = Counter(key for seed in range(seeds) for key in keys(shards, n, seed))
    names = [f"s{i}-{k:04d}" for i, size in enumerate(sizes) for k in range(size)]
    counts = torch.tensor([found[name] for name in names], dtype=torch.float64)
    assert counts.sum() == n * seeds
    deviation = counts - seeds * inclusion
    statistic = deviation @ torch.linalg.pinv(covariance, hermitian=True) @ deviation
    assert 53.4 < statistic < 136.0


def test_every_sample_once_and_the_shortfall_when_fewer_exist(tmp_path: Path) -> None:
    sizes = (1, 2, 40)
    shards = [shard(tmp_path / f"s{i}.tar", m) for i, m in enumerate(sizes)]
    drawn = sample_locations(shards, 100, seed=3)
    found = [sample.key for sample in drawn]
    assert len(found) == len(set(found)) == sum(sizes)
    assert (drawn.shortfall, drawn.drawn, drawn.shards_touched) == (57, 43, 3)


def test_a_shard_that_runs_out_gives_its_share_to_the_others(tmp_path: Path) -> None:
    big = shard(tmp_path / "big.tar", 2, image_size=500_000)
    small = shard(tmp_path / "small.tar", 50, image_size=1_000)
    drawn = sample_locations([big, small], 30, seed=0)
    found = [sample.key for sample in drawn]
    assert len(set(found)) == 30
    assert sum(key.startswith("big") for key in found) == 2
    assert drawn.shortfall == 0


def test_the_draw_is_reproducible_and_depends_on_the_seed(tmp_path: Path) -> None:
    shards = [shard(tmp_path / f"s{i}.tar", 20) for i in range(3)]
    assert keys(shards, 12, 1) == keys(shards, 12, 1)
    assert keys(shards, 12, 1) != keys(shards, 12, 2)


def test_spare_samples_follow_the_same_draw(tmp_path: Path) -> None:
    # Two shards of 300: 200 of the first are never kept in advance, so it is walked anew.
    shards = [shard(tmp_path / f"s{i}.tar", 300, image_size=100) for i in range(2)]
    with_spare = keys(shards, 50, 7, spare=500)
    assert with_spare[:50] == keys(shards, 50, 7)
    assert len(set(with_spare)) == 550


def test_nothing_is_walked_before_its_first_draw(tmp_path: Path) -> None:
    shards = [shard(tmp_path / f"s{i}.tar", 4) for i in range(30)]
    drawn = sample_locations(shards, 20, seed=1)
    assert (drawn.shards_touched, drawn.bytes_read) == (0, 0)
    next(drawn)
    assert (drawn.shards_available, drawn.shards_touched) == (30, 1)


def test_little_of_a_large_shard_is_read(tmp_path: Path) -> None:
    paths = [write_sparse_shard(tmp_path / f"s{i}.tar", 5_000, 40_000) for i in range(2)]
    total = sum(Path(path).stat().st_size for path in paths)
    drawn = sample_locations(paths, 8, seed=0)
    read = sum(sample.image[1] + sample.caption[1] for sample in drawn)
    assert total > 400e6
    assert drawn.shards_touched == 2
    assert drawn.bytes_read + read <= 0.03 * total


def bytes_read_by_this_process() -> int:
    """As the kernel counts them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads the kernel's counters")
def test_of_576_shards_of_5000_pairs_little_is_read(tmp_path: Path) -> None:
    """As large as CC3M: 2.9 million images of 40 kB. Few of the files are real, the others links."""
    real = [write_sparse_shard(tmp_path / f"real{i}.tar", 5_000, 40_000) for i in range(4)]
    for i in range(576):
        os.link(real[i % 4], tmp_path / f"s-{i:04d}.tar")
    shards = expand(f"{tmp_path}/s-{{0000..0575}}.tar")
    total = sum(Path(path).stat().st_size for path in shards)
    before, begun = bytes_read_by_this_process(), time.perf_counter()
    drawn = sample_locations(shards, 512, seed=1)
    samples = [next(drawn)]
    first = time.perf_counter() - begun
    samples += list(drawn)
    for sample in samples:
        with open(sample.shard, "rb", buffering=0) as file:
            file.seek(sample.image[0])
            assert len(file.read(sample.image[1])) == 40_000
    read = bytes_read_by_this_process() - before
    assert len(set(samples)) == 512
    assert total > 115e9
    assert read <= 0.03 * total
    assert first < 5.0


@pytest.mark.parametrize(("n", "spare"), [(0, 0), (1, -1)])
def test_numbers_out_of_range_are_refused(n: int, spare: int) -> None:
    with pytest.raises(ConfigError, match="wanted n >= 1"):
        sample_locations(["a.tar"], n, 0, spare=spare)


def test_no_shards_and_shards_of_zero_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards"):
        sample_locations([], 1, 0)
    (tmp_path / "zero.tar").touch()
    with pytest.raises(DataError, match=r"zero\.tar: the file is empty"):
        sample_locations([str(tmp_path / "zero.tar")], 1, 0)
    with pytest.raises(DataError, match=r"gone\.tar: cannot be opened"):
        sample_locations([str(tmp_path / "gone.tar")], 1, 0)


# --- what a shard must hold


def test_a_shard_without_captions_is_named_with_what_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.cls", b"3"), ("1.jpg", b"x")])
    with pytest.raises(DataError, match=r"a\.tar: none of its 2 samples has a caption; found .cls"):
        keys([path], 1, 0)


def test_a_shard_without_images_or_whole_pairs_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"x"), ("0.bmp", b"x")])
    with pytest.raises(DataError, match=r"none of its 1 samples has an image; found .bmp, .txt"):
        keys([path], 1, 0)
    path = write_tar(tmp_path / "b.tar", [("0.txt", b"x"), ("1.jpg", b"x")])
    with pytest.raises(DataError, match="both an image and a caption"):
        keys([path], 1, 0)


def test_incomplete_samples_are_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs([1, 2]), ("x.jpg", b"x"), ("__meta__", b"x")])
    drawn = sample_locations([path], 9, 0)
    assert {sample.key for sample in drawn} == {"000001", "000002"}
    assert drawn.incomplete == 1


def test_an_index_saves_the_walk_and_draws_the_same(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 50)
    walked = list(sample_locations([path], 10, 4))
    index = {
        "schema": 1,
        "size": Path(path).stat().st_size,
        "samples": [
            {
                "key": f"a-{i:04d}",
                # Each pair: header, 20,000 bytes in 40 blocks, header, caption in one block.
                "files": {"jpg": [i * 43 * 512 + 512, 20_000], "txt": [i * 43 * 512 + 42 * 512, 9]},
            }
            for i in range(50)
        ],
    }
    Path(f"{path}.index.json").write_text(json.dumps(index))
    assert list(sample_locations([path], 10, 4)) == walked


# --- streams


def test_compressed_shards_are_streamed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = write_tar(tmp_path / "a.tar", pairs(range(30)))
    packed = write_tar(tmp_path / "b.tar.gz", pairs(range(30, 60)), "w:gz")
    with caplog.at_level(logging.WARNING):
        drawn = sample_locations([plain, packed], 60, 5)
    assert "1 of 2 shards are compressed, pipe: or URL" in caplog.text
    assert {sample.key for sample in drawn} == {f"{i:06d}" for i in range(60)}
    assert drawn.streamed == 1
    assert drawn.bytes_read >= (tmp_path / "b.tar.gz").stat().st_size


def test_a_stream_draws_what_the_same_plain_shard_would(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(40)))
    streamed = list(sample_locations([f"pipe:cat '{path}'"], 12, 5))
    assert [sample.key for sample in streamed] == keys([path], 12, 5)
    assert streamed[0].read().captions[0] == f"number {int(streamed[0].key)}"


def test_of_many_streams_few_are_read_until_more_are_needed(tmp_path: Path) -> None:
    count = STREAMED_AT_ONCE + 4
    for i in range(count):
        write_tar(tmp_path / f"{i}.tar.gz", pairs([2 * i, 2 * i + 1]), "w:gz")
    shards = expand(f"{tmp_path}/{{0..{count - 1}}}.tar.gz")
    few = sample_locations(shards, 2 * STREAMED_AT_ONCE, 0)
    assert len(list(few)) == 2 * STREAMED_AT_ONCE
    assert few.shards_touched == STREAMED_AT_ONCE
    assert len(set(keys(shards, 2 * count + 5, 0))) == 2 * count
