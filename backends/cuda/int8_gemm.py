"""`qwt_fx::int8_linear`: a linear of int8 operands with its whole epilogue, as one operator.

    y_mj = act(row_m * scale_j * (sum_k a_mk w_jk  -  v_j sum_k a_mk  +  z_m offset_j) + bias_j)

a: activation codes shifted to signed, w: weight codes, v_j: the zero point of weights whose codes do not
fit int8 without it, offset_j: what the activation's zero point adds, a constant of the row; z_m: the
zero point of a row that has its own (1 otherwise). All in
brackets is exact in int32. On CUDA it is one Triton kernel, or `torch._int_mm` and what a compiler fuses
behind it; elsewhere it is `torch._int_mm`, which computes the same integers. A compiler sees into it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwt_fx.backends.cuda.epilogue import ACTIVATIONS, Epilogue
from qwt_fx.errors import MissingExtraError, PreconditionError

TRITON, INT_MM = "triton", "int_mm"
GEMMS = (TRITON, INT_MM)
# `torch._int_mm` on CUDA takes more rows than this, and inner and outer sizes divisible by 8.
INT_MM_ROWS, INT_MM_MULTIPLE = 16, 8
# |a - z| and |w - v| are at most 255: longer sums may leave int32.
LONGEST_SUM = (2**31 - 1) // (255 * 255)


@torch.library.triton_op("qwt_fx::int8_linear", mutates_args=())
def int8_linear(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    weight_zero_point: Tensor | None,
    row_zero_point: Tensor | None,
    dtype: torch.dtype,
    activation: str,
    out_scale: float | None,
    out_zero_point: int,
    out_min: int,
    out_max: int,
    gemm: str,
) -> Tensor:
    """The linear of the module's head.

    Args:
        codes: (..., in) int8.
        weight: (out, in) int8, contiguous.
        scale: (out,) float32, the activation's scale times the weight's.
        offset: (out,) int32.
        bias: (out,) floating point.
        row_scale: floating point, that broadcasts to (..., 1).
        weight_zero_point: (out,) int32.
        row_zero_point: (..., 1) int32.
        dtype: of the result; int8 with `out_scale`.
        activation: one of `ACTIVATIONS`, computed in float32.
        out_scale, out_zero_point, out_min, out_max: when `out_scale` is given, the result is
            quantized with them: signed codes.
        gemm: "triton", or "int_mm" (on CUDA only above 16 rows; below, Triton computes them).

    Returns (..., out). Raises `MissingExtraError` for CUDA tensors where Triton is not installed.
    """
    epilogue = Epilogue(dtype, activation, out_scale, out_zero_point, out_min, out_max)
    lead, inner = codes.shape[:-1], codes.shape[-1]
    rows = codes.reshape(-1, inner).contiguous()
    if row_scale is not None:
        row_scale = row_scale.expand(*lead, 1).reshape(-1).contiguous()
    if row_zero_point is not None:
        row_zero_point = row_zero_point.reshape(-1).contiguous()
    operands = (rows, weight, scale, offset, bias, row_scale, weight_zero_point, row_zero_point)
    if codes.is_cuda and (gemm == TRITON or rows.shape[0] <= INT_MM_ROWS):
        result = _by_triton(*operands, epilogue)
    else:
        result = by_int_mm(*operands, epilogue)
    return result.reshape(*lead, weight.shape[0])


@int8_linear.register_fake  # type: ignore[untyped-decorator]
def _(codes: Tensor, weight: Tensor, *others: Any) -> Tensor:
    dtype = others[6]
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


def _by_triton(*operands: Any) -> Tensor:
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError(
            "the cuda backend's kernel needs Triton, which is not installed: pip install triton"
        )
    from qwt_fx.backends.cuda.int8_triton import launch

    result: Tensor = launch(*operands)
    return result


def by_int_mm(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    weight_zero_point: Tensor | None,
    row_zero_point: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """The same by `torch._int_mm`; codes (M, in), what rows have (M,). Returns (M, out)."""
    total = torch._int_mm(codes, weight.t())
    if weight_zero_point is not None:
        row_sums = codes.sum(dim=1, keepdim=True, dtype=torch.int32)
        total = total - row_sums * weight_zero_point
    shift = offset if row_zero_point is None else row_zero_point[:, None] * offset
    y = (total + shift).float() * scale
    if row_scale is not None:
        y = y * row_scale[:, None]
    if bias is not None:
        y = y + bias.float()
    y = activate(y, epilogue.activation)
    if epilogue.quantizes:
        y = torch.round(y * epilogue.inverse_scale) + epilogue.zero_point
        y = y.clamp(epilogue.quant_min, epilogue.quant_max)
    return y.to(epilogue.dtype)


def activate(y: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`. Raises `PreconditionError` for another name."""
    if activation == "none":
        return y
    if activation == "gelu":
        return functional.gelu(y)
    if activation == "gelu_tanh":
        return functional.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    raise PreconditionError(
        f"int8_linear: activation {activation!r}, wanted one of {', '.join(ACTIVATIONS)}"
    )


INT8_LINEAR = torch.ops.qwt_fx.int8_linear.default
