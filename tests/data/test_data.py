"""Calibration data, end to end from files to batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shard_files import CONTEXT, image_bytes, pairs, tokenizer, transform, words, write_tar

from qwt_fx.data.classes import ClassPrompts
from qwt_fx.data.data import CalibrationData, load_calibration
from qwt_fx.errors import ConfigError, DataError


def load(spec: object, samples: int = 20, **options: object) -> CalibrationData:
    defaults = {"transform": transform, "tokenizer": tokenizer, "batch_size": 8, "seed": 1}
    return load_calibration(str(spec), samples=samples, **(defaults | options))  # type: ignore[arg-type]


def found(data: CalibrationData) -> list[tuple[int, str]]:
    """(value of the image, caption) of every pair in order."""
    return [
        (int(image[0, 0, 0]), words(text))
        for images, texts in data.batches
        for image, text in zip(images, texts, strict=True)
    ]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for i in range(3):
        write_tar(tmp_path / f"s{i}.tar", pairs(range(40 * i, 40 * i + 40)))
    return f"{tmp_path}/s{{0..2}}.tar"


def spoil(tmp_path: Path, bad: int, good: int) -> str:
    """A shard with `bad` undecodable images among its first samples."""
    members = [(name, b"no image" if name.endswith("png") else d) for name, d in pairs(range(bad))]
    return write_tar(tmp_path / "spoiled.tar", members + pairs(range(bad, bad + good)))


def test_batches_hold_images_with_their_own_captions(shards: str) -> None:
    data = load(shards)
    assert [(tuple(x.shape), tuple(t.shape)) for x, t in data.batches] == [
        ((8, 3, 8, 8), (8, CONTEXT)),
        ((8, 3, 8, 8), (8, CONTEXT)),
        ((4, 3, 8, 8), (4, CONTEXT)),
    ]
    assert (data.batches[0][0].dtype, data.batches[0][1].dtype) == (torch.float32, torch.int64)
    got = found(data)
    assert len(set(got)) == 20
    assert all(caption == f"number {value}" for value, caption in got)
    assert (data.samples, data.skipped_samples, data.shards, data.shards_touched) == (20, 0, 3, 3)
    assert data.notes == []
    assert data.bytes_read > 20 * len(image_bytes(1))


def test_any_number_of_workers_gives_the_same(tmp_path: Path, shards: str) -> None:
    spec = f"{shards}::{spoil(tmp_path, 4, 60)}"
    alone = load(spec, 60, workers=0)
    assert alone.skipped_samples > 0
    for workers in (1, 2):
        shared = load(spec, 60, workers=workers)
        assert found(shared) == found(alone)
        assert (shared.bytes_read, shared.notes) == (alone.bytes_read, alone.notes)


def test_the_seed_decides(shards: str) -> None:
    assert found(load(shards)) == found(load(shards))
    assert found(load(shards)) != found(load(shards, seed=2))


def test_bad_samples_are_replaced_counted_and_said(tmp_path: Path) -> None:
    data = load(spoil(tmp_path, 3, 57), 50)
    assert (data.samples, 0 < data.skipped_samples <= 3) == (50, True)
    assert min(value for value, _ in found(data)) >= 3
    assert f"{data.skipped_samples} of {50 + data.skipped_samples} samples" in data.notes[0]
    assert "spoiled.tar: sample '00000" in data.notes[0]


def test_bad_samples_that_cannot_be_replaced_are_a_shortfall(tmp_path: Path) -> None:
    data = load(spoil(tmp_path, 2, 28), 30)
    assert (data.samples, data.skipped_samples) == (28, 2)
    assert data.notes[1] == "asked for 30 samples, found 28: using these 28"


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_a_tenth_bad_is_an_error(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"\d of \d+ samples .* the first: .*UnidentifiedImage"):
        load(spoil(tmp_path, 12, 48), 60, workers=workers)
    # A tenth is not more than a tenth: all 20 are tried, 2 of them are bad.
    assert load(spoil(tmp_path, 2, 18), 30).skipped_samples == 2
    with pytest.raises(DataError, match=r"3 of \d+ samples read so far"):
        load(spoil(tmp_path, 3, 17), 20)


def test_nothing_but_bad_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 samples"):
        load(spoil(tmp_path, 1, 0), 30)


def test_fewer_pairs_than_asked_for_is_said(shards: str) -> None:
    data = load(shards, 500)
    assert data.samples == 120
    assert data.notes == ["asked for 500 samples, found 120: using these 120"]


def test_a_compressed_shard_gives_all_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", pairs(range(30)), "w:gz")
    data = load(path, 30, workers=2)
    assert sorted(found(data)) == [(i, f"number {i}") for i in range(30)]
    assert data.bytes_read == Path(path).stat().st_size
    assert "1 of 1 shards are compressed" in data.notes[0]


def test_json_captions_and_samples_without_one(tmp_path: Path) -> None:
    members = [("0.png", image_bytes(7)), ("0.json", b'{"caption": "seven"}')]
    data = load(write_tar(tmp_path / "a.tar", [*members, ("1.png", image_bytes(8))]), 1)
    assert found(data) == [(7, "seven")]
    assert data.notes == [
        "1 samples of the shards drawn from were passed over: they lack an image or a caption"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_ends_the_draw(tmp_path: Path, workers: int) -> None:
    path = Path(write_tar(tmp_path / "a.tar", pairs(range(9))))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"a\.tar: .*cut off"):
        load(path, workers=workers)


def test_csv(tmp_path: Path) -> None:
    rows = ["filepath\ttitle"]
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
        rows.append(f"{i}.png\tnumber {i}")
    rows += ["gone.png\tno such image", "3.png\t "]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    data = load(tmp_path / "list.csv", 100, dataset_type="csv")
    assert sorted(found(data)) == [(i, f"number {i}") for i in range(40)]
    assert (data.skipped_samples, data.shards, data.shards_touched) == (2, 0, 0)
    assert "FileNotFoundError" in data.notes[0]
    assert "caption is empty" in data.notes[0]
    some = load(tmp_path / "list.csv", 10, dataset_type="csv", seed=4)
    assert found(some) != found(load(tmp_path / "list.csv", 10, dataset_type="csv", seed=5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(30):
        path = tmp_path / "val" / ("red_three" if i < 20 else "zebra") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(i))
    return tmp_path / "val"


def test_imagefolder_captions_are_folder_names(folder: Path) -> None:
    data = load(folder, 30, dataset_type="imagefolder")
    assert sorted(found(data)) == [(i, "red three" if i < 20 else "zebra") for i in range(30)]


def test_imagefolder_captions_are_prompts_of_given_classes(folder: Path) -> None:
    prompts = ClassPrompts(("3", "horse"), ("a {}", "the {}"))
    data = load(folder, 30, dataset_type="imagefolder", class_prompts=prompts, workers=2)
    captions = {(value < 20, caption) for value, caption in found(data)}
    assert captions == {(True, "a 3"), (True, "the 3"), (False, "a horse"), (False, "the horse")}
    with pytest.raises(DataError, match="1 class names for 2 class folders"):
        load(folder, dataset_type="imagefolder", class_prompts=ClassPrompts(("x",), ("{}",)))


def test_progress_counts_the_pairs(shards: str) -> None:
    seen: list[tuple[int, int]] = []
    load(shards, 5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"batch_size": 0}, {"workers": -1}, {"dataset_type": "parquet"}]
)
def test_numbers_out_of_range_and_unknown_types_are_refused(
    shards: str, options: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        load(shards, **options)  # type: ignore[arg-type]


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    def as_it_is(image):  # type: ignore[no-untyped-def]
        return torch.zeros(3, *image.size)

    members = [("0.png", image_bytes(1)), ("0.txt", b"a"), ("1.png", image_bytes(1, size=(5, 5)))]
    path = write_tar(tmp_path / "a.tar", [*members, ("1.txt", b"b")])
    with pytest.raises(DataError, match="wanted one size"):
        load(path, 2, transform=as_it_is)


def test_a_tokenizer_of_another_shape_is_refused(shards: str) -> None:
    with pytest.raises(DataError, match=r"the tokenizer returned \(3,\), wanted"):
        load(shards, 4, tokenizer=lambda texts: torch.zeros(3))


def test_open_clips_own_transform_and_tokenizer(shards: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    preprocess = open_clip.image_transform(32, is_train=False)
    data = load(shards, 6, transform=preprocess, tokenizer=open_clip.SimpleTokenizer(), workers=2)
    images, texts = data.batches[0]
    assert (tuple(images.shape), tuple(texts.shape)) == ((6, 3, 32, 32), (6, 77))
