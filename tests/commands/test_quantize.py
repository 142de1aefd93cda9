"""`qwt-fx quantize` where what is decided on data stands before the published procedure's ranges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_files import write_small_clip

from qwt_fx.artifact.artifact import read_artifact
from qwt_fx.cli import main
from qwt_fx.graph.graph_info import graph_info


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_small_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (["--attention", "auto"], "ChooseSoftmaxQuantizer"),
        (["--exceptions", "0.2"], "RaiseSensitiveLayers"),
    ],
)
def test_the_published_recipe_takes_what_is_chosen_before_ranges(
    words: list[str], tmp_path: Path, extra: list[str], name: str
) -> None:
    output = tmp_path / "artifact"
    command = ["quantize", *words, "--w-bits", "4", "--a-bits", "4", "--recipe", "repq-vit"]
    assert main([*command, *extra, "--choice", "image_only", "--output", str(output)]) == 0
    artifact = read_artifact(output)
    passes = {r["pass"]: r["changes"] for r in graph_info(artifact.towers["image"]).passes}
    assert passes[name]
    assert artifact.extra["classifier"]["input"] is not None
    assert json.loads((output / "report.json").read_text())["recipe"] == "repq-vit"


def test_a_compensation_that_is_not_possible_is_said_on_screen(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", *words, "--choice", "image_only", "--recipe", "repq-vit", "--qwt"]
    samples = ["--calib-samples", "1", "--batch-size", "1"]
    assert main([*command, *samples, "--output", str(tmp_path / "artifact")]) == 0
    assert (
        "image tower: compensation 'qwt' was asked for, but no block has one: one calibration sample"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_dynamic_activations_from_the_command_line_to_a_verified_export(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    output, folder = tmp_path / "artifact", tmp_path / "export"
    command = ["quantize", *words, "--choice", "image_only", "--recipe", "repq-vit"]
    override = ["--override", "*.c_proj=w6a6s"]
    assert main([*command, "--activations", "dynamic", *override, "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["activations"] == "dynamic"
    kinds = {row["name"]: row["activations"] for row in report["layers"]}
    assert kinds["visual.conv1"] == "static"
    assert kinds["visual.transformer.resblocks.0.mlp.c_fc"] == "dynamic"
    assert kinds["visual.transformer.resblocks.0.mlp.c_proj"] == "static"
    artifact = read_artifact(output)
    assert artifact.config["activations"] == "dynamic"
    assert artifact.extra["classifier"]["input"]["scale"] is None  # a range of each image
    assert main(["inspect", "--artifact", str(output)]) == 0
    assert "w8a8d" in capsys.readouterr().out
    export = ["export", "--artifact", str(output), "--tower", "image", "--format", "onnx"]
    assert main([*export, "--output", str(folder), "--verify"]) == 0


def test_dynamic_activations_of_the_published_code_are_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", *words, "--recipe", "repq-vit", "--compat", "original"]
    out = ["--output", str(tmp_path / "artifact")]
    assert main([*command, "--activations", "dynamic", *out]) == 2
    message = capsys.readouterr().err.strip()
    assert message.splitlines()[-1].endswith("static activations alone; use compat='none'")
    assert "Traceback" not in message
