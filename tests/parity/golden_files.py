"""The golden files, the small CLIP they describe, and its captured towers."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import open_clip
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule

from qwt_fx import api

COMMITTED = Path(__file__).parent.parent / "golden"
FOLDER = Path(os.environ.get("QWT_FX_GOLDEN", COMMITTED.parents[2] / "shared" / "golden"))
CLIP_FILE = re.compile(r"(image_only|all_quant)_w(\d)a(\d)(_qwt)?\.safetensors")
ATTENTION_FILE = re.compile(r"attention_image_w(\d)a(\d)\.safetensors")


def list_files(pattern: re.Pattern[str]) -> list[Path]:
    """Every file of this kind, of whatever bit width, the committed ones first."""
    folders = [folder for folder in (COMMITTED, FOLDER) if folder.is_dir()]
    return [p for folder in folders for p in sorted(folder.iterdir()) if pattern.fullmatch(p.name)]


def is_full(path: Path) -> bool:
    """Whether the file lies in the full set; the committed one holds the image tower's part."""
    return path.parent != COMMITTED


def golden_id(path: Path) -> str:
    """What a test of this file is called."""
    return path.stem if is_full(path) else f"committed_{path.stem}"


class _Image(nn.Module):
    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, image: Tensor) -> Tensor:
        return self.visual(image)


class _Text(nn.Module):
    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        for name, child in model.named_children():
            if name != "visual":
                setattr(self, name, child)
        self.positional_embedding = model.positional_embedding
        self.text_projection = model.text_projection
        self.register_buffer("attn_mask", model.attn_mask, persistent=False)
        self.text_pool_type = model.text_pool_type
        self.text_eos_id = getattr(model, "text_eos_id", None)  # open_clip 3.1 and newer ask for it

    def forward(self, text: Tensor) -> Tensor:
        return open_clip.CLIP.encode_text(self, text)


@cache
def golden_towers(folder: Path, strict: bool = False) -> dict[str, GraphModule]:
    """The captured image tower, and the text tower where the files hold its inputs."""
    model = open_clip.CLIP(
        embed_dim=32,
        quick_gelu=True,
        vision_cfg={"image_size": 32, "layers": 3, "width": 128, "head_width": 64, "patch_size": 8},
        text_cfg={"context_length": 16, "vocab_size": 512, "width": 128, "heads": 2, "layers": 3},
    )
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    given = golden_inputs(folder)
    found = {"visual": api.capture(_Image(model.eval()), (given["calib.images.0"],), strict=strict)}
    if folder != COMMITTED:
        found["text"] = api.capture(_Text(model), (given["calib.texts.0"],), strict=strict)
    return found


@cache
def golden_inputs(folder: Path) -> dict[str, Tensor]:
    """Calibration, evaluation and class inputs."""
    return load_file(folder / "inputs.safetensors")


def golden_batches(folder: Path, tower: str, count: int) -> list[Tensor]:
    """The first calibration batches of a tower."""
    key = "images" if tower == "visual" else "texts"
    return [golden_inputs(folder)[f"calib.{key}.{i}"] for i in range(count)]
