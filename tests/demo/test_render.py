"""The demo's data are drawn deterministically, from digits of the right split only."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from qwt_fx.demo import assets

pytest.importorskip("sklearn")

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "demo_model"


@pytest.fixture(scope="module")
def render() -> ModuleType:
    """The module benchmarks/demo_model/render.py."""
    return script("render")


def script(name: str) -> ModuleType:
    """Import a script of benchmarks/demo_model."""
    if not SCRIPTS.is_dir():
        pytest.skip("benchmarks/demo_model is not in this tree")
    sys.path.insert(0, str(SCRIPTS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(SCRIPTS))


def pixels(data: bytes) -> NDArray[np.int64]:
    """Decode an image: (h, w, 3) int64."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def test_splits_share_no_sample_and_cover_all_digits(render: ModuleType) -> None:
    sets = [render.load_digit_set(split) for split in render.SPLITS]
    samples = np.concatenate([digits.samples for digits in sets])
    assert len(samples) == 1797
    assert len(np.unique(samples)) == len(samples)
    assert all(len(rows) >= 15 for digits in sets for rows in digits.by_digit)


def test_a_split_lists_each_digit_under_its_own_label(render: ModuleType) -> None:
    from sklearn.datasets import load_digits

    truth = load_digits().target
    digits = render.load_digit_set("validation")
    for digit, rows in enumerate(digits.by_digit):
        assert set(truth[digits.samples[rows]]) == {digit}


def test_class_names_follow_the_index(render: ModuleType) -> None:
    names = render.class_names()
    assert len(set(names)) == 1600
    # red is colour 0, blue is colour 2.
    assert names[((0 * 10 + 3) * 4 + 2) * 10 + 7] == "red three next to a blue seven"
    assert names == assets.read_asset("classnames.txt").decode().splitlines()
    assert list(render.EVALUATION_TEMPLATES) == (
        assets.read_asset("templates.txt").decode().splitlines()
    )


def test_an_image_depends_on_its_own_index_only(render: ModuleType) -> None:
    digits = render.load_digit_set("train")
    batch = render.render_batch(digits, [5, 900, 5], 7, 10)
    assert batch.shape == (3, 32, 48, 3) and batch.dtype == np.uint8
    assert np.array_equal(batch[2], render.render_image(digits, 5, 7, 12))
    assert not np.array_equal(batch[0], batch[2])
    assert not np.array_equal(batch[0], render.render_image(digits, 5, 8, 10))


def test_the_colour_of_each_side_is_the_one_named(render: ModuleType) -> None:
    digits = render.load_digit_set("train")
    label = render.class_names().index("red eight next to a blue zero")
    images = render.render_batch(digits, [label] * 20, 0, 0).astype(int)
    left, right = images[:, :, :24].reshape(-1, 3), images[:, :, 24:].reshape(-1, 3)
    assert left.max(axis=0)[0] > left.max(axis=0)[2] + 50
    assert right.max(axis=0)[2] > right.max(axis=0)[0] + 50


def test_classes_are_balanced(render: ModuleType) -> None:
    counts = np.bincount(render.balanced_classes(4000, 3), minlength=1600)
    assert set(counts) == {2, 3}


def test_shipped_validation_images_show_validation_digits(render: ModuleType) -> None:
    """Drawing them again gives the same pixels, up to rounding in other Pillow versions."""
    digits = render.load_digit_set("validation")
    with zipfile.ZipFile(io.BytesIO(assets.read_asset("val.zip"))) as archive:
        names = archive.namelist()[::40]
        for name in names:
            label, index = (int(part) for part in name.removesuffix(".png").split("/"))
            again = render.render_image(digits, label, 0, index).astype(int)
            assert np.abs(pixels(archive.read(name)) - again).max() <= 2


def test_shipped_calibration_pairs_show_calibration_digits(render: ModuleType) -> None:
    digits = render.load_digit_set("calibration")
    names = render.class_names()
    checked = 0
    for shard in assets.SHARDS:
        with tarfile.open(fileobj=io.BytesIO(assets.read_asset(shard))) as archive:
            for member in archive.getmembers()[:20:2]:
                key = member.name.removesuffix(".png")
                image, text = archive.extractfile(member), archive.extractfile(f"{key}.txt")
                assert image is not None and text is not None
                caption = text.read().decode()
                label = next(i for i, name in enumerate(names) if name in caption)
                again = render.render_image(digits, label, 0, int(key)).astype(int)
                assert np.abs(pixels(image.read()) - again).max() <= 2
                checked += 1
    assert checked == 40


def test_an_image_folder_has_every_class(render: ModuleType, tmp_path: Path) -> None:
    render.write_image_folder(tmp_path, 20, seed=9)
    assert len(list(tmp_path.iterdir())) == 1600
    assert len(list(tmp_path.rglob("*.png"))) == 20


def test_shards_are_written_identically_twice(render: ModuleType, tmp_path: Path) -> None:
    first = render.write_shards(tmp_path / "a", [3, 2], seed=1)
    again = render.write_shards(tmp_path / "b", [3, 2], seed=1)
    assert [path.name for path in first] == ["calib-000.tar", "calib-001.tar"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    with tarfile.open(first[1]) as archive:
        assert archive.getnames() == ["000003.png", "000003.txt", "000004.png", "000004.txt"]


def test_the_training_forward_is_the_model_of_open_clip(render: ModuleType) -> None:
    from open_clip.model import CLIP

    train = script("train")
    model = CLIP(**assets.demo_config()).eval()
    model.load_state_dict(assets.demo_state_dict())
    tokens = train.tokenize(render.EVALUATION_TEMPLATES)[0, ::200]
    rows = torch.unique(tokens)
    table = model.token_embedding.weight[rows]
    images = train.normalize_pixels(torch.randint(256, (4, 32, 48, 3), dtype=torch.uint8))
    with torch.no_grad():
        torch.testing.assert_close(
            train.encode_image(model, images),
            model.encode_image(images, normalize=True),
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            train.encode_text(model, tokens, rows, table),
            model.encode_text(tokens, normalize=True),
            rtol=1e-4,
            atol=1e-5,
        )
