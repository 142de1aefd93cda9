from __future__ import annotations

import pytest

from qwt_fx.cli import main
from qwt_fx.config.compensation_kind import CompensationKind, parse_compensation
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError

GOOD = ("none", "qwt", "affine", "lowrank:1", "lowrank:32", "int8")
BAD = ("", "QWT", "lowrank", "lowrank:", "lowrank:0", "lowrank:-1", "lowrank:1.5", "lowrank:+3",
       "lowrank:08", "lowrank:4 ", "qwt:4", "int4", 8, None, True)  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_every_form_is_read_and_written_back(text: str) -> None:
    assert str(parse_compensation(text)) == text
    assert QuantConfig(compensation=text).compensation == text


def test_rank_is_a_number() -> None:
    assert parse_compensation("lowrank:32") == CompensationKind("lowrank", 32)
    assert parse_compensation("qwt") == CompensationKind("qwt")


@pytest.mark.parametrize("value", BAD)
def test_anything_else_is_refused_naming_the_forms(value: object) -> None:
    with pytest.raises(ConfigError, match="wanted one of none, qwt, affine, lowrank:R, int8"):
        parse_compensation(value)
    with pytest.raises(ConfigError, match="wanted one of auto, none, qwt, affine, lowrank:R, int8"):
        QuantConfig(compensation=value)  # type: ignore[arg-type]


def test_the_published_procedure_knows_qwt_alone() -> None:
    for text in ("auto", "none", "qwt"):
        QuantConfig(recipe="repq-vit", compat="original", compensation=text)
    for text in ("affine", "lowrank:4", "int8"):
        with pytest.raises(ConfigError, match="the published procedure knows none and qwt"):
            QuantConfig(recipe="repq-vit", compat="original", compensation=text)


def test_command_line_names_the_forms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", "--model", "ViT-B-32", "--compensation", "lowrank:0"])
    assert stopped.value.code == 2
    wanted = (
        "--compensation: got 'lowrank:0', wanted one of auto, none, qwt, affine, lowrank:R, int8"
    )
    assert wanted in capsys.readouterr().err
