"""Small random open_clip models for tests: built in milliseconds, no weights, no network."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": [16, 24],  # height, width: not square, so that a swap shows
        "layers": 2,
        "width": 32,
        "head_width": 8,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 24,
        "heads": 3,
        "layers": 2,
    },
}


def small_config(**changes: Any) -> dict[str, Any]:
    """A copy of `CONFIG`; a dictionary among the changes is merged into the one it replaces."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = config[key] | value if merge else value
    return config


def small_model(config: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """An open_clip model in evaluation mode, with seeded weights and a trained-looking scale."""
    config = copy.deepcopy(config or CONFIG)
    custom = config.pop("custom_text", False)
    torch.manual_seed(seed)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        for parameter in model.parameters():  # biases and norms are trivial at initialization
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_config(path: Path, config: dict[str, Any] | None = None) -> str:
    """Write a model configuration and return its path."""
    path.write_text(json.dumps(config or CONFIG), encoding="utf-8")
    return str(path)


class _Archive(nn.Module):
    """The shape of OpenAI's archives: a traced CLIP whose three sizes are among its tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.attn_mask = model.attn_mask
        for name, value in (("input_resolution", 16), ("context_length", 12), ("vocab_size", 9)):
            self.register_buffer(name, torch.tensor(value))
        self.text_pool_type = model.text_pool_type

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = open_clip.CLIP.encode_text(self, text)  # type: ignore[arg-type]
        return self.visual(image), features * self.logit_scale.exp()


def write_openai_archive(path: Path, model: Any) -> str:
    """Write a TorchScript archive like those OpenAI published and return its path."""
    height, width = model.visual.image_size
    example = (
        torch.zeros(1, 3, height, width),
        torch.ones(1, model.context_length, dtype=torch.long),
    )
    with warnings.catch_warnings():  # torch.jit is deprecated, OpenAI's format is not
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(_Archive(model), example, check_trace=False), str(path))
    return str(path)
