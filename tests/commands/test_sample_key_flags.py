"""`--image-key`, `--caption-key`: every command takes them, and a run is another with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shard_files import image_bytes, write_tar
from small_files import write_small_clip

from qwt_fx.cli import build_parser, main
from qwt_fx.commands.config_file import config_arguments
from qwt_fx.commands.inspect import inspect_data
from qwt_fx.commands.quantize.run_identity import run_identity


def _words(folder: Path, members: list[tuple[str, bytes]]) -> list[str]:
    model = write_small_clip(folder / "clip", 1)[:4]
    shard = write_tar(folder / "s.tar", members)
    return [*model, "--train-data", shard, "--calib-samples", "4", "--batch-size", "4"]


def test_an_image_tower_is_quantized_and_inspected_on_images_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slow in (
        "kernels_of",
        "latency_of",
        "_ranges",
        "_stages",
    ):  # seconds of compiling and fitting
        monkeypatch.setattr(inspect_data, slow, lambda *args: {})
    members = [m for v in range(4) for m in ((f"{v}.img", image_bytes(v)), (f"{v}.cls", b"1"))]
    words = _words(tmp_path, members)
    keys = ["--image-key", "jpg;img"]
    quantize = ["quantize", *words, "--recipe", "repq-vit", "--output", str(tmp_path / "a")]
    assert main([*quantize, *keys, "--choice", "image_only"]) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["calibration"]["samples"] == 4
    page = tmp_path / "p.html"
    assert (
        main(["inspect", "--artifact", str(tmp_path / "a"), *words, *keys, "--html", str(page)])
        == 0
    )
    text = page.read_text()
    assert "--image-key &#x27;jpg;img&#x27;" in text  # the command that makes it again
    assert "Error contributed: not measured, the calibration data have no captions." in text


def test_the_names_are_part_of_what_a_run_is_and_of_a_config_file(tmp_path: Path) -> None:
    words = _words(tmp_path, [("0.txt", b"x")])
    parser = build_parser()
    digests = {
        run_identity(parser.parse_args(["quantize", *words, *keys]))["digest"]
        for keys in ([], ["--image-key", "img"], ["--caption-key", "json:text"])
    }
    assert len(digests) == 3
    config = tmp_path / "c.toml"
    config.write_text('image-key = "jpg;img"\ncaption_key = "json:text"\n')
    for command in ("quantize", "eval", "inspect", "sensitivity"):
        args = parser.parse_args([command])
        if command == "eval":  # which takes no config file
            assert parser.parse_args([command, "--image-key", "jpg;img"]).image_key == "jpg;img"
            continue
        given = config_arguments(args.parser, config)
        assert given == ["--image-key=jpg;img", "--caption-key=json:text"]
