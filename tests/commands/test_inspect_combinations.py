"""`qwt-fx inspect` of every combination of settings and flags: a page, whatever was not measured.

Pages are made of artifacts that `quantize` wrote, or quantized here. The fast tier covers every pair of
flags and towers on one model that is quantized once; the slow tiers every pair of flags and settings,
and the product of the settings. What takes seconds (compiled kernels, latency) is replaced.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from small_clip import small_config, small_model, write_config
from small_files import write_small_clip

from qwt_fx.cli import main
from qwt_fx.clip.clip import TOWERS
from qwt_fx.commands.arguments import TOWER_SETS, quant_config
from qwt_fx.commands.inputs import load_batches, load_model
from qwt_fx.commands.inspect import inspect, inspect_data
from qwt_fx.commands.quantize.pipeline import QuantizedClip, capture_towers, quantize_towers
from qwt_fx.commands.quantize.quantize import save_clip
from qwt_fx.commands.screen import Screen

SETTINGS = {
    "towers": ("image", "text", "both"),
    "recipe": ("best", "repq-vit"),
    "compensation": ("none", "qwt"),
    "attention": ("none", "uniform", "log2"),
    "precision": ("fp32", "bf16", "fp16"),
}
FLAGS = {
    "of": ("artifact", "artifact without report", "model"),
    "model": (True, False),
    "data": (True, False),
    "stages": (True, False),
    "html": (True, False),
    "order": (True, False),
}
# The parts of a page that a choice of towers leaves without an image or a text.
ABSENT = r"Not measured: ([^<]*)\.</p>"


def combinations(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def covering(axes: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows in which every pair of values of two axes occurs, found greedily."""

    def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(row.items(), 2))

    everything = list(combinations(axes))
    missing = set().union(*map(pairs, everything))
    rows = []
    while missing:
        rows.append(max(everything, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


def settings_words(row: Mapping[str, Any]) -> list[str]:
    return [w for key in SETTINGS for w in (f"--{key}", str(row[key]))] + ["--w-bits", "6"]


def inspect_words(
    row: Mapping[str, Any], artifact: Path, words: list[str], page: Path
) -> list[str]:
    model, data = words[:4], words[4:]
    said = ["inspect"]
    if row["of"] == "model":
        said += [*model, *settings_words(row)]
    else:
        said += ["--artifact", str(artifact), *(model if row["model"] else [])]
        said += ["--precision", row["precision"]]
    said += data if row["data"] else []
    said += [] if row["stages"] else ["--no-stages"]
    said += ["--graph-order"] if row["order"] else []
    return said + (["--html", str(page)] if row["html"] else [])


def expected_absences(row: Mapping[str, Any]) -> set[str]:
    """What the page's boxes say of this combination."""
    artifact = row["of"] != "model"
    floating = row["model"] or not artifact
    flags = [f for f, there in (("--model", floating), ("--train-data", row["data"])) if not there]
    said = {f"give {' and '.join(flags)}"} if flags else set()
    if not row["data"]:
        said.add("give --train-data")
    if row["towers"] != "both":
        said.add("this tower is not quantized")
    if not flags and not row["stages"]:
        said.add("left out by --no-stages")
    return said


def check_page(row: Mapping[str, Any], page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(ABSENT, text)) == expected_absences(row)
    quantized = row["of"] != "model" or row["data"]
    assert ("Size of the quantized towers</h3><p>Not measured" in text) == (not quantized)
    for tower in ("Image", "Text"):
        assert f"{tower} tower: layers" in text


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clip")
    said = write_small_clip(folder, 4)
    config = small_config(vision_cfg={"layers": 1}, text_cfg={"layers": 1})
    save_file(dict(small_model(config).state_dict()), folder / "model.safetensors")
    write_config(folder / "model.json", config)
    return said


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles or times something is not run."""
    monkeypatch.setattr(inspect_data, "kernels_of", lambda *args: None)
    monkeypatch.setattr(inspect_data, "latency_of", lambda *args: {"FP32": 0.01, "eager": 0.02})


@pytest.mark.usefixtures("cheap")
def test_every_pair_of_towers_and_flags_gives_a_page(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    args = parser.parse_args([*words, "--qwt", "--w-bits", "6", "--recipe", "repq-vit"])
    model, screen, config = load_model(args), Screen(), quant_config(args)
    graphs = capture_towers(model, {})
    data = load_batches(args, model, screen, 0, None)
    whole = quantize_towers(model, graphs, data.batches, config, TOWERS, screen)

    def chosen(towers: tuple[str, ...]) -> QuantizedClip:
        mixed = {t: (whole.towers if t in towers else graphs)[t] for t in TOWERS}
        return QuantizedClip(mixed, towers, whole.classifier)

    # Everything but the quantization itself and the reading of files is the command's own.
    monkeypatch.setattr(inspect_data, "load_model", lambda args: model)
    monkeypatch.setattr(inspect_data, "load_batches", lambda *args, **_: data)
    monkeypatch.setattr(inspect_data, "capture_towers", lambda *args: dict(graphs))
    monkeypatch.setattr(inspect_data, "quantize_towers", lambda *args: chosen(args[4]))
    monkeypatch.setattr(inspect_data.api, "quantize", lambda floating, *args: floating)
    for towers in SETTINGS["towers"]:
        (tmp_path / towers).mkdir()
        save_clip(tmp_path / towers, model, chosen(TOWER_SETS[towers]), config, screen)
    fixed = {"recipe": "repq-vit", "compensation": "qwt", "attention": "none", "precision": "fp32"}
    rows = covering({"towers": SETTINGS["towers"]} | FLAGS)
    assert 9 <= len(rows) < 16
    for row in rows:
        check(fixed | row, tmp_path / row["towers"], words, tmp_path / "page.html")


def check(row: dict[str, Any], artifact: Path, words: list[str], page: Path) -> None:
    if row["of"] == "artifact without report":
        (artifact / "report.json").unlink(missing_ok=True)
    assert main(inspect_words(row, artifact, words, page)) == 0, row
    if row["html"]:
        check_page(row, page)
    page.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_every_pair_of_settings_and_flags_gives_a_page(words: list[str], tmp_path: Path) -> None:
    made: dict[str, Path] = {}
    for number, row in enumerate(covering(SETTINGS | FLAGS)):
        key = " ".join(settings_words(row))
        if key not in made:
            made[key] = tmp_path / str(number)
            assert main(["quantize", *words, *settings_words(row), "--output", str(made[key])]) == 0
        check(row, made[key], words, tmp_path / "page.html")


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", SETTINGS["attention"])
@pytest.mark.parametrize("compensation", SETTINGS["compensation"])
@pytest.mark.parametrize("recipe", SETTINGS["recipe"])
@pytest.mark.parametrize("towers", SETTINGS["towers"])
def test_every_combination_gives_a_page(
    towers: str, recipe: str, compensation: str, attention: str, precision: str,
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of the artifact; models that `inspect` quantizes, and its stages, have every pair above."""
    monkeypatch.setattr(inspect_data.api, "quantize", lambda floating, *args: floating)
    values = (towers, recipe, compensation, attention, precision)
    settings = dict(zip(SETTINGS, values, strict=True))
    artifact, page = tmp_path / "artifact", tmp_path / "page.html"
    assert main(["quantize", *words, *settings_words(settings), "--output", str(artifact)]) == 0
    for model, data in itertools.product((True, False), repeat=2):
        row = settings | {
            "of": "artifact", "model": model, "data": data, "stages": True, "html": True, "order": True
        }  # fmt: skip
        check(row, artifact, words, page)
