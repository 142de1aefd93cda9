"""The two towers as one module with open_clip's methods, for code written against open_clip."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit


class ClipEncoder(nn.Module):
    """`encode_image`, `encode_text` and a call on both, as open_clip's `CLIP` has them.

    Attributes:
        image, text: towers, see `qwt_fx.clip.ClipModel`.
        logit_scale: logarithm of the factor of cosine similarities, a scalar float32 tensor.
    """

    logit_scale: Tensor

    def __init__(self, image: nn.Module, text: nn.Module, logit_scale: float) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.register_buffer("logit_scale", torch.tensor(math.log(logit_scale)))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Images (n, 3, h, w) -> embeddings (n, e); of length 1 with `normalize`."""
        features: Tensor = self.image(image)
        return unit(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (n, context) int64 -> embeddings (n, e); of length 1 with `normalize`."""
        features: Tensor = self.text(text)
        return unit(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of length 1 of images and texts, and the factor of their similarities."""
        return (
            self.encode_image(image, normalize=True),
            self.encode_text(text, normalize=True),
            self.logit_scale.exp(),
        )
