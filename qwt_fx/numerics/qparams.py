"""Quantization parameters and the pure functions that use them.

Uniform affine b-bit quantizer, RepQ-ViT (arXiv 2212.08254) eq. 1 and 2:

    q = clamp(round(x / s) + z, 0, 2^b - 1)        x~ = s (q - z)

A dynamic quantizer takes s and z of every row, one token, from the row's own extremes when it runs.

Log-sqrt2 quantizer for softmax outputs, RepQ-ViT section 3.3:

    q = clamp(round(-2 log2(a / s)), 0, 2^b - 1)   a~ = s sqrt2^-q, and 0 below the last level
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwt_fx.errors import ConfigError

AFFINE = "affine"
LOG_SQRT2 = "log_sqrt2"


@dataclass(frozen=True)
class QuantSpec:
    """What kind of quantizer a tensor gets, before any data is seen.

    Attributes:
        bits: 2..8.
        ch_axis: channel axis of a per-channel quantizer; `None` for one scale per tensor.
        scheme: "affine" or "log_sqrt2".
        integer_zero_point: zero points are integers that fit the code range wherever they must be
            stored; `False` reproduces the published code (unclamped, non-integer after folding).
        include_zero: widen the range to contain 0, so that the zero point fits the code range.
        symmetric: the zero point is 2^(bits - 1) whatever the range, and the scale covers both sides.
        reserve_zero: the last log-sqrt2 code means 0, so that b bits hold every value; `False`
            gives the published 2^b + 1 values.
        dynamic: every row of the last dimension, one token, has a scale and a zero point of its own,
            found when the quantizer runs (`token_qparams`): nothing is calibrated. With a channel axis
            it is one of channels until `per_tensor()`: what a reparameterization moves is read off it.
    """

    bits: int
    ch_axis: int | None = None
    scheme: str = AFFINE
    integer_zero_point: bool = True
    include_zero: bool = True
    symmetric: bool = False
    reserve_zero: bool = True
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"QuantSpec.bits: got {self.bits}, wanted 2..8")
        if self.scheme not in (AFFINE, LOG_SQRT2):
            raise ConfigError(f"QuantSpec.scheme: got {self.scheme!r}, wanted affine or log_sqrt2")
        if self.scheme == LOG_SQRT2 and self.ch_axis is not None:
            raise ConfigError("QuantSpec: the log-sqrt2 quantizer has one scale per tensor")
        plain = self.include_zero and not self.symmetric
        if self.dynamic and not (
            self.scheme == AFFINE
            and self.integer_zero_point
            and (plain or self.ch_axis is not None)
        ):
            raise ConfigError(
                "QuantSpec: a dynamic quantizer is affine, with integer zero points, and the range of a "
                "row is not symmetric and contains 0"
            )

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return 0

    @property
    def quant_max(self) -> int:
        """Largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def storable(self) -> bool:
        """Whether integers of `bits` bits and standard q/dq ops can express the quantizer."""
        return self.integer_zero_point if self.scheme == AFFINE else self.reserve_zero

    @property
    def per_token(self) -> bool:
        """Whether the quantizer finds the range of each token when it runs, and needs no other."""
        return self.dynamic and self.ch_axis is None

    def per_tensor(self) -> QuantSpec:
        """The same quantizer with one scale for the whole tensor, or for each token."""
        if self.dynamic:
            return QuantSpec(self.bits, dynamic=True)
        return replace(self, ch_axis=None)


def qparams_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an affine quantizer whose range is [low, high].

    `low`, `high`: (channels,) or () float. Returns scale and zero_point of that shape, float32;
    the zero point is integer-valued. A range without width (a constant channel, a zero weight row)
    gets the median scale of the others, 1 where there are none, which makes it neutral in any mean
    over channels; with `integer_zero_point=False` it becomes NaN, as the published code does.
    """
    low, high = low.float(), high.float()
    if spec.include_zero:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.symmetric:
        middle = (spec.quant_max + 1) // 2
        scale = torch.maximum(-low / middle, high / (spec.quant_max - middle))
    else:
        scale = (high - low) / spec.quant_max
    if not spec.integer_zero_point:
        return scale, _zero_point(low, scale, spec)
    # Subnormal widths would overflow low / scale: they count as no width.
    flat = ~(scale > torch.finfo(torch.float32).tiny)
    if bool(flat.any()):
        wide = scale[~flat]
        neutral = wide.median() if wide.numel() else scale.new_ones(())
        scale = torch.where(flat, neutral, scale)
    zero_point = _zero_point(low, scale, spec)
    if spec.include_zero:
        zero_point = zero_point.clamp(spec.quant_min, spec.quant_max)
    return scale, zero_point


def token_qparams(x: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of `x` (..., channels) from its extremes, widened to hold 0.

    Returns (..., 1) float32 and int32. A row without width gets scale 1; one with a NaN or an infinite
    value a scale that is not finite, so that it stays not finite and nothing passes for a number.
    """
    low = x.amin(dim=-1, keepdim=True).float().clamp(max=0.0)
    high = x.amax(dim=-1, keepdim=True).float().clamp(min=0.0)
    scale = (high - low) / quant_max
    # Subnormal widths would overflow low / scale; NaN is not among them.
    scale = torch.where(scale <= torch.finfo(torch.float32).tiny, 1.0, scale)
    zero_point = torch.round(-low / scale).nan_to_num(0.0).clamp(0, quant_max)
    return scale, zero_point.to(torch.int32)


def _zero_point(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    if spec.symmetric:
        return torch.full_like(scale, (spec.quant_max + 1) // 2)
    return torch.round(-low / scale)


def fake_quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Quantize and dequantize: s (clamp(round(x / s) + z, quant_min, quant_max) - z).

    `scale` and `zero_point` must broadcast against `x`; the zero point may be any real number.
    The rounding is not on the zero point's grid, exactly as in the published code.
    """
    codes = (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max)
    return codes.sub_(zero_point).mul_(scale)


def quantize_log_sqrt2(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """Codes uint8 of non-negative `x`; the last code, 2^bits - 1, means 0."""
    last = 2**bits - 1
    codes = torch.round(-2.0 * torch.log2(x / scale))
    return codes.clamp(0, last).to(torch.uint8)


def dequantize_log_sqrt2(codes: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """float32 values of uint8 codes: s 2^-ceil(code/2) (sqrt2 if odd), and 0 for the last code.

    At inference this is a base-2 shift with a scale that depends on the code's parity
    (RepQ-ViT eq. 12).
    """
    last = 2**bits - 1
    code = codes.to(torch.float32)
    parity = torch.remainder(code, 2) * (math.sqrt(2.0) - 1.0) + 1.0
    values = torch.exp2(-torch.ceil(code / 2)) * parity * scale
    return torch.where(codes == last, torch.zeros_like(values), values)


def fake_quantize_log_sqrt2(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """The published log-sqrt2 quantizer: 2^bits levels and, below the last one, an extra zero."""
    levels = 2**bits
    codes = torch.round(-2.0 * torch.log2(x / scale))
    kept = codes.clamp(0, levels - 1)
    parity = torch.remainder(kept, 2) * (math.sqrt(2.0) - 1.0) + 1.0
    values = torch.exp2(-torch.ceil(kept / 2)) * parity * scale
    return torch.where(codes >= levels, torch.zeros_like(values), values)


def along_axis(values: Tensor, ch_axis: int | None, rank: int) -> Tensor:
    """Reshape (channels,) so that it broadcasts along `ch_axis` of a tensor of this rank."""
    if ch_axis is None:
        return values
    shape = [1] * rank
    shape[ch_axis % rank] = -1
    return values.reshape(shape)
