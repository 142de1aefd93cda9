"""`--remedy` and the `[remedy]` table set any remedy of a recipe; bad ones are refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from qwt_fx.cli import main
from qwt_fx.commands.arguments import add_quant, quant_config
from qwt_fx.commands.config_file import config_arguments


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
