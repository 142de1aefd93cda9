"""Tensors of transformers' CLIP and SigLIP under open_clip's names; what its folders say beside them.

transformers keeps query, key and value apart and its projections as linears; open_clip has them as one
matrix, rows in this order, and CLIP's projections transposed. Neither library ships this direction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_MARK = "vision_model.embeddings.patch_embedding.weight"
# Within a tower, first that matches; CLIP's images are open_clip's own, SigLIP's timm's.
_BLOCK = (
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.in_proj_", r"transformer.resblocks.\1.attn.in_proj_"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", r"transformer.resblocks.\1.attn.out_proj"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1", r"transformer.resblocks.\1.mlp.c_fc"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2", r"transformer.resblocks.\1.mlp.c_proj"),
)
_TEXT = (
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm", "ln_final"),
    (r"head\.", "text_projection."),
)
_CLIP_IMAGE = (
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"pre_layrnorm", "ln_pre"),
    (r"post_layernorm", "ln_post"),
)
_SIGLIP_IMAGE = (
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.patch_embedding", "patch_embed.proj"),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", r"blocks.\1.attn.proj"),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"post_layernorm", "norm"),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj", "attn_pool.proj"),
    (r"head\.layernorm", "attn_pool.norm"),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
_HEAD = re.compile(r"head\.attention\.in_proj_(\w+)")


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of transformers' CLIPModel or SiglipModel."""
    return _MARK in state


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers under open_clip's names: CLIP's plain layout, SigLIP's custom text.

    A name that neither model has stays as it is.
    """
    siglip = "vision_model.head.probe" in state
    converted: dict[str, Tensor] = {}
    for name, tensor in _joined(state):
        tower, _, rest = name.partition(".")
        if name.endswith(".position_ids"):  # a constant that older versions stored
            continue
        if siglip and tower == "vision_model":
            converted |= _siglip_image(rest, tensor)
        elif tower == "vision_model":
            converted["visual." + _renamed(rest, (*_BLOCK, *_CLIP_IMAGE))] = tensor
        elif tower == "text_model":
            converted["text." * siglip + _renamed(rest, (*_BLOCK, *_TEXT))] = tensor
        elif name in ("visual_projection.weight", "text_projection.weight"):
            new = "visual.proj" if name.startswith("visual") else "text_projection"
            converted[new] = tensor.T.contiguous()
        else:
            converted[name] = tensor
    return converted


def _joined(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, query, key and value as one under the name `in_proj_weight` or `in_proj_bias`."""
    for name, tensor in state.items():
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if ".q_proj." in name and all(part in state for part in parts):
            yield name.replace(".q_proj.", ".in_proj_"), torch.cat([state[part] for part in parts])
        elif not re.search(r"\.[kv]_proj\.", name):
            yield name, tensor


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in table:
        found, count = re.subn("^" + pattern, new, name)
        if count:
            return found
    return name


def _siglip_image(name: str, tensor: Tensor) -> dict[str, Tensor]:
    trunk = "visual.trunk."
    if match := _HEAD.fullmatch(name):
        width = len(tensor) // 3
        pool = f"{trunk}attn_pool"
        return {f"{pool}.q.{match[1]}": tensor[:width], f"{pool}.kv.{match[1]}": tensor[width:]}
    new = trunk + _renamed(name, _SIGLIP_IMAGE)
    return {new: tensor[None] if new.endswith(".pos_embed") else tensor}


def quick_gelu_of(folder: Path) -> bool | None:
    """What `config.json` of a folder says of the activation; `None` without such a file."""
    config = _json(folder / "config.json")
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return None
    default = "quick_gelu" if config.get("model_type") == "clip" else "gelu"
    return bool(vision.get("hidden_act", default) == "quick_gelu")


def preprocessing_of(folder: Path) -> dict[str, object]:
    """Mean, std and interpolation of a folder's `preprocessor_config.json`, by open_clip's names."""
    config = _json(folder / "preprocessor_config.json")
    told: dict[str, object] = {}
    for name in ("mean", "std"):
        values = config.get(f"image_{name}")
        if isinstance(values, list) and all(isinstance(v, int | float) for v in values):
            told[name] = tuple(float(v) for v in values)
    if config.get("resample") in (2, 3):  # Pillow's numbers
        told["interpolation"] = "bilinear" if config["resample"] == 2 else "bicubic"
    return told


def _json(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
