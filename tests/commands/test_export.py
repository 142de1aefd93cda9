"""`qwt-fx export` end to end: files, preprocessing, verification, and runs without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_clip import small_config, small_model
from torch import nn
from torch.fx import GraphModule

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.artifact.artifact import write_artifact
from qwt_fx.backends.exports import runner_of
from qwt_fx.cli import main
from qwt_fx.clip import clip
from qwt_fx.clip.clip import ClipModel
from qwt_fx.clip.towers import ImageTower, TextTower
from qwt_fx.commands import verify
from qwt_fx.demo.assets import write_files
from qwt_fx.errors import PreconditionError
from qwt_fx.evaluate.metrics import normalized

pytest.importorskip("onnxruntime")
SCRIPT = Path(__file__).parents[1] / "backends" / "numpy_only.py"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP, quantized to 8/8 with the log-sqrt2 softmax."""
    folder = tmp_path_factory.mktemp("small") / "artifact"
    return _write(folder, QuantConfig(recipe="repq-vit", attention="log2"))


def _write(folder: Path, settings: QuantConfig) -> Path:
    folder.mkdir()
    config = small_config(vision_cfg={"layers": 1}, text_cfg={"layers": 1})
    model = small_model(config)
    shell = ClipModel(
        "small", None, nn.Identity(), nn.Identity(), 20.0, config,
        {
            "size": (16, 24), "mode": "RGB", "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1),
            "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0,
        },
        {"source": None, "context_length": 12, "mode": None, "kwargs": {}},
    )  # fmt: skip
    towers: dict[str, GraphModule] = {}
    for name, tower, batch in (
        ("image", ImageTower(model), shell.image_example(8)),
        ("text", TextTower(model), shell.text_example(8)),
    ):
        towers[name] = qwt_fx.quantize(tower, (batch,), [(batch,)], settings)
    extra = clip.to_extra(shell) | {"quantized_towers": ["image", "text"], "classifier": None}
    write_artifact(folder, towers, config=settings.to_dict(), extra=extra)
    return folder


@pytest.fixture(scope="module")
def exported(artifact: Path) -> Path:
    folder = artifact.parent / "onnx"
    words = ["export", "--artifact", str(artifact), "--format", "onnx", "--output", str(folder)]
    assert main([*words, "--verify"]) == 0
    return folder


