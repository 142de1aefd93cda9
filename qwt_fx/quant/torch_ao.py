"""The only door to torch.ao: q/dq operators of `torch.ops.quantized_decomposed`; torchao's PT2E.

Upstream plans to move these out of torch; torchao's twin registers the same operators and is the
fallback. Nothing else in qwt-fx imports torch.ao or torchao.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from qwt_fx.errors import MissingExtraError

_PROVIDERS = (
    "torch.ao.quantization.fx._decomposed",
    "torchao.quantization.pt2e._affine_quantization",
    "torchao.quantization.pt2e",
)
_OPERATORS = (
    "quantize_per_tensor",
    "dequantize_per_tensor",
    "quantize_per_channel",
    "dequantize_per_channel",
    "quantize_per_token",
    "dequantize_per_token",
)


def _registered() -> bool:
    namespace = torch.ops.quantized_decomposed
    return all(hasattr(namespace, name) for name in _OPERATORS)


def _load() -> ModuleType:
    for provider in _PROVIDERS:
        if _registered():
            break
        try:
            importlib.import_module(provider)
        except ImportError:
            continue
    if not _registered():
        raise MissingExtraError(
            "this torch no longer bundles torch.ops.quantized_decomposed: "
            "install torchao (pip install 'qwt-fx[torchao]')"
        )
    return torch.ops.quantized_decomposed


@dataclass(frozen=True)
class PT2E:
    """torchao's modules for a quantizer of `prepare_pt2e`."""

    observer: ModuleType
    quantizer: ModuleType


def load_pt2e() -> PT2E:
    """Import torchao's PT2E. Raises `MissingExtraError` where it is missing or too old."""
    base = "torchao.quantization.pt2e"
    try:
        importlib.import_module(f"{base}.quantize_pt2e")
        return PT2E(*(importlib.import_module(f"{base}.{n}") for n in ("observer", "quantizer")))
    except ImportError as error:
        raise MissingExtraError(
            f"QwTQuantizer needs torchao ({error}): pip install 'qwt-fx[torchao]'"
        ) from error


_ops = _load()

QUANTIZE_PER_TENSOR = _ops.quantize_per_tensor.default
DEQUANTIZE_PER_TENSOR = _ops.dequantize_per_tensor.default
QUANTIZE_PER_CHANNEL = _ops.quantize_per_channel.default
DEQUANTIZE_PER_CHANNEL = _ops.dequantize_per_channel.default
QUANTIZE_PER_TOKEN = _ops.quantize_per_token.default
DEQUANTIZE_PER_TOKEN = _ops.dequantize_per_token.default
