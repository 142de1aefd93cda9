"""`--verify` lets rounding pass and nothing else: what an export may differ by, and broken files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_clip import small_config, small_model
from torch import Tensor, nn

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends.exports import runner_of
from qwt_fx.clip.clip import ClipModel
from qwt_fx.clip.towers import ImageTower, TextTower
from qwt_fx.commands import verify
from qwt_fx.commands.screen import Screen
from qwt_fx.errors import CheckFailed
from qwt_fx.measure.floating import floating_graph
from qwt_fx.measure.measure import sqnr_db

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SCREEN = Screen(quiet=True)
CONFIG = small_config(vision_cfg={"layers": 1}, text_cfg={"layers": 1, "vocab_size": 64})


@pytest.fixture(scope="module")
def model() -> ClipModel:
    return _quantized("fp32")


def _quantized(precision: str, bits: int = 4) -> ClipModel:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    small = small_model(CONFIG).to(dtype)
    known = {"size": (16, 24)}
    shell = ClipModel(
        "small", None, nn.Identity(), nn.Identity(), 20.0, CONFIG, known, {"context_length": 12}
    )
    settings = QuantConfig(w_bits=bits, a_bits=bits, recipe="repq-vit")
    for name, tower in (("image", ImageTower(small)), ("text", TextTower(small))):
        batch = shell.example(name, 8)
        setattr(shell, name, qwt_fx.quantize(tower, (batch,), [(batch,)], settings))
    return shell


@pytest.fixture(scope="module")
def files(model: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _exported(model, tmp_path_factory.mktemp("files"), "onnx")


def _exported(model: ClipModel, folder: Path, format: str) -> dict[str, Path]:
    found = {}
    for name, tower in model.towers.items():
        found[name] = folder / f"{name}.{format}"
        qwt_fx.export(tower, found[name], model.example(name, 2), format=format)
    return found


def _verify(model: ClipModel, files: dict[str, Path], floating: ClipModel | None = None) -> None:
    exported = verify.Exported(files, next(iter(files.values())).suffix[1:])
    verify.verify(model, floating, exported, verify.noise_batches(model), SCREEN)


def test_a_right_export_passes_and_says_on_what_and_by_what(
    model: ClipModel, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _verify(model, files)
    shown = capsys.readouterr()
    assert "activations in float against eager" in shown.out
    assert "wanted (dB)" in shown.out
    assert "x86 against eager" in shown.out
    assert "on 32 pairs; a right export lies 10 dB below what quantization costs" in shown.err


@pytest.mark.slow
def test_a_half_precision_artifact_is_compared_as_the_file_computes(tmp_path: Path) -> None:
    model = _quantized("bf16", bits=8)
    path = tmp_path / "image.onnx"
    qwt_fx.export(model.towers["image"], path, model.example("image", 2))
    _verify(model, {"image": path})


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_bound_is_quantizations_own_noise_or_what_rounding_does(
    tower: str, model: ClipModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = model.example(tower, 32)
    quantized = model.towers[tower]
    with torch.no_grad():
        exact = quantized(x)
        cost = sqnr_db(exact, floating_graph(quantized)(x))
        rounding = sqnr_db(exact, qwt_fx.lower(quantized, "x86")(x))
    bound = min(cost + verify.MARGIN_DB, rounding - verify.ROUNDING_DB)
    monkeypatch.setattr(verify, "ENOUGH_DB", 80.0)  # one block alone is better than whole models
    assert bound < verify.ENOUGH_DB
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))

    def off_by(margin: float) -> Callable[..., Callable[[Tensor], Tensor]]:
        def runner(path: Path, *args: object) -> Callable[[Tensor], Tensor]:
            if path.stem != tower:
                return runner_of(path, "onnx")
            scale = exact.norm() / noise.norm() * 10.0 ** (-(bound + margin) / 20.0)
            return lambda inputs: exact + scale * noise

        return runner

    monkeypatch.setattr(verify, "runner_of", off_by(0.5))
    monkeypatch.setattr(verify, "ENOUGH_AGREEMENT", 0.0)
    _verify(model, files)
    monkeypatch.setattr(verify, "runner_of", off_by(-0.5))
    with pytest.raises(CheckFailed, match=rf"exported: the {tower} tower has .* dB, wanted"):
        _verify(model, files)


def _scale(weights: dict[str, np.ndarray]) -> None:
    name = next(n for n in weights if n.endswith("c_fc_onnx_scale"))
    weights[name] = weights[name] * np.float32(1.5)


def _weight(weights: dict[str, np.ndarray]) -> None:
    name = next(n for n in weights if n.endswith("out_proj_onnx_codes"))
    weights[name] = np.roll(weights[name], 1, axis=0)


def _swapped(weights: dict[str, np.ndarray]) -> None:
    """The weights of q, k and v in another order, as if layers were mixed up."""
    for part in ("codes", "scale"):
        name = next(n for n in weights if n.endswith(f"in_proj_onnx_{part}"))
        weights[name] = np.roll(weights[name], weights[name].shape[-1] // 3, axis=-1)


@pytest.mark.parametrize("fault", [_scale, _weight, _swapped])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_broken_export_fails(
    tower: str,
    fault: Callable[[dict[str, np.ndarray]], None],
    model: ClipModel,
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    broken = onnx.load(str(files[tower]))
    read = {i.name: onnx.numpy_helper.to_array(i) for i in broken.graph.initializer}
    weights = dict(read)
    fault(weights)
    for one in broken.graph.initializer:
        if weights[one.name] is not read[one.name]:
            one.CopyFrom(onnx.numpy_helper.from_array(weights[one.name], one.name))
    onnx.save(broken, str(tmp_path / f"{tower}.onnx"))
    with pytest.raises(CheckFailed, match=rf"exported: the {tower} tower has"):
        _verify(model, files | {tower: tmp_path / f"{tower}.onnx"})


def test_with_the_floating_point_model_that_is_the_yardstick(
    model: ClipModel, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small = small_model(CONFIG)
    floating = replace(model, image=ImageTower(small), text=TextTower(small))
    _verify(model, files, floating)
    assert "FP32 against eager" in capsys.readouterr().out
