"""Statistics of models in half precision are taken in float32."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@overload
def wide(value: Tensor) -> Tensor: ...
@overload
def wide(value: None) -> None: ...
def wide(value: Tensor | None) -> Tensor | None:
    """A tensor of float16 or bfloat16 in float32; anything else as it is."""
    return value.float() if value is not None and value.dtype in HALF else value
