"""The operators a stored graph may call: an allow-list, looked up by name and never evaluated.

Pure tensor functions that vision transformers and text towers use, sizes and arithmetic on them,
and the quantizers. No operator here writes to its inputs, reads files or runs code.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from qwt_fx import ops, torch_ao

_ATEN = """
abs add.Tensor add.Scalar addmm alias all.dim amax any.dim arange argmax argmin avg_pool2d
adaptive_avg_pool2d avg_pool1d baddbmm batch_norm bitwise_and.Tensor bitwise_not bitwise_or.Tensor
bmm broadcast_to cat chunk clamp clamp_min clamp_max clone constant_pad_nd contiguous conv1d conv2d
conv2d.padding convolution copy cos cumsum detach div.Scalar div.Tensor div.Tensor_mode einsum
elu embedding eq.Scalar eq.Tensor erf exp expand expand_as expm1 flatten.using_ints flip
floor floor_divide floor_divide.Scalar full_like gather ge.Scalar ge.Tensor gelu glu
group_norm gt.Scalar gt.Tensor hardsigmoid hardswish hardtanh index.Tensor index_select instance_norm
layer_norm le.Scalar le.Tensor leaky_relu linalg_vector_norm linear log log2 log_softmax.int
logical_and logical_not logical_or lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor
matmul max.dim max_pool2d maximum mean mean.dim meshgrid min.dim minimum mish mm movedim.int
mul.Scalar mul.Tensor narrow ne.Scalar ne.Tensor neg new_empty new_full new_ones new_zeros
normalize ones_like pad permute pixel_shuffle pixel_unshuffle pow.Scalar pow.Tensor_Scalar
pow.Tensor_Tensor reciprocal relu relu6 remainder.Scalar repeat repeat_interleave.self_int
reshape rms_norm roll round rsqrt rsub.Scalar scaled_dot_product_attention select.int selu
sigmoid sign silu sin slice.Tensor slice_scatter softmax.int softplus split.Tensor split_with_sizes
sqrt square squeeze squeeze.dim squeeze.dims stack sub.Scalar sub.Tensor sum sum.dim_IntList
sym_numel sym_size.int t tanh tile to.dtype topk transpose.int tril triu type_as unbind.int
unflatten.int unfold unsqueeze upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d
upsample_bilinear2d.vec upsample_nearest2d upsample_nearest2d.vec var.correction view view_as
where.ScalarOther where.ScalarSelf where.self zeros_like _softmax _unsafe_view
_log_softmax sym_constrain_range_for_size
""".split()

_PYTHON = ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow", "getitem",
           "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")  # fmt: skip


def _aten_operators() -> dict[str, Any]:
    """The listed ATen overloads that this torch has."""
    found: dict[str, Any] = {}
    for entry in _ATEN:
        name, _, overload = entry.partition(".")
        packet = getattr(torch.ops.aten, name, None)
        target = getattr(packet, overload or "default", None)
        if target is not None and not target._schema.is_mutable:
            found[f"aten.{name}.{overload or 'default'}"] = target
    return found


OPERATORS: dict[str, Any] = {
    **_aten_operators(),
    **{f"operator.{name}": getattr(operator, name) for name in _PYTHON},
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_not": torch.sym_not,
    "quantized_decomposed.quantize_per_tensor.default": torch_ao.QUANTIZE_PER_TENSOR,
    "quantized_decomposed.dequantize_per_tensor.default": torch_ao.DEQUANTIZE_PER_TENSOR,
    "quantized_decomposed.quantize_per_channel.default": torch_ao.QUANTIZE_PER_CHANNEL,
    "quantized_decomposed.dequantize_per_channel.default": torch_ao.DEQUANTIZE_PER_CHANNEL,
    "qwt_fx.quantize_log_sqrt2.default": ops.QUANTIZE_LOG_SQRT2,
    "qwt_fx.dequantize_log_sqrt2.default": ops.DEQUANTIZE_LOG_SQRT2,
}
NAMES: dict[Any, str] = {target: name for name, target in OPERATORS.items()}
