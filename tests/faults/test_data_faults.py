"""Data that nobody checked: what is damaged is skipped, counted and said, or ends in one error."""

from __future__ import annotations

import io
import random
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from shard_files import image_bytes, pairs, tokenizer, transform, words, write_tar
from small_clip import small_config, write_config

from qwt_fx.clip import clip
from qwt_fx.data import stream_shard
from qwt_fx.data.data import CalibrationData, load_calibration
from qwt_fx.data.samples import ScanCounts
from qwt_fx.errors import DataError, QwtError


def read(path: str | Path, samples: int = 40) -> CalibrationData:
    return load_calibration(
        str(path), transform=transform, tokenizer=tokenizer, samples=samples, batch_size=8
    )


# -- tars --------------------------------------------------------------------------------------


def damage_tars(tmp_path: Path, cases: range) -> None:
    """Flips, cuts, overwrites: an error that names the shard, or pairs that were in it."""
    original = Path(write_tar(tmp_path / "original.tar", pairs(range(12)))).read_bytes()
    shard = tmp_path / "s.tar"
    known = {f"number {v}" for v in range(12)}
    for seed in cases:
        choose = random.Random(seed)
        data = bytearray(original)
        at = choose.randrange(len(data))
        match seed % 4:
            case 0:
                data[at] ^= 1 << choose.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at : at + 512] = choose.randbytes(512)
            case 3:
                del data[at : at + choose.randrange(1, 2000)]
        shard.write_bytes(data)
        try:
            found = read(shard)
        except QwtError as error:
            assert str(shard) in str(error), seed
            continue
        captions = [words(row) for _, texts in found.batches for row in texts]
        # A header says its own checksum and an image its CRC; a caption's bytes have none.
        unknown = [c for c in captions if c not in known]
        assert len(unknown) <= 1, (seed, unknown)
        assert found.samples + found.skipped_samples >= 11, seed


def test_damaged_tars_are_refused_or_lose_nothing_else(tmp_path: Path) -> None:
    damage_tars(tmp_path, range(100))


@pytest.mark.slow
def test_damaged_tars_are_refused_or_lose_nothing_else_1000(tmp_path: Path) -> None:
    damage_tars(tmp_path, range(1000, 2000))


def test_missing_shards_of_a_range_are_counted_and_named(tmp_path: Path) -> None:
    for i in (0, 2):
        write_tar(tmp_path / f"s-{i}.tar", pairs(range(3)))
    with pytest.raises(DataError, match=r"2 of 4 shards do not exist: .*s-1\.tar, .*s-3\.tar"):
        read(tmp_path / "s-{0..3}.tar")


# -- images ------------------------------------------------------------------------------------


def images() -> dict[str, bytes]:
    """One image of each kind a crawl brings."""
    made = {}
    for name, mode, format in (
        ("cmyk", "CMYK", "JPEG"),
        ("grey", "L", "JPEG"),
        ("palette", "P", "PNG"),
        ("16 bit", "I;16", "PNG"),
        ("alpha", "RGBA", "WEBP"),
        ("rotated", "RGB", "JPEG"),
    ):
        buffer = io.BytesIO()
        exif = Image.Exif()
        if name == "rotated":
            exif[0x0112] = 6
        Image.new(mode, (14, 10), 100 if mode in ("L", "P", "I;16") else None).save(
            buffer, format, **({"exif": exif} if name == "rotated" else {})
        )
        made[name] = buffer.getvalue()
    return made


def test_images_of_every_kind_are_taken(tmp_path: Path) -> None:
    members = []
    for i, data in enumerate(images().values()):
        members += [(f"{i}.jpg", data), (f"{i}.txt", b"a picture")]
    found = read(write_tar(tmp_path / "s.tar", members))
    assert (found.samples, found.skipped_samples) == (6, 0)


