"""Images of every kind, and what is refused of them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import image_bytes, transform

from qwt_fx.data.decoding import Decoded, Undecodable, decode_in_order, open_image
from qwt_fx.data.samples import MAX_IMAGE_BYTES, FilePair, SampleLocation
from qwt_fx.errors import DataError


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_png_becomes_rgb(mode: str) -> None:
    image = open_image(encoded(Image.new("RGB", (4, 6), "white").convert(mode)))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 6), (255, 255, 255))


def test_cmyk_becomes_rgb() -> None:
    assert open_image(encoded(Image.new("CMYK", (4, 4)), "JPEG")).mode == "RGB"


def test_sixteen_bits_keep_their_brightness() -> None:
    wide = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = open_image(encoded(Image.fromarray(wide)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


def test_floating_point_pixels_of_at_most_one_are_refused_not_black() -> None:
    bright = np.full((2, 2), 200.0, dtype=np.float32)
    assert open_image(encoded(Image.fromarray(bright), "TIFF")).getpixel((0, 0)) == (200,) * 3
    with pytest.raises(DataError, match="floating-point pixels of at most 1, wanted 0 to 255"):
        open_image(encoded(Image.fromarray(bright / 255.0), "TIFF"))


def test_exif_rotation_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert open_image(encoded(Image.new("RGB", (4, 8)), "JPEG", exif=exif)).size == (4, 8)


def test_bombs_are_refused_at_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    open_image(image_bytes(1, size=(10, 10)))
    with pytest.raises(Image.DecompressionBombWarning):
        open_image(image_bytes(1, size=(10, 15)))
    with pytest.raises(Image.DecompressionBombError):
        open_image(image_bytes(1, size=(100, 100)))


def test_shapes_that_would_grow_by_resizing_are_refused() -> None:
    open_image(image_bytes(1, size=(200, 1)))
    with pytest.raises(DataError, match="image of 201 x 1"):
        open_image(image_bytes(1, size=(201, 1)))


def broken(image: Image.Image) -> torch.Tensor:
    raise ValueError("no\nsuch   transform")


def flat(image: Image.Image) -> torch.Tensor:
    return torch.zeros(8, 8)


@pytest.mark.parametrize(
    ("data", "function", "reason"),
    [
        (b"", transform, "UnidentifiedImageError"),
        (image_bytes(3, "JPEG", (90, 90))[:-200], transform, "OSError"),
        (image_bytes(3), broken, "ValueError: no such transform"),
        (image_bytes(3), flat, r"the transform returned \(8, 8\), wanted a tensor"),
    ],
)
def test_what_cannot_be_decoded_comes_back_with_a_reason(
    tmp_path: Path, data: bytes, function: object, reason: str
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    (result,) = decode_in_order([FilePair(str(path), "a")], function, 0)  # type: ignore[arg-type]
    assert isinstance(result, Undecodable)
    assert (result.where, result.bytes_read) == (str(path), len(data))
    assert re.search(reason, result.reason)


def test_absurd_sizes_and_changed_shards_are_undecodable(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"x" * 100)
    locations = [
        SampleLocation(str(shard), "0", (0, MAX_IMAGE_BYTES + 1), (0, 5), "txt"),
        SampleLocation(str(shard), "1", (50, 100), (0, 5), "txt"),
        SampleLocation(str(tmp_path / "gone.tar"), "2", (50, 100), (0, 5), "txt"),
    ]
    reasons = [r.reason for r in decode_in_order(locations, transform, 0)]  # type: ignore[union-attr]
    assert "wanted at most" in reasons[0]
    assert "50 of 100 bytes" in reasons[1]
    assert "FileNotFoundError" in reasons[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_sources_are_consumed_lazily_and_results_keep_their_order(
    tmp_path: Path, workers: int
) -> None:
    consumed = 0

    def sources():  # type: ignore[no-untyped-def]
        nonlocal consumed
        for value in range(100):
            (tmp_path / f"{value}.png").write_bytes(image_bytes(value))
            consumed += 1
            yield FilePair(str(tmp_path / f"{value}.png"), str(value))

    results = decode_in_order(sources(), transform, workers)
    first = next(results)
    assert isinstance(first, Decoded)
    assert consumed < 10
    values = [first, *results]
    assert [int(r.image[0, 0, 0]) for r in values] == list(range(100))  # type: ignore[union-attr]


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(decode_in_order([FilePair(str(tmp_path / "a.png"), "a")], transform, 1))
    assert torch.equal(torch.get_rng_state(), before)
