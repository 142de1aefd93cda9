"""The models: one per architecture style, built from their libraries' own constructors.

Random weights need no download. Most are made narrower or shallower than the published sizes
through constructor arguments, so that the whole table takes minutes; the style stays. Add a model
by adding a line to `ZOO`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int, int], Tensor]
START, END, VOCABULARY = 62, 63, 64


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: library and model, as the table shows it.
        build: makes the model with the library's own initialization.
        inputs: (samples, seed) -> the model's input batch.
        fast: tested by `make test`, not only by `make test-full`.
        strict: TorchDynamo can capture it too.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    fast: bool = False
    strict: bool = True


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(size: int) -> Inputs:
    """Smooth random images (n, 3, size, size): neighbouring pixels resemble each other."""

    def make(samples: int, seed: int) -> Tensor:
        coarse = torch.randn(samples, 3, -(-size // 8), -(-size // 8), generator=_generator(seed))
        smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        return smooth + 0.3 * torch.randn(smooth.shape, generator=_generator(seed + 1))

    return make


def captions(length: int) -> Inputs:
    """Token ids (n, length): a start, words, an end (the largest id), then zeros."""

    def make(samples: int, seed: int) -> Tensor:
        generator = _generator(seed)
        ids = torch.randint(1, START, (samples, length), generator=generator)
        ends = torch.randint(length // 4, length, (samples, 1), generator=generator)
        position = torch.arange(length)
        ids = torch.where(position > ends, 0, torch.where(position == ends, END, ids))
        ids[:, 0] = START
        return ids

    return make


def _open_clip(name: str, image: bool = True, **changes: Any) -> nn.Module:
    """A tower of a named open_clip model with fields of its config replaced."""
    import open_clip

    from qwt_fx.clip.towers import ImageTower, TextTower

    config = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if part in config:
            config[part] = {**config[part], **changes.get(part, {})}
    custom = config.pop("custom_text", False)
    if "multimodal_cfg" in config:
        model: nn.Module = open_clip.CoCa(**config)
    else:
        model = open_clip.CustomTextCLIP(**config) if custom else open_clip.CLIP(**config)
    return ImageTower(model) if image else TextTower(model)


_NO_TEXT = {"layers": 1, "width": 64, "heads": 1, "vocab_size": VOCABULARY, "context_length": 16}
_SMALL_TEXT = {**_NO_TEXT, "layers": 4, "width": 128, "heads": 2}


def _clip_image(name: str, **vision: Any) -> Callable[[], nn.Module]:
    changes = {"vision_cfg": vision, "text_cfg": _NO_TEXT, "multimodal_cfg": _NO_TEXT}
    return lambda: _open_clip(name, **changes)


def _clip_text(name: str) -> Callable[[], nn.Module]:
    vision = {"layers": 1, "width": 64, "head_width": 64, "image_size": 32, "patch_size": 16}
    multimodal = {**_NO_TEXT, "layers": 1}
    changes = {"vision_cfg": vision, "text_cfg": _SMALL_TEXT, "multimodal_cfg": multimodal}
    return lambda: _open_clip(name, image=False, **changes)


def timm_model(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **changes)

    return build


class _Output(nn.Module):
    """A Hugging Face model, giving one tensor of its output."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x), self.key)


def _hf(name: str, key: str = "pooler_output", **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        return _Output(kind(kind.config_class(**config)), key)

    return build


def _torchvision(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, **changes)

    return build


_HF_VISION = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
}  # fmt: skip
_HF_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 2, "max_position_embeddings": 24, "vocab_size": VOCABULARY,
    "eos_token_id": END, "bos_token_id": START, "pad_token_id": 0,
}  # fmt: skip
_DEPTH_6 = {"img_size": 64, "depth": 6}
_RMS = {"img_size": 64, "depth": 4, "norm_layer": "rmsnorm"}
_SWIN = {"img_size": 56, "depths": (2, 2, 2, 2)}
_SWIN2 = {"img_size": 96, "window_size": 6, "depths": (2, 2, 2, 2)}
_SIGLIP = {"timm_model_name": "vit_small_patch32_224", "image_size": 224}
_HYBRID = {"timm_model_name": "vit_tiny_r_s16_p8_224", "image_size": 224}
_CLIP_VISION = {"layers": 4, "width": 128, "head_width": 64, "image_size": 64}

