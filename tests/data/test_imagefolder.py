"""Validation folders: a fixed order, and no image left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shard_files import image_bytes, transform

from qwt_fx.data.imagefolder import open_validation
from qwt_fx.errors import ConfigError, DataError

FORMATS = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value, name in enumerate(("b/1.png", "b/2.jpg", "a/9.png", "c_d/x/1.webp", "c_d/2.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(50 * value, FORMATS[path.suffix]))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_a_fixed_order_with_their_labels(folder: Path, workers: int) -> None:
    data = open_validation(folder, transform, 2, workers)
    assert (data.classes, data.images, len(data)) == (("a", "b", "c_d"), 5, 3)
    assert data.counts() == [1, 2, 2]
    for _ in range(2):
        batches = list(data)
        assert [tuple(x.shape) for x, _ in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
        assert torch.cat([y for _, y in batches]).tolist() == [0, 1, 1, 2, 2]
        values = torch.cat([x for x, _ in batches])[:, 0, 0, 0]
        assert (values - torch.tensor([100.0, 0, 50, 200, 150])).abs().max() <= 2  # JPEG, WebP
        assert batches[0][0].dtype == torch.float32
        assert batches[0][1].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(folder: Path, workers: int) -> None:
    (folder / "b" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b/2\.jpg: cannot be decoded .* never left out"):
        list(open_validation(folder, transform, 2, workers))


def test_images_of_several_sizes_are_refused(folder: Path) -> None:
    (folder / "c_d" / "2.png").write_bytes(image_bytes(9, size=(7, 7)))

    def as_it_is(image):  # type: ignore[no-untyped-def]
        return torch.zeros(3, *image.size)

    with pytest.raises(DataError, match=r"2\.png: the transform returned \(3, 7, 7\)"):
        list(open_validation(folder, as_it_is, 8, 0))


def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_validation(tmp_path / "gone", transform, 1, 0)
    (tmp_path / "0.png").write_bytes(image_bytes(1))
    with pytest.raises(DataError, match="holds no class folders"):
        open_validation(tmp_path, transform, 1, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"1 of 1 class folders hold no image \(empty\); wanted"):
        open_validation(tmp_path, transform, 1, 0)


def test_many_empty_class_folders_are_one_line(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"n{number:08}").mkdir()
    (tmp_path / "n00000001" / "deeper").mkdir()
    (tmp_path / "n00000001" / "deeper" / "0.PNG").write_bytes(image_bytes(1))
    with pytest.raises(DataError) as raised:
        open_validation(tmp_path, transform, 1, 0)
    said = str(raised.value).removeprefix(str(tmp_path))
    assert "999 of 1000 class folders" in said
    assert "(n00000000, n00000002, n00000003, ...)" in said
    assert len(said) < 200 and "\n" not in said


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (1, -1)])
def test_numbers_out_of_range_are_refused(folder: Path, batch_size: int, workers: int) -> None:
    with pytest.raises(ConfigError, match="wanted >= 1"):
        open_validation(folder, transform, batch_size, workers)