def _without_torch(folder: Path, images: np.ndarray, texts: np.ndarray, tmp: Path) -> dict:  # type: ignore[type-arg]
    np.save(tmp / "images.npy", images)
    np.save(tmp / "texts.npy", texts)
    names = [folder / "image.onnx", folder / "text.onnx", tmp / "images.npy", tmp / "texts.npy"]
    words = [sys.executable, "-I", str(SCRIPT), *map(str, names), str(tmp / "f.npz")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp / "f.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in found}


def test_the_folder_holds_all_that_running_needs(artifact: Path, exported: Path) -> None:
    assert sorted(p.name for p in exported.iterdir()) == [
        "image.onnx", "preprocess.json", "text.onnx", "tokenizer.txt"
    ]  # fmt: skip
    known = json.loads((exported / "preprocess.json").read_text())
    assert known["outputs"] == {
        "image": "image_features", "text": "text_features", "normalized": False
    }  # fmt: skip
    assert known["text"]["context_length"] == 12
    assert "49407" in (exported / "tokenizer.txt").read_text()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_the_description_of_the_preprocessing_is_enough_to_do_it(
    artifact: Path, exported: Path, mode: str
) -> None:
    known = json.loads((exported / "preprocess.json").read_text())
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    wide = pixels[..., 0].astype(np.uint16) * 256 + pixels[..., 1]
    colors = Image.fromarray(pixels)
    image = (
        Image.fromarray(wide)
        if mode == "I;16"
        else colors
        if mode == "RGBA"
        else colors.convert(mode)
    )
    assert image.mode == mode
    assert known["image"]["color"] == (
        "RGB of 8 bits before resizing: alpha dropped, grey repeated, 16 bits >> 8"
    )
    picture = Image.fromarray((wide >> 8).astype(np.uint8)) if mode == "I;16" else image
    picture = picture.convert("RGB")
    assert known["image"]["resize_mode"] == "squash"
    size = (known["image"]["width"], known["image"]["height"])
    resized = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    mean, std = (np.array(known["image"][key], dtype=np.float32) for key in ("mean", "std"))
    mine = ((resized * known["image"]["scale"] - mean) / std).transpose(2, 0, 1)
    torch.testing.assert_close(
        torch.from_numpy(mine), clip.load(artifact).transform(image), atol=1e-5, rtol=1e-5
    )


def test_onnxruntime_and_numpy_alone_run_the_towers(
    artifact: Path, exported: Path, tmp_path: Path
) -> None:
    model = clip.load(artifact)
    images, texts = model.image_example(9), model.text_example(9)
    found = _without_torch(exported, images.numpy(), texts.numpy(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found["image"], model.image(images), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["text"], model.text(texts), atol=1e-4, rtol=1e-4)


def test_export_says_where_int8_is_faster(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    symmetric = _write(
        tmp_path / "symmetric", QuantConfig(recipe="repq-vit", symmetric_weights=True)
    )

    def noted(source: Path, pack: str) -> bool:
        words = ["export", "--artifact", str(source), "--format", "onnx", "--tower", "image"]
        assert main([*words, "--output", str(tmp_path / "out"), "--pack", pack, "--force"]) == 0
        return "--pack int8 is faster" in capsys.readouterr().err

    assert noted(symmetric, "auto")
    assert not noted(symmetric, "int8")
    assert not noted(artifact, "auto")  # asymmetric 8-bit weights do not fit int8


def test_verify_shows_the_figures_and_fails_with_3(
    artifact: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["export", "--artifact", str(artifact), "--format", "pt2", "--tower", "image",
             "--output", str(artifact.parent / "pt2"), "--verify"]  # fmt: skip
    capsys.readouterr()
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "exported against eager" in shown.out
    assert "100.00" in shown.out
    assert "noise" in shown.err
    assert "no FP32 model" in shown.err

    def other(*args: object) -> object:
        return lambda x: -runner_of(artifact.parent / "pt2" / "image.pt2", "pt2")(x)

    monkeypatch.setattr(verify, "runner_of", other)
    assert main(words) == 3
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "image tower has -6.0 dB" in message
    assert "top-1 agrees on" in message


def test_an_export_replaces_an_export_and_nothing_else(
    artifact: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--artifact", str(artifact), "--format", "pt2", "--tower", "image"]
    output = artifact.parent / "again"
    assert main([*words, "--output", str(output)]) == 0
    assert main([*words, "--output", str(output)]) == 0
    (output / "notes.txt").write_text("mine")
    assert main([*words, "--output", str(output)]) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert main([*words, "--output", str(artifact.parent / "x"), "--pack", "int4"]) == 2
    assert main([*words, "--output", str(artifact.parent / "x"), "--model", "ViT-B-32"]) == 2
    assert not (artifact.parent / "x").exists()


def test_pt2_takes_any_batch_and_any_length(artifact: Path, tmp_path: Path) -> None:
    model = clip.load(artifact)
    texts = model.text_example(7)
    path = tmp_path / "text.pt2"
    assert isinstance(model.text, GraphModule)
    qwt_fx.export(model.text, path, texts[:1], format="pt2")
    run = runner_of(path, "pt2")
    short = texts.clone()
    short[:, 5:] = 0
    with torch.no_grad():
        for ids in (texts, texts[:1], short[:, :8].contiguous()):
            torch.testing.assert_close(run(ids), model.text(ids))
    for format, name in (("pt2", "b.pt2"), ("onnx", "b.onnx")):
        with pytest.raises(PreconditionError, match="whole context of 12"):
            qwt_fx.export(model.text, tmp_path / name, short[:, :8], format=format)


@pytest.mark.slow
def test_aoti_packages_run(artifact: Path, tmp_path: Path) -> None:
    model = clip.load(artifact)
    images = model.image_example(7)
    path = tmp_path / "image.pt2"
    assert isinstance(model.image, GraphModule)
    qwt_fx.export(model.image, path, images[:1], format="aoti")
    run = runner_of(path, "aoti")
    with torch.no_grad():
        for batch in (images, images[:1]):
            torch.testing.assert_close(run(batch), model.image(batch), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_demos_accuracy_is_reproduced_without_torch(tmp_path: Path) -> None:
    write_files(tmp_path, "hard")
    weights = str(tmp_path / "model.safetensors")
    names = ["--model", str(tmp_path / "model.json"), "--pretrained", weights]
    data = ["--train-data", str(tmp_path / "calib-{000..003}.tar"), "--calib-samples", "128"]
    bits = ["--w-bits", "6", "--a-bits", "6"]
    assert main(["quantize", *names, *data, *bits, "--output", str(tmp_path / "a")]) == 0
    words = ["export", "--artifact", str(tmp_path / "a"), "--format", "onnx", "--verify"]
    assert main([*words, *names, *data, "--output", str(tmp_path / "o")]) == 0
    model = clip.load(tmp_path / "a")
    folders = sorted((tmp_path / "val").iterdir())
    classes = (tmp_path / "classnames.txt").read_text().splitlines()
    template = (tmp_path / "templates.txt").read_text().splitlines()[0]
    files = [(file, k) for k, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    files = files[::4]
    labels = torch.tensor([k for _, k in files])
    images = torch.stack([model.transform(Image.open(file).convert("RGB")) for file, _ in files])
    texts = model.tokenizer([template.format(name) for name in classes])
    found = _without_torch(tmp_path / "o", images.numpy(), texts.numpy(), tmp_path)
    with torch.no_grad():
        eager = {"image": model.image(images), "text": model.text(texts)}
    mine, theirs = (
        (normalized(side["image"]) @ normalized(side["text"]).T).argmax(1)
        for side in (found, eager)
    )
    assert float((mine == theirs).double().mean()) >= 0.995
    accuracy, expected = (float((p == labels).double().mean()) for p in (mine, theirs))
    assert abs(accuracy - expected) <= 0.005
    assert accuracy > 0.9
