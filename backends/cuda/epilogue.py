"""What an int8 GEMM does with its sums before it writes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")


@dataclass(frozen=True)
class Epilogue:
    """An activation, and what is written: floating point, or int8 codes of the next quantizer.

    Attributes:
        dtype: of the result: float32, float16 or bfloat16; int8 where it quantizes.
        activation: one of `ACTIVATIONS`.
        scale: of the next quantizer; `None` where the result is floating point.
        zero_point, quant_min, quant_max: of the next quantizer, shifted to signed codes.
    """

    dtype: torch.dtype
    activation: str = "none"
    scale: float | None = None
    zero_point: int = 0
    quant_min: int = -128
    quant_max: int = 127

    @property
    def activation_code(self) -> int:
        """The activation as a number: a kernel's compile-time constant."""
        return ACTIVATIONS.index(self.activation)

    @property
    def quantizes(self) -> bool:
        """Whether the result is codes."""
        return self.scale is not None

    @property
    def inverse_scale(self) -> float:
        """What the quantize operator multiplies by."""
        return 1.0 if self.scale is None else 1.0 / self.scale
