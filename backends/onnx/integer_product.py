"""A product of integers as one operator, which ONNX has (MatMulInteger) and ATen has not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op


@custom_op("qwt_fx::matmul_integer", mutates_args=())
def _matmul_integer(codes: Tensor, weight: Tensor, zero_point: Tensor) -> Tensor:
    """codes (..., in) uint8; weight (in, out) uint8 or int8; zero_point (out,) of its type.

    Returns (..., out) int32: codes @ (weight - zero_point).
    """
    return torch.matmul(codes.int(), weight.int() - zero_point.int())


@_matmul_integer.register_fake
def _(codes: Tensor, weight: Tensor, zero_point: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[1]), dtype=torch.int32)


MATMUL_INTEGER = torch.ops.qwt_fx.matmul_integer.default
