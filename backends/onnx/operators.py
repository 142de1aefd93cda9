"""The quantizers of a graph as standard ONNX operators: what `torch.onnx.export` lacks or gets wrong.

PyTorch's own translation drops quant_min and quant_max, so a 6-bit quantizer would silently become an
8-bit one. Here Clip(x, s (quant_min - z), s (quant_max - z)) stands before QuantizeLinear wherever the
type's range is wider: dividing s k by s gives k within one unit in the last place, so a clipped value
rounds to the limit itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnxscript import opset18, opset20
from onnxscript.onnx_opset import opset21

from qwt_fx.backends.onnx.integer_product import MATMUL_INTEGER
from qwt_fx.numerics.qparams import dequantize_log_sqrt2 as log_sqrt2_values
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao

# QuantizeLinear and DequantizeLinear of these opsets take the types that qwt-fx writes; 21 adds 4 bits.
OPSET = 20
OPSET_INT4 = 21
Integers = type[np.uint8] | type[np.int8]
_TYPES: dict[torch.dtype, Integers] = {torch.uint8: np.uint8, torch.int8: np.int8}


def translations(opset: int) -> dict[Callable[..., object], Callable[..., ir.Value]]:
    """ATen or custom operator -> a function that writes ONNX nodes, for this opset."""
    op = {18: opset18, 20: opset20, 21: opset21}[opset]

    def constant(value: npt.ArrayLike, dtype: type[np.generic]) -> ir.Value:
        return op.Constant(value=ir.tensor(np.asarray(value, dtype=dtype)))

    def quantize_per_tensor(
        x: ir.Value, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
    ) -> ir.Value:
        step = np.float32(scale)
        kind = _numpy_type(dtype)
        if (quant_min, quant_max) != (np.iinfo(kind).min, np.iinfo(kind).max):
            low, high = (step * np.float32(limit - zero_point) for limit in (quant_min, quant_max))
            x = op.Clip(x, constant(low, np.float32), constant(high, np.float32))
        return op.QuantizeLinear(x, constant(step, np.float32), constant(zero_point, kind))

    def dequantize_per_tensor(
        codes: ir.Value, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
    ) -> ir.Value:
        kind = _numpy_type(dtype)
        return op.DequantizeLinear(codes, constant(scale, np.float32), constant(zero_point, kind))

    def quantize_per_channel(
        x: ir.Value, scales: ir.Value, zero_points: ir.Value,
        axis: int, quant_min: int, quant_max: int, dtype: int,
    ) -> ir.Value:  # fmt: skip
        # Clip takes scalar limits only; Max and Min broadcast.
        zeros = op.Cast(zero_points, to=ir.DataType.FLOAT)
        shape = constant([-1] + [1] * (len(x.shape) - 1 - axis), np.int64)
        low, high = (
            op.Reshape(op.Mul(scales, op.Sub(constant(limit, np.float32), zeros)), shape)
            for limit in (quant_min, quant_max)
        )
        kind = ir.DataType.from_numpy(np.dtype(_numpy_type(dtype)))
        limited = op.Min(op.Max(x, low), high)
        return op.QuantizeLinear(limited, scales, op.Cast(zero_points, to=kind), axis=axis)

    def dequantize_per_channel(
        codes: ir.Value, scales: ir.Value, zero_points: ir.Value | None,
        axis: int, quant_min: int, quant_max: int, dtype: int,
    ) -> ir.Value:  # fmt: skip
        if zero_points is None:
            return op.DequantizeLinear(codes, scales, axis=axis)
        if zero_points.dtype != codes.dtype:
            zero_points = op.Cast(zero_points, to=codes.dtype)
        return op.DequantizeLinear(codes, scales, zero_points, axis=axis)

    def quantize_per_token(
        x: ir.Value, scales: ir.Value, zero_points: ir.Value,
        quant_min: int, quant_max: int, dtype: int,
    ) -> ir.Value:  # fmt: skip
        # QuantizeLinear rounds, limits and casts at once. Along rows as an axis it would divide too, but
        # OpenVINO returns nothing where the scales of an axis are no constant.
        scaled = op.Mul(x, op.Reciprocal(scales))
        shifted = op.Add(scaled, op.Cast(zero_points, to=ir.DataType.FLOAT))
        return quantize_per_tensor(shifted, 1.0, 0, quant_min, quant_max, dtype)

    def quantize_log_sqrt2(x: ir.Value, scale: float, bits: int) -> ir.Value:
        halves = op.Mul(
            op.Log(op.Div(x, constant(scale, np.float32))),
            constant(-2.0 / math.log(2.0), np.float32),
        )
        last = 2**bits - 1
        codes = op.Clip(op.Round(halves), constant(0.0, np.float32), constant(last, np.float32))
        return op.Cast(codes, to=ir.DataType.UINT8)

    def dequantize_log_sqrt2(codes: ir.Value, scale: float, bits: int) -> ir.Value:
        # As many values as codes: a table holds them exactly.
        every = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8)
        values = log_sqrt2_values(every, scale, bits).numpy()
        return op.Gather(constant(values, np.float32), op.Cast(codes, to=ir.DataType.INT32))

    def matmul_integer(codes: ir.Value, weight: ir.Value, zero_point: ir.Value) -> ir.Value:
        # A zero that is spelled out: OpenVINO fails on an input that is left out between two others.
        return op.MatMulInteger(codes, weight, constant(0, np.uint8), zero_point)

    return {
        torch_ao.QUANTIZE_PER_TENSOR: quantize_per_tensor,
        torch_ao.DEQUANTIZE_PER_TENSOR: dequantize_per_tensor,
        torch_ao.QUANTIZE_PER_CHANNEL: quantize_per_channel,
        torch_ao.DEQUANTIZE_PER_CHANNEL: dequantize_per_channel,
        torch_ao.QUANTIZE_PER_TOKEN: quantize_per_token,
        ops.QUANTIZE_LOG_SQRT2: quantize_log_sqrt2,
        ops.DEQUANTIZE_LOG_SQRT2: dequantize_log_sqrt2,
        MATMUL_INTEGER: matmul_integer,
    }


def _numpy_type(dtype: int | torch.dtype) -> Integers:
    """The exporter gives a torch dtype as it is, or as ONNX's number."""
    if isinstance(dtype, torch.dtype):
        return _TYPES[dtype]
    kind: Integers = ir.DataType(int(dtype)).numpy().type
    return kind
