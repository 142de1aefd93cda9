"""A graph refuses what it was not captured for, at every call and in every batch."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.errors import CaptureError, DataError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.input_check import Input

SHAPE = (3, 16, 24)
CONFIG = QuantConfig(8, 8, recipe="repq-vit")


class Sized(nn.Module):
    """Patches of an image of one size, as timm's ViTs check and embed it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8)
        self.position, self.head = nn.Parameter(torch.randn(1, 6, 8)), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        torch._assert(tuple(image.shape[1:]) == SHAPE, "Input size doesn't match the model")
        x = self.embed(image).flatten(2).transpose(1, 2)
        return self.head(self.norm(x + self.position).mean(1))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))


@cache
def _graphs() -> dict[str, GraphModule]:
    """The same model at every stage of its way."""
    torch.manual_seed(0)
    gm = qwt_fx.capture(Sized(), (images(),))
    q = qwt_fx.quantize(gm, (images(),), [images()], CONFIG)
    return {
        "captured": gm,
        "prepared": qwt_fx.prepare(gm, CONFIG),
        "quantized": q,
        "copied": copy.deepcopy(q),
        "eager": qwt_fx.lower(q, "eager"),
        "x86": qwt_fx.lower(q, "x86"),
    }


STAGES = ("captured", "prepared", "quantized", "copied", "eager", "x86", "loaded")
# What came, and what the message has to say of it.
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "transposed": ((torch.randn(2, 3, 24, 16),), r"\(2, 3, 24, 16\), wanted \(n, 3, 16, 24\)"),
    "same number of patches": ((torch.randn(2, 3, 8, 48),), r"got a tensor of shape"),
    "rounded down": ((torch.randn(2, 3, 17, 25),), r"capture \(and quantize\) the model with"),
    "channels": ((torch.randn(2, 4, 16, 24),), r"\(2, 4, 16, 24\), wanted \(n, 3, 16, 24\)"),
    "one image": ((torch.randn(3, 16, 24),), r"\(3, 16, 24\), wanted \(n, 3, 16, 24\)"),
    "bytes": ((images().byte(),), r"got a tensor of uint8, wanted float32"),
    "ids": ((images().long(),), r"got a tensor of int64, wanted float32"),
    "double": (
        (images().double(),),
        r"float64, wanted float32: convert it with .to\(torch.float32\)",
    ),
    "two inputs": ((images(), images()), r"inputs: got \(\.\.\., \.\.\.\), wanted \(image\)"),
    "no input": ((), r"inputs: got \(none\), wanted \(image\)"),
    "no tensor": ((None,), r"input 'image': got None, wanted a tensor \(n, 3, 16, 24\)"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_call_is_one_clear_line_at_every_stage(stage: str, tmp_path: Path) -> None:
    if stage == "loaded":
        qwt_fx.save(_graphs()["quantized"], tmp_path / "artifact")
        gm = qwt_fx.load(tmp_path / "artifact")
    else:
        gm = _graphs()[stage]
    for inputs, message in WRONG.values():
        with pytest.raises(DataError, match=message) as caught:
            gm(*inputs)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"got \(picture\), wanted \(image\)"):
        gm(picture=images())
    for batch in (1, 5):
        assert gm(images(batch)).shape == gm(image=images(batch)).shape == (batch, 4)


@pytest.mark.parametrize(
    "wrong", [w for w in WRONG if w not in ("no input", "no tensor", "two inputs")]
)
def test_a_wrong_calibration_batch_is_refused(wrong: str) -> None:
    inputs, message = WRONG[wrong]
    with pytest.raises(DataError, match=r"a calibration batch: input 'image'.*" + message):
        qwt_fx.quantize(_graphs()["captured"], (images(),), [images(), inputs[0]], QuantConfig())


