"""The image and the text tower of an open_clip model as modules of their own.

A tower adopts the model's children, so tensors are shared and parameters keep their names in the
source model (`visual.transformer.resblocks.0...`, `transformer.resblocks.0...` or
`text.transformer.resblocks.0...`); the other tower, the logit scale and CoCa's decoder stay behind.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

_HALF = (torch.float16, torch.bfloat16)
_NOT_TEXT = frozenset({"visual", "logit_scale", "logit_bias", "text_decoder"})


class ImageTower(nn.Module):
    """The image tower of an open_clip model, sharing its tensors.

    Images (n, 3, h, w) in any floating dtype -> embeddings (n, e), not normalized. It computes in
    the dtype of its parameters and returns that dtype, but float32 for a half-precision tower.
    """

    visual: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module("visual", model.get_submodule("visual"))
        self.train(model.training)

    def forward(self, image: Tensor) -> Tensor:
        """Embed images (n, 3, h, w)."""
        dtype = next(self.parameters()).dtype
        return _embedding(self.visual(image if image.dtype == dtype else image.to(dtype)))


class TextTower(nn.Module):
    """The text tower of an open_clip model, sharing its tensors.

    Token ids (n, length) int64 -> embeddings (n, e), not normalized, in the dtype of the
    parameters, but float32 for a half-precision tower. A length below the model's context stands
    for the first positions: open_clip itself takes whole contexts only.
    """

    text: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        kind: Any = type(model)
        # Where the text encoder is a module, calling it is what encode_text does, and CoCa's
        # encode_text would normalize. CLIP itself has its encoder spread over the model.
        self._encode = None if hasattr(model, "text") else kind.encode_text
        for name, value in vars(model).items():  # what encode_text reads: text_pool_type, ...
            if not name.startswith("_") and name not in _NOT_TEXT:
                setattr(self, name, value)
        for table in (model._modules, model._parameters):
            for name, child in table.items():
                if name not in _NOT_TEXT:
                    setattr(self, name, child)
        for name, buffer in model._buffers.items():
            self.register_buffer(name, buffer, name not in model._non_persistent_buffers_set)

    def forward(self, text: Tensor) -> Tensor:
        """Embed token ids (n, length), length at most the context."""
        length = text.shape[1]
        if self._encode is not None:
            return _embedding(self._encode(_FirstPositions(self, length), text))
        if type(self.text) is not TextTransformer or self.text.cls_emb is not None:
            return _embedding(self.text(text))
        # It cuts its position table to the length of the text, but not its mask.
        mask = self.text.attn_mask
        cut = {} if mask is None else {"attn_mask": mask[:length, :length]}
        return _embedding(torch.func.functional_call(self.text, cut, (text,)))


class _FirstPositions:
    """A tower as `encode_text` reads it, its position table and mask cut to the text's length."""

    def __init__(self, tower: nn.Module, length: int) -> None:
        self._tower = tower
        self._length = length

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tower, name)
        if value is not None and name == "positional_embedding":
            return value[: self._length]
        if value is not None and name == "attn_mask":
            return value[: self._length, : self._length]
        return value


def _embedding(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The pooled embedding of a tower's output, which is (pooled, tokens) in CoCa."""
    pooled = output[0] if isinstance(output, tuple) else output
    return pooled.float() if pooled.dtype in _HALF else pooled


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
