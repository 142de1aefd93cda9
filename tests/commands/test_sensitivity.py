"""`qwt-fx sensitivity` end to end: tables, budgets, the file it writes, interruption."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from small_files import write_small_clip

from qwt_fx.cli import main
from qwt_fx.commands.config_text import config_text
from qwt_fx.commands.sensitivity import bit_search
from qwt_fx.commands.sensitivity.sensitivity import size
from qwt_fx.config.config import QuantConfig

SEARCH = ["--statistics-samples", "8", "--candidates", "4,8", "--quiet"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_small_clip(tmp_path_factory.mktemp("clip"))


def _run(words: list[str], output: Path, *extra: str) -> dict:
    report = output.with_suffix(".json")
    command = ["sensitivity", *words, *SEARCH, "--output", str(output), "--report", str(report)]
    assert main([*command, *extra]) == 0
    return json.loads(report.read_text())


def test_at_the_size_of_uniform_bits_only_activations_grow_and_quantize_takes_the_file(
    words: list[str], tmp_path: Path
) -> None:
    found = _run(words, tmp_path / "m.toml", "--max-size", "4 bits")
    overrides = found["config"]["overrides"]
    assert set(overrides.values()) == {"w4a8"}
    assert len(overrides) == 1 + 2 * 4 * 2
    assert found["trials"][0]["weight_bytes"] == found["trials"][1]["weight_bytes"]
    assert not (tmp_path / "m.toml.partial").exists()
    output = tmp_path / "art"
    command = ["quantize", *words, "--config", str(tmp_path / "m.toml"), "--output", str(output)]
    assert main([*command, "--recipe", "repq-vit"]) == 0
    layers = json.loads((output / "report.json").read_text())["layers"]
    bits = {r["name"]: f"w{r['w_bits']}a{r['a_bits']}" for r in layers if r["w_bits"]}
    assert bits == overrides


@pytest.mark.slow
def test_a_budget_of_bytes_is_kept_by_the_files_written(words: list[str], tmp_path: Path) -> None:
    sizes = {}
    for name, bits in (("four", "4"), ("eight", "8")):
        output = tmp_path / name
        command = ["quantize", *words, "--w-bits", bits, "--recipe", "repq-vit"]
        assert main([*command, "--output", str(output)]) == 0
        report = json.loads((output / "report.json").read_text())
        sizes[name] = report["size"]["quantized_bytes"]
    budget = (sizes["four"] + sizes["eight"]) // 2
    _run(words, tmp_path / "m.toml", "--max-size", f"{budget}", "--recipe", "repq-vit")
    config = ["--config", str(tmp_path / "m.toml")]
    output = tmp_path / "mixed"
    assert main(["quantize", *words, *config, "--output", str(output)]) == 0
    found = json.loads((output / "report.json").read_text())["size"]["quantized_bytes"]
    assert sizes["four"] < found <= budget
    assert found > budget - 0.2 * (sizes["eight"] - sizes["four"])


@pytest.mark.slow
def test_a_drop_that_any_width_keeps_gives_the_smallest_model(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(words, tmp_path / "m.toml", "--max-drop", "99")
    assert set(found["config"]["overrides"].values()) == {"w4a8"}
    command = ["sensitivity", *words, *SEARCH, "--candidates", "2,3", "--max-drop", "0"]
    assert main([*command, "--output", str(tmp_path / "n.toml")]) == 3
    assert "even the widest candidates" in capsys.readouterr().err
    assert not (tmp_path / "n.toml").exists()


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_ends_as_one_that_was_not(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = _run(words, tmp_path / "whole.toml", "--max-size", "5 bits")
    measured = bit_search.measure_bits
    count = 0

    def stopping(*args: object, **options: object):
        nonlocal count
        for loss in measured(*args, **options):
            count += 1
            if count == 20:
                raise KeyboardInterrupt
            yield loss

    command = ["sensitivity", *words, *SEARCH, "--max-size", "5 bits"]
    output = tmp_path / "cut.toml"
    with monkeypatch.context() as patch:
        patch.setattr(bit_search, "measure_bits", stopping)
        with pytest.raises(KeyboardInterrupt):
            main([*command, "--output", str(output)])
    assert len(list((tmp_path / "cut.toml.partial").glob("losses-*"))) == 19
    again = _run(words, output, "--max-size", "5 bits", "--resume")
    assert again["losses"] == whole["losses"]
    assert again["config"] == whole["config"]
    (tmp_path / "cut.toml.partial").mkdir()
    (tmp_path / "cut.toml.partial" / "run.json").write_text(json.dumps({"seed": 9}))
    assert main([*command, "--output", str(output), "--resume"]) == 2
    assert "of other settings or data" in capsys.readouterr().err


@pytest.mark.slow
def test_overrides_of_the_user_stay_and_their_layers_are_not_searched(
    words: list[str], tmp_path: Path
) -> None:
    glob = "visual.*.c_proj=skip"
    found = _run(words, tmp_path / "m.toml", "--max-size", "4 bits", "--override", glob)
    assert found["config"]["overrides"]["visual.*.c_proj"] == "skip"
    assert not any(
        "visual" in n and n.endswith("c_proj") for row in found["losses"] for n in row["layers"]
    )


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--max-size", "4 bits"], "--output"),
        (["--output", "x.toml"], "--max-size"),
        (["--max-size", "4 bits", "--output", "x.toml", "--exceptions", "0.1"], "--exceptions"),
        pytest.param(
            ["--max-size", "2 bits", "--output", "x.toml"], "narrowest", marks=pytest.mark.slow
        ),
        (["--max-size", "4 bits", "--output", "x.toml", "--candidates", "4"], "--candidates"),
        (["--max-size", "4 bits", "--output", "x.toml", "--max-act-bits", "3"], "--max-act-bits"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_in_one_line(
    words: list[str], tmp_path: Path, extra: list[str], named: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["sensitivity", *words, *SEARCH, *extra]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_sizes_are_read_with_units() -> None:
    assert size("2500000") == (2.5e6, False)
    assert size("2.5 MB") == (2.5e6, False)
    assert size("4 bits") == (4.0, True)


def test_a_configuration_survives_its_text(tmp_path: Path) -> None:
    config = QuantConfig(
        w_bits=4, a_bits=6, attention="log2", refit=False, overrides={"a.*": "w8a8", "b": "skip"}
    )
    values = tomllib.loads(config_text(config, "both", head=["Note"], notes={"b": "why"}))
    assert values.pop("towers") == "both"
    remedy, override = values.pop("remedy"), values.pop("override")
    plain = {key.replace("-", "_"): value for key, value in values.items()}
    assert QuantConfig.from_dict({**plain, **remedy, "overrides": override}) == config