def test_export_and_dynamo_see_the_check_and_keep_what_is_dynamic() -> None:
    q, x = _graphs()["quantized"], images(3)
    program = export(q, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert program.module()(images(7)).shape == (7, 4)
    whole, compiled = (torch.compile(q, backend="eager", fullgraph=full) for full in (True, False))
    with torch.no_grad():
        torch.testing.assert_close(whole(x), q(x))
        torch.testing.assert_close(compiled(x), q(x))
        with pytest.raises(DataError, match=r"wanted \(n, 3, 16, 24\)"):
            compiled(torch.randn(2, 3, 24, 16))


def test_onnx_has_fixed_sizes_and_a_dynamic_batch(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    qwt_fx.export(_graphs()["quantized"], tmp_path / "model.onnx", (images(),))
    (given,) = onnx.load(tmp_path / "model.onnx").graph.input
    batch, *rest = given.type.tensor_type.shape.dim
    assert batch.dim_param and [d.dim_value for d in rest] == list(SHAPE)


def test_a_graph_that_was_converted_takes_its_new_dtype() -> None:
    gm = copy.deepcopy(_graphs()["captured"])
    assert gm.double()(images().double()).dtype is torch.float64
    with pytest.raises(DataError, match="bfloat16"):
        gm(images().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which converts as it goes
        assert _graphs()["captured"](images().bfloat16()).shape == (2, 4)


def test_float32_for_a_half_precision_model_is_one_clear_line() -> None:
    model, x = Sized().bfloat16(), images()
    with pytest.raises(
        CaptureError, match=r"got torch.float32, the model's parameters are torch.bfl"
    ):
        qwt_fx.capture(model, (x,))
    gm = qwt_fx.capture(model, (x.bfloat16(),))
    for run in (gm, lambda x: qwt_fx.quantize(gm, (x.bfloat16(),), [x], CONFIG)):
        with pytest.raises(
            DataError, match=r"float32, wanted bfloat16: convert it with .to\(torch.bf"
        ):
            run(x)


class Kinds(nn.Module):
    """Casts what it is given before all else, or not."""

    def forward(self, image: Tensor, mask: Tensor, ids: Tensor, scale: float) -> Tensor:
        x = image.double().mean((1, 2, 3)) * mask.bool().any(1)
        return (x * scale + ids.sum(1)).float()


def test_kinds_that_the_graph_casts_are_taken_and_constants_are_not_changed() -> None:
    image, mask, ids = images(), torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5).long()
    gm = qwt_fx.capture(Kinds(), (image, mask, ids, 2.0))
    assert [i.dtype for i in graph_info(gm).inputs] == ["floating", "any", "int64", None]
    for other in ((image.half(), mask.bool(), ids.int()), (image.bfloat16(), mask.float(), ids)):
        torch.testing.assert_close(gm(*other, 2.0), Kinds()(*other, 2.0))
    with pytest.raises(DataError, match=r"input 'image': got a tensor of uint8, wanted floating"):
        gm(image.byte(), mask, ids, 2.0)
    with pytest.raises(DataError, match=r"input 'scale': got 3.0, wanted 2.0: what is no tensor"):
        gm(image, mask, ids, 3.0)
    with pytest.raises(DataError, match=r"'image' and 'ids': got sizes 2 and 1, wanted one size"):
        gm(image, mask, ids[:1], 2.0)


def test_ranges_of_an_exported_program_are_kept() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    sizes = {0: Dim("n", min=1, max=64), 1: Dim("length", min=3, max=9)}
    gm = qwt_fx.capture(export(Mean(), (torch.randn(2, 5, 4),), dynamic_shapes=(sizes,)), ())
    assert gm(torch.randn(7, 9, 4)).shape == (7, 4)
    with pytest.raises(DataError, match=r"wanted \(at most 64, at least 3 and at most 9, 4\)"):
        gm(torch.randn(7, 10, 4))


def test_records_of_inputs_are_stored_and_checked_when_read(tmp_path: Path) -> None:
    from qwt_fx.artifact.graph_info_json import info_from_json, info_to_json

    gm = _graphs()["captured"]
    entry: Any = info_to_json(gm)
    assert info_from_json(entry).inputs == graph_info(gm).inputs
    assert graph_info(gm).inputs[0].sizes[1:] == SHAPE
    assert not info_from_json({k: v for k, v in entry.items() if k != "inputs"}).inputs
    for bad in (
        "x", {}, {**entry["inputs"][0], "sizes": ["x"]}, {**entry["inputs"][0], "name": 3},
        {**entry["inputs"][0], "sizes": [["s", 1]]}, {**entry["inputs"][0], "value": [1]},
    ):  # fmt: skip
        with pytest.raises(qwt_fx.QwtError, match="info: inputs"):
            info_from_json({**entry, "inputs": [bad]})


def test_a_shape_is_shown_as_a_user_would_write_it() -> None:
    wanted = Input("ids", "int64", (("s0", 1, 1 << 20), ("s1", 1, 77)))
    assert wanted.shape == "(n, at most 77)"
    assert Input("x", "float32", (("s0", 1, None),)).shape == "(n,)"