ZOO: tuple[Entry, ...] = (
    Entry("open_clip ViT-B-32", _clip_image("ViT-B-32", layers=4, image_size=128), images(128)),
    Entry("open_clip ViT-B-32 text", _clip_text("ViT-B-32"), captions(16)),
    Entry("open_clip ViT-B-16", _clip_image("ViT-B-16", **_CLIP_VISION), images(64), fast=True),
    Entry("open_clip ViT-L-14", _clip_image("ViT-L-14", layers=3, image_size=56), images(56)),
    Entry("open_clip SigLIP type", _clip_image("ViT-B-16-SigLIP", **_SIGLIP), images(224)),
    Entry("open_clip ViT-B-16-SigLIP text", _clip_text("ViT-B-16-SigLIP"), captions(16)),
    Entry("open_clip coca_ViT-B-32", _clip_image("coca_ViT-B-32", **_CLIP_VISION), images(64)),
    Entry("open_clip coca_ViT-B-32 text", _clip_text("coca_ViT-B-32"), captions(16)),
    Entry(
        "open_clip timm tower", _clip_image("vit_medium_patch16_gap_256", **_HYBRID), images(224)
    ),
    Entry("timm vit_tiny", timm_model("vit_tiny_patch16_224", img_size=64), images(64)),
    Entry("timm vit_small", timm_model("vit_small_patch32_224", img_size=128), images(128)),
    Entry("timm vit_base", timm_model("vit_base_patch32_224", img_size=128, depth=4), images(128)),
    Entry("timm deit", timm_model("deit_tiny_distilled_patch16_224", img_size=64), images(64)),
    Entry("timm deit3", timm_model("deit3_small_patch16_224", img_size=64, depth=6), images(64)),
    Entry("timm beit", timm_model("beit_base_patch16_224", img_size=64, depth=4), images(64)),
    Entry("timm swin", timm_model("swin_tiny_patch4_window7_224", **_SWIN), images(56)),
    Entry("timm swinv2", timm_model("swinv2_tiny_window8_256", **_SWIN2), images(96)),
    Entry("timm eva02", timm_model("eva02_tiny_patch14_224", img_size=70, depth=6), images(70)),
    Entry("timm cait", timm_model("cait_xxs24_224", img_size=64, depth=6), images(64)),
    Entry(
        "timm xcit", timm_model("xcit_nano_12_p16_224", img_size=64, depth=4), images(64), fast=True
    ),
    Entry("timm vit_relpos", timm_model("vit_relpos_small_patch16_224", **_DEPTH_6), images(64)),
    Entry("timm dinov3", timm_model("vit_small_patch16_dinov3", img_size=64, depth=4), images(64)),
    Entry("timm pvt_v2", timm_model("pvt_v2_b0"), images(128)),
    Entry(
        "timm vit_tiny, RMSNorm", timm_model("vit_tiny_patch16_224", **_RMS), images(64), fast=True
    ),
    Entry(
        "timm pe_core at 128",
        timm_model("vit_pe_core_tiny_patch16_384", img_size=128, depth=4),
        images(128),
    ),
    Entry(
        "timm eva02 at 98", timm_model("eva02_tiny_patch14_336", img_size=98, depth=4), images(98)
    ),
    Entry(
        "timm siglip2 at 128",
        timm_model("vit_base_patch32_siglip_256", img_size=128, depth=4),
        images(128),
    ),
    Entry("transformers DINOv3ViTModel", _hf("DINOv3ViTModel", **_HF_VISION), images(64)),
    Entry(
        "transformers Dinov2WithRegistersModel",
        _hf("Dinov2WithRegistersModel", **_HF_VISION),
        images(64),
    ),
    Entry("transformers CLIPVisionModel", _hf("CLIPVisionModel", **_HF_VISION), images(64)),
    Entry("transformers CLIPTextModel", _hf("CLIPTextModel", **_HF_TEXT), captions(24), fast=True),
    Entry("transformers SiglipVisionModel", _hf("SiglipVisionModel", **_HF_VISION), images(64)),
    Entry("transformers ViTModel", _hf("ViTModel", **_HF_VISION), images(64)),
    Entry("transformers Dinov2Model", _hf("Dinov2Model", **_HF_VISION), images(64), fast=True),
    Entry("transformers Aimv2VisionModel", _hf("Aimv2VisionModel", **_HF_VISION), images(64)),
    Entry("transformers BertModel", _hf("BertModel", **_HF_TEXT), captions(24), fast=True),
    Entry("torchvision vit_b_16", _torchvision("vit_b_16", image_size=64), images(64)),
    Entry("torchvision swin_t", _torchvision("swin_t"), images(56)),
)
