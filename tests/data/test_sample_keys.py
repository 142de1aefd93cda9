"""Shards as others write them: extensions of their own, no captions, dots in keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shard_files import image_bytes, pairs, tokenizer, transform, words, write_index, write_tar

from qwt_fx.data.data import CalibrationData, load_calibration
from qwt_fx.data.retrieval_data import RetrievalReader
from qwt_fx.data.sample_keys import SampleKeys
from qwt_fx.errors import ConfigError, DataError

NUMBERS = range(10, 18)


def shard(folder: Path, image: str, caption: str | None, *, mode: str = "w") -> str:
    members = []
    for v in NUMBERS:
        members.append((f"{v}.{image}", image_bytes(v)))
        text = f"number {v}"
        if caption is not None:
            data = json.dumps({"text": text}) if caption == "json" else text
            members.append((f"{v}.{caption}", data.encode()))
    return write_tar(folder / ("s.tar" if mode == "w" else "s.tar.gz"), members, mode)


def load(
    spec: str, image: str | None = None, caption: str | None = None, **options
) -> CalibrationData:
    captioned = options.pop("captioned", True)
    keys = SampleKeys.parse(image, caption)
    return load_calibration(
        spec, transform=transform, tokenizer=tokenizer, samples=len(NUMBERS), batch_size=8,
        keys=keys if captioned else keys.without_captions(), **options,
    )  # fmt: skip


def read_as(data: CalibrationData) -> list[tuple[int, str]]:
    images, texts = data.batches[0]
    return sorted((int(i[0, 0, 0]), words(t)) for i, t in zip(images, texts, strict=True))


WANTED = [(v, f"number {v}") for v in NUMBERS]


@pytest.mark.parametrize("how", ["headers", "index", "stream"])
@pytest.mark.parametrize(("image", "caption", "image_key", "caption_key"), [
    ("jpg.png", "caption", "jpg;jpg.png", "txt;caption"),
    ("image", "json", "jpg;png;webp;image", "txt;caption;json:text"),
    ("PNG", "TXT", ".png", ".txt"),
    ("png", "txt", None, None),
])  # fmt: skip
def test_members_are_found_by_the_names_given(
    image: str,
    caption: str,
    image_key: str | None,
    caption_key: str | None,
    how: str,
    tmp_path: Path,
) -> None:
    path = shard(tmp_path, image, caption, mode="w:gz" if how == "stream" else "w")
    if how == "index":
        write_index(path)
    assert read_as(load(path, image_key, caption_key)) == WANTED
    keys = SampleKeys.parse(image_key, caption_key)
    (batch,) = RetrievalReader(path, transform, tokenizer, 8, keys=keys)
    assert [words(t) for t in batch.tokens] == [text for _, text in WANTED]


def test_the_first_name_that_is_there_counts(tmp_path: Path) -> None:
    members = [*pairs([5]), ("000005.caption", b"another")]
    path = write_tar(tmp_path / "s.tar", members)
    assert read_as(load(path, None, "caption;txt")) == [(5, "another")]
    assert read_as(load(path, None, "txt;caption")) == [(5, "number 5")]


@pytest.mark.parametrize("how", ["headers", "index", "stream"])
@pytest.mark.parametrize("other", [None, "cls"])
def test_images_alone_are_enough_where_no_captions_are_needed(
    other: str | None, how: str, tmp_path: Path
) -> None:
    path = shard(tmp_path, "jpg", other, mode="w:gz" if how == "stream" else "w")
    if how == "index":
        write_index(path)
    data = load(path, captioned=False)
    assert not data.captioned and not any("passed over" in note for note in data.notes)
    assert data.samples == len(NUMBERS)
    with pytest.raises(DataError) as info:
        load(path)
    found = ".cls, .jpg" if other else ".jpg"
    assert f"none of its 8 samples has a caption; found {found}, wanted .txt, .json with" in str(
        info.value
    )
    assert "--caption-key" in str(info.value) and "--choice image_only" in str(info.value)


def test_captions_that_are_there_are_read_all_the_same(tmp_path: Path) -> None:
    path = shard(tmp_path, "png", "txt")
    plain, lax = load(path), load(path, captioned=False)
    assert lax.captioned
    assert all(torch.equal(a, b) for a, b in zip(plain.batches[0], lax.batches[0], strict=True))


def test_names_with_dots_are_split_as_webdataset_does_and_this_is_said(tmp_path: Path) -> None:
    members = [m for v in NUMBERS for m in ((f"a.{v}.jpg", image_bytes(v)), (f"a.{v}.txt", b"x"))]
    path = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(
        DataError, match="names are split at their first dot, as webdataset does"
    ) as info:
        load(path)
    assert "such as .10.jpg" in str(info.value)
    half = write_tar(tmp_path / "half.tar", [*pairs([3]), *members])
    (note, _) = load(half).notes
    assert "1 samples of the shards drawn from were passed over" in note
    assert "split at their first dot" in note


def csv(folder: Path, *columns: str) -> str:
    rows = ["\t".join(columns)]
    for v in NUMBERS:
        (folder / f"{v}.png").write_bytes(image_bytes(v))
        rows.append("\t".join([f"{v}.png", f"number {v}"][: len(columns)]))
    (folder / "p.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "p.csv")


def test_columns_of_a_csv_file_are_named_too(tmp_path: Path) -> None:
    spec = csv(tmp_path, "Image", "caption")
    assert read_as(load(spec, "image", "text;caption", dataset_type="csv")) == WANTED
    with pytest.raises(DataError, match=r"no column 'filepath'.*--image-key"):
        load(spec, dataset_type="csv")
    with pytest.raises(DataError, match=r"no column 'title'.*--caption-key"):
        load(spec, "image", dataset_type="csv")
    alone = csv(tmp_path, "filepath")
    assert not load(alone, dataset_type="csv", captioned=False).captioned


def test_names_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for image, caption in (
        ("jpg;;png", None),
        ("json:a", None),
        (None, ""),
        (None, "json:"),
        (None, "a:b"),
    ):
        with pytest.raises(ConfigError, match=r"--(image|caption)-key: got "):
            SampleKeys.parse(image, caption)
    with pytest.raises(ConfigError, match="an imagefolder has neither"):
        load(str(tmp_path), "jpg", dataset_type="imagefolder")
