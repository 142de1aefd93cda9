"""Every export opens: all precisions, recipes, attentions, formats and packs of a toy, by a table."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends import exports
from qwt_fx.backends.exports import PACKS, runner_of
from qwt_fx.backends.widening import compute_in_float32
from qwt_fx.errors import PreconditionError
from qwt_fx.measure.measure import sqnr_db

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64
}  # fmt: skip
FILES = [("onnx", pack) for pack in PACKS] + [("pt2", "auto")]
ALL = list(product(DTYPES, ("repq-vit", "best"), ("none", "uniform", "log2"), FILES))
FAST = [  # `best` takes its seconds
    ("fp16", "repq-vit", "none", ("onnx", "auto")), ("bf16", "repq-vit", "log2", ("onnx", "int8")),
    ("bf16", "repq-vit", "uniform", ("onnx", "int4")), ("fp64", "repq-vit", "none", ("onnx", "auto")),
]  # fmt: skip
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id=f"{case}")
    for case in ALL
]


@lru_cache(maxsize=2)  # of 8 and of 4 bits; the files of one graph come one after another
def quantized(precision: str, recipe: str, attention: str, bits: int) -> tuple[GraphModule, Tensor]:
    x = tokens(8).to(DTYPES[precision])
    config = QuantConfig(
        w_bits=bits, a_bits=bits, recipe=recipe, attention=attention, compensation="qwt",
        hold_out=0.0,
    )  # fmt: skip
    model = randomize(Tower(layers=1)).to(DTYPES[precision])
    return qwt_fx.quantize(model, (x,), [x], config), x


@pytest.mark.parametrize(("precision", "recipe", "attention", "file"), CASES)
def test_every_export_opens_and_computes_the_graph(
    precision: str, recipe: str, attention: str, file: tuple[str, str], tmp_path: Path
) -> None:
    format, pack = file
    q, x = quantized(precision, recipe, attention, 4 if pack == "int4" else 8)
    path = tmp_path / f"tower.{format}"
    qwt_fx.export(q, path, x[:2], format=format, pack=pack)
    run = runner_of(path, format)
    with torch.no_grad():
        expected = q(x).float()
        got = run(x).float()
        assert sqnr_db(expected, got) > 20.0  # half precision's own rounding moves codes
        if format == "onnx":
            wide = copy.deepcopy(q)
            compute_in_float32(wide)
            expected = wide(x.float())
        assert sqnr_db(expected, got) > 50.0
        assert run(x[:1]).shape == (1, *x.shape[1:])
    if format == "onnx" and precision != "fp32":
        kinds = {i.data_type for i in onnx.load(str(path)).graph.initializer}
        assert onnx.TensorProto.DOUBLE not in kinds


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_aoti_package_opens_and_computes_the_graph(precision: str, tmp_path: Path) -> None:
    x = tokens(8).to(DTYPES[precision])
    model = randomize(Tower(layers=1)).to(DTYPES[precision])
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig(recipe="repq-vit"))
    qwt_fx.export(q, tmp_path / "tower.pt2", x[:2], format="aoti")
    with torch.no_grad():
        assert sqnr_db(q(x).float(), runner_of(tmp_path / "tower.pt2", "aoti")(x).float()) > 25.0


@pytest.mark.parametrize("format", ["onnx", "pt2", "aoti"])
def test_a_file_that_does_not_open_never_gets_its_name(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tokens(2)
    q = qwt_fx.quantize(randomize(Tower(layers=1)), (x,), [x], QuantConfig(recipe="repq-vit"))
    name = {"onnx": "export_onnx", "pt2": "save_pt2", "aoti": "save_aoti"}[format]
    path = tmp_path / f"new/tower{exports.SUFFIXES[format]}"

    def write(quantized: object, target: Path, inputs: object, **options: object) -> None:
        target.write_bytes(b"no model")

    monkeypatch.setattr(exports, name, write)
    with pytest.raises(PreconditionError, match=f"{path.name} does not open again: .*the format"):
        qwt_fx.export(q, path, x, format=format)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    path.write_bytes(b"an earlier export")
    with pytest.raises(PreconditionError) as caught:
        qwt_fx.export(q, path, x, format=format)
    assert str(tmp_path) not in str(caught.value)  # of the temporary folder
    assert path.read_bytes() == b"an earlier export"
