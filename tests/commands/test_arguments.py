"""`--remedy` and the `[remedy]` table set any remedy of a recipe; bad ones are refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from qwt_fx.cli import main
from qwt_fx.clip.preprocessing import PreprocessOverrides
from qwt_fx.commands import inputs
from qwt_fx.commands.arguments import add_model, add_quant, quant_config
from qwt_fx.commands.config_file import config_arguments
from qwt_fx.commands.config_text import config_text
from qwt_fx.commands.reproduce import command_line


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_quant(parser)
    return parser.parse_args(words)


def test_remedies_reach_the_configuration() -> None:
    config = quant_config(
        _parse(
            "--remedy", "refit=false", "--remedy", "reparameterization=0.5",
            "--remedy", "embedding_bits=32", "--remedy", "token_masks=all", "--exceptions", "0.1",
        )
    )  # fmt: skip
    assert config.refit is False
    assert config.reparameterization == 0.5
    assert config.embedding_bits == 32
    assert config.token_masks == "all"
    assert config.exceptions == 0.1


def test_activations_reach_the_configuration(tmp_path: Path) -> None:
    config = quant_config(_parse("--activations", "dynamic", "--override", "*.fc2=w6a4s"))
    assert config.activations == "dynamic"
    assert [config.bits_for(name).dynamic for name in ("a.fc1", "a.fc2")] == [True, False]
    file = tmp_path / "c.toml"
    file.write_text(config_text(config, "both"))
    parser = argparse.ArgumentParser()
    add_quant(parser)
    assert quant_config(parser.parse_args(config_arguments(parser, file))) == config


def test_a_config_file_holds_them_as_a_table(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("exceptions = 0.25\n[remedy]\nrefit = false\nrounding = 'nearest'\n")
    parser = argparse.ArgumentParser()
    add_quant(parser)
    config = quant_config(parser.parse_args(config_arguments(parser, file)))
    assert (config.refit, config.rounding, config.exceptions) == (False, "nearest", 0.25)


@pytest.mark.parametrize("word", ["refit", "nonsense=1", "refit=7", "rounding=up"])
def test_bad_remedies_end_with_exit_code_2(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["quantize", "--output", "x", "--remedy", word]))
    assert ended.value.code == 2
    assert "remedy" in capsys.readouterr().err


def _model_flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model(parser)
    return parser.parse_args(words)


def test_preprocessing_flags_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(inputs.clip, "load", lambda *names, **options: asked.update(options))
    inputs.load_model(
        _model_flags(
            "--model", "ViT-H-14", "--image-mean", "0.5", "0.25", "0.75", "--image-std", "1", "1", "1",
            "--resize-mode", "squash", "--interpolation", "bilinear",
        )
    )  # fmt: skip
    assert asked["preprocess"] == PreprocessOverrides(
        (0.5, 0.25, 0.75), (1.0, 1.0, 1.0), "squash", "bilinear"
    )
    inputs.load_model(_model_flags("--model", "ViT-H-14"))
    assert asked["preprocess"] == PreprocessOverrides()


def test_preprocessing_survives_a_config_file_and_the_command_that_repeats_a_run(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("image-mean = [0.5, 0.25, 0.75]\nresize_mode = 'longest'\n")
    parser = argparse.ArgumentParser()
    add_model(parser)
    args = parser.parse_args(config_arguments(parser, file))
    assert args.image_mean == [0.5, 0.25, 0.75]
    line = command_line({k: v for k, v in vars(args).items() if k != "device"}, "out")
    assert line is not None
    words = line.replace("\\\n", "").split()
    again = parser.parse_args(words[2:-2])
    assert (again.image_mean, again.resize_mode) == (args.image_mean, "longest")


def test_two_numbers_are_no_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["quantize", "--image-mean", "0.5", "0.5", "--output", "out"])
    assert "--image-mean: expected 3 arguments" in capsys.readouterr().err
