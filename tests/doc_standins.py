"""What takes the place of downloads and large files when the documentation's code is run.

Each is called as STAND_INS[name](space, monkeypatch) in the folder where the page's code runs; it may
patch a loader, write files, or define names in `space`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from shard_files import write_tar
from small_clip import small_model, write_config
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.cli import main

Space = dict[str, Any]
StandIn = Callable[[Space, pytest.MonkeyPatch], None]
MODEL = ["--model", "model.json", "--pretrained", "model.safetensors"]


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write_clip() -> None:
    write_config(Path("model.json"))
    state = {name: value.contiguous() for name, value in small_model().state_dict().items()}
    save_file(state, "model.safetensors")


def photos(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of 8 images, and a small CLIP in place of OpenAI's ViT-B/32."""
    for i in range(8):
        path = Path("photos", "any", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(i))
    _write_clip()
    load = qwt_fx.clip.load

    def small(name: str, pretrained: str | None = None, **options: Any) -> Any:
        assert (name, pretrained) == ("ViT-B-32", "openai")
        return load("model.json", "model.safetensors", **options)

    monkeypatch.setattr(qwt_fx.clip, "load", small)


def timm(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights and one block in place of timm's pretrained models."""
    import timm

    create = timm.create_model

    def small(name: str, pretrained: bool = False, **options: Any) -> Any:
        return create(name, pretrained=False, depth=1, **options)

    if not getattr(create, "small", False):
        small.small = True  # type: ignore[attr-defined]
        monkeypatch.setattr(timm, "create_model", small)


def hf(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random towers in place of openai/clip-vit-base-patch32 and SigLIP 2's NaFlex."""
    import transformers

    size = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 16}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    for kind, repository, more in (
        ("CLIPVision{}WithProjection", "openai/clip-vit-base-patch32", {"image_size": 32}),
        ("CLIPText{}WithProjection", "openai/clip-vit-base-patch32", {}),
        ("Siglip2Vision{}", "google/siglip2-base-patch16-naflex", {"num_patches": 64}),
    ):
        model = getattr(transformers, kind.format("Model"))
        config = model.config_class(**size, **more, **({"patch_size": 16} if "V" in kind else {}))

        def load(
            name: str, model: Any = model, config: Any = config, wanted: str = repository
        ) -> Any:
            assert name == wanted
            return model(config)

        monkeypatch.setattr(model, "from_pretrained", load)


def tower(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model`, a tower of two blocks, and `batches` for it."""
    space["model"] = randomize(Tower())
    space["batches"] = [tokens(8), tokens(8, seed=2)]


def quantized(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """`q`, that tower quantized by `best`, and `x` for it."""
    tower(space, monkeypatch)
    x = space["x"] = space["batches"][0]
    space["q"] = qwt_fx.quantize(space["model"], (x,), space["batches"], QuantConfig())


def artifact(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts vit-b-32-w6a6 and vit-b-32-w8a8 of a small CLIP, and `image`, a picture."""
    space["image"] = Image.open(io.BytesIO(_png(0)))
    _write_clip()
    pairs = [
        (f"{i:03d}.{end}", _png(i) if end == "png" else f"picture {i}".encode())
        for i in range(16)
        for end in ("png", "txt")
    ]
    write_tar(Path("pairs.tar"), pairs)
    for bits in ("6", "8"):
        words = ["quantize", *MODEL, "--train-data", "pairs.tar", "--calib-samples", "16"]
        words += ["--batch-size", "8", "--w-bits", bits, "--a-bits", bits, "--quiet"]
        words += ["--recipe", "repq-vit", "--output", f"vit-b-32-w{bits}a{bits}"]
        assert main(words) == 0


def _exported(space: Space, monkeypatch: pytest.MonkeyPatch, folder: str, *more: str) -> None:
    artifact(space, monkeypatch)
    space["images"] = np.random.default_rng(0).random((4, 3, 16, 24), dtype=np.float32)
    words = ["export", "--artifact", "vit-b-32-w8a8", "--tower", "image", "--output", folder]
    assert main([*words, "--quiet", *more]) == 0


def onnx(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image tower of that artifact in vit-b-32-onnx, and numpy `images` for it."""
    _exported(space, monkeypatch, "vit-b-32-onnx", "--format", "onnx")


def openvino(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the weights that OpenVINO takes, in vit-b-32-openvino."""
    _exported(space, monkeypatch, "vit-b-32-openvino", "--format", "onnx", "--pack", "int8")


def pt2(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as vit-b-32-pt2/image.pt2, and torch `images` for it."""
    import torch

    _exported(space, monkeypatch, "vit-b-32-pt2", "--format", "pt2")
    space["images"] = torch.from_numpy(space["images"])


STAND_INS: dict[str, StandIn] = {
    f.__name__: f for f in (photos, timm, hf, tower, quantized, artifact, onnx, openvino, pt2)
}
