"""`torch.ops.qwt_fx`: what standard q/dq operators cannot say, each with a fake kernel.

* `choose_qparams_per_token`: of any bit width; torch.ao's are for 8 bits alone.
* `fake_quantize_affine`: any real zero point (`--compat original`).
* `quantize_log_sqrt2` / `dequantize_log_sqrt2`: the storable log-sqrt2 code (last code = 0).
* `fake_quantize_log_sqrt2`: the published code with its extra zero level.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from qwt_fx.numerics import qparams


@custom_op("qwt_fx::choose_qparams_per_token", mutates_args=())
def _choose_qparams_per_token(x: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    return qparams.token_qparams(x, quant_max)


@_choose_qparams_per_token.register_fake
def _(x: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], 1)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@custom_op("qwt_fx::fake_quantize_affine", mutates_args=())
def _fake_quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    return qparams.fake_quantize_affine(x, scale, zero_point, quant_min, quant_max)


@_fake_quantize_affine.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


@custom_op("qwt_fx::quantize_log_sqrt2", mutates_args=())
def _quantize_log_sqrt2(x: Tensor, scale: float, bits: int) -> Tensor:
    return qparams.quantize_log_sqrt2(x, scale, bits)


@_quantize_log_sqrt2.register_fake
def _(x: Tensor, scale: float, bits: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@custom_op("qwt_fx::dequantize_log_sqrt2", mutates_args=())
def _dequantize_log_sqrt2(codes: Tensor, scale: float, bits: int) -> Tensor:
    return qparams.dequantize_log_sqrt2(codes, scale, bits)


@_dequantize_log_sqrt2.register_fake
def _(codes: Tensor, scale: float, bits: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@custom_op("qwt_fx::fake_quantize_log_sqrt2", mutates_args=())
def _fake_quantize_log_sqrt2(x: Tensor, scale: float, bits: int) -> Tensor:
    return qparams.fake_quantize_log_sqrt2(x, scale, bits)


@_fake_quantize_log_sqrt2.register_fake
def _(x: Tensor, scale: float, bits: int) -> Tensor:
    return torch.empty_like(x)


CHOOSE_QPARAMS_PER_TOKEN = torch.ops.qwt_fx.choose_qparams_per_token.default
FAKE_QUANTIZE_AFFINE = torch.ops.qwt_fx.fake_quantize_affine.default
QUANTIZE_LOG_SQRT2 = torch.ops.qwt_fx.quantize_log_sqrt2.default
DEQUANTIZE_LOG_SQRT2 = torch.ops.qwt_fx.dequantize_log_sqrt2.default
FAKE_QUANTIZE_LOG_SQRT2 = torch.ops.qwt_fx.fake_quantize_log_sqrt2.default