def damage_images(tmp_path: Path, cases: range) -> None:
    """A damaged image among 30 good ones is used, or skipped and said."""
    kinds = list(images().values())
    good = pairs(range(30))
    for seed in cases:
        choose = random.Random(seed)
        data = bytearray(kinds[seed % len(kinds)])
        for _ in range(choose.randint(1, 8)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        if choose.random() < 0.3:
            del data[choose.randrange(len(data)) :]
        shard = write_tar(tmp_path / "s.tar", [*good, ("x.jpg", bytes(data)), ("x.txt", b"x")])
        found = read(shard)
        assert found.samples + found.skipped_samples == 31, seed
        assert found.skipped_samples in (0, 1)
        assert any("'x'" in note for note in found.notes) == bool(found.skipped_samples), seed


def test_damaged_images_are_skipped_and_said(tmp_path: Path) -> None:
    damage_images(tmp_path, range(60))


@pytest.mark.slow
def test_damaged_images_are_skipped_and_said_400(tmp_path: Path) -> None:
    damage_images(tmp_path, range(1000, 1400))


def test_no_image_and_a_bomb_are_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # so that the bomb can be small
    bomb = image_bytes(1, size=(400, 400))
    bad = [("t.jpg", b"<html>404</html>"), ("t.txt", b"a"), ("u.png", bomb), ("u.txt", b"b")]
    found = read(write_tar(tmp_path / "s.tar", [*pairs(range(30)), *bad]))
    assert (found.samples, found.skipped_samples) == (30, 2)
    said = "; ".join(found.notes)
    assert "UnidentifiedImageError" in said and "DecompressionBomb" in said


# -- captions ----------------------------------------------------------------------------------


def test_captions_of_every_script_and_length_reach_the_real_tokenizer(tmp_path: Path) -> None:
    model = clip.load(write_config(tmp_path / "m.json", small_config()), allow_random=True)
    captions = [
        "собака на траве", "一只猫", "كلب", "🐕‍🦺" * 50, "é" * 1000, "x" * 9_000, "a " * 100_000,
        "\u202e\u0000b", "\ufeffcat", "<start_of_text><end_of_text>",
    ]  # fmt: skip
    members = []
    for i, caption in enumerate(captions):
        members += [(f"{i}.png", image_bytes(i)), (f"{i}.txt", caption.encode())]
    begun = time.perf_counter()
    found = load_calibration(
        write_tar(tmp_path / "s.tar", members),
        transform=model.transform,
        tokenizer=model.tokenizer,
        samples=len(captions),
        batch_size=4,
    )
    assert found.samples == len(captions)
    assert time.perf_counter() - begun < 20.0
    for _, texts in found.batches:
        assert texts.shape[1] == 12
        assert bool((texts >= 0).all()) and bool((texts < 49408).all())


def test_empty_and_undecodable_captions_are_skipped_and_said(tmp_path: Path) -> None:
    bad = [b"", b" \n\t ", b"\xff\xfe\x00a", b"caf\xe9"]
    members = pairs(range(40))
    for i, data in enumerate(bad):
        members += [(f"bad{i}.png", image_bytes(i)), (f"bad{i}.txt", data)]
    found = read(write_tar(tmp_path / "s.tar", members), samples=44)
    assert (found.samples, found.skipped_samples) == (40, 4)
    assert "4 of 44 samples could not be decoded" in "; ".join(found.notes)


# -- readers that stall ------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_shard, "STALL_SECONDS", 0.5)


@pytest.mark.parametrize("sent", [0, 300, 5000])
def test_a_reader_that_stalls_is_given_up(tmp_path: Path, impatient: None, sent: int) -> None:
    shard = write_tar(tmp_path / "s.tar", pairs(range(8)))
    begun = time.perf_counter()
    with pytest.raises(DataError, match=r"has sent nothing for 0\.5 seconds"):
        read(f"pipe:head -c {sent} '{shard}'; exec sleep 60")
    assert time.perf_counter() - begun < 10.0


def test_a_reader_that_does_not_end_is_given_up(tmp_path: Path, impatient: None) -> None:
    shard = write_tar(tmp_path / "s.tar", pairs(range(8)))
    with pytest.raises(DataError, match="closed its output, but did not end"):
        read(f"pipe:cat '{shard}'; exec sleep 60 >/dev/null")


def test_a_slow_reader_is_waited_for(tmp_path: Path, impatient: None) -> None:
    shard = write_tar(tmp_path / "s.tar", pairs(range(8)))
    slow = f"head -c 5000 '{shard}'; sleep 0.3; tail -c +5001 '{shard}'"
    assert read(f"pipe:{slow}").samples == 8


def test_a_command_that_fails_at_its_end_is_an_error_for_compressed_shards_too(
    tmp_path: Path,
) -> None:
    shard = write_tar(tmp_path / "s.tar.gz", pairs(range(8)), "w:gz")
    with pytest.raises(DataError, match="exit 3"):
        read(f"pipe:cat '{shard}'; exit 3")


class Interrupted(BaseException):
    """What the program raises in its signal handler."""


def test_a_signal_ends_the_wait_for_a_reader_that_stalls() -> None:
    def stop(*_: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    begun = time.perf_counter()
    try:
        with pytest.raises(Interrupted):
            list(stream_shard.groups("pipe:exec sleep 60", ScanCounts()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    assert time.perf_counter() - begun < 20.0
