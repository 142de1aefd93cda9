"""Where and in which precision a value is used."""

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


def to_device(batch: Tensor, device: torch.device | str) -> Tensor:
    """A batch on a device; to a GPU from pinned memory, so that the copy does not wait for it."""
    if torch.device(device).type == "cuda" and not batch.is_cuda:
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)
