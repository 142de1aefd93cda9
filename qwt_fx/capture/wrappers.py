"""What users wrap models in: taken off where the model inside computes the same, else named."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from qwt_fx.errors import CaptureError

_HOLDS_MODULE = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `DistributedDataParallel`, `AveragedModel`, `torch.compile` and
    PEFT's models, so that layers keep the names they have in it.

    Raises `CaptureError` for PEFT adapters that are not merged: each layer would become three.
    """
    inner: Any = model
    while True:
        if isinstance(inner, _HOLDS_MODULE):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif hasattr(inner, "peft_config") and not _adds_prompts(inner):
            inner = inner.get_base_model()
        else:
            break
    _require_no_adapters(inner)
    assert isinstance(inner, nn.Module)
    return inner


def _adds_prompts(model: Any) -> bool:
    """Whether a PEFT model computes more than the model in it, merged or not."""
    return any(getattr(c, "is_prompt_learning", False) for c in model.peft_config.values())


def _require_no_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        layer: Any = module  # PEFT's layers by what they have: PEFT need not be installed
        if isinstance(getattr(layer, "base_layer", None), nn.Module) and not getattr(
            layer, "merged", False
        ):
            raise CaptureError(
                f"{type(model).__name__}: {name} is a {type(module).__name__} whose adapter is not "
                "merged, and would be captured as several layers; call model = "
                "model.merge_and_unload() first"
            )
