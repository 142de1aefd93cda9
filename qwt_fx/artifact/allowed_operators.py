"""The operators a stored graph may call: an allow-list, looked up by name and never evaluated.

Pure tensor functions that some model of open_clip, timm, transformers or torchvision captures to,
sizes and arithmetic on them, and the quantizers. No operator here writes to its inputs, draws random
numbers, returns memory that was never written, reads files or runs code;
`tests/artifact/test_graph_json.py` checks the schemas.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch

from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao

Operator = torch._ops.OpOverload | Callable[..., object]

# NAME is the overload `default`; NAME.a/b is the overloads a and b.
_ATEN = """
abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
add.Tensor/Scalar addcmul addmm affine_grid_generator alias all.default/dim/dims amax amin
any.default/dim/dims arange.default/start/start_step argmax argmin argsort.default/stable asinh atan
atan2 atanh atleast_1d atleast_2d avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm
bitwise_and.Tensor/Scalar bitwise_not bitwise_or.Tensor/Scalar bitwise_xor.Tensor/Scalar bmm
broadcast_tensors broadcast_to bucketize.Tensor cat ceil celu chunk clamp.default/Tensor
clamp_max.default/Tensor clamp_min.default/Tensor clip.default/Tensor clone col2im concat
constant_pad_nd contiguous conv1d.default/padding conv2d.default/padding conv3d.default/padding
conv_transpose1d conv_transpose2d.input convolution copy cos cosine_similarity cross cummax cummin
cumprod cumsum detach diag diag_embed diagonal diff div.Tensor/Scalar/Tensor_mode/Scalar_mode
divide.Tensor/Scalar dot einsum elu embedding embedding_bag eq.Tensor/Scalar erf exp expand
expand_as expm1 fill.Scalar/Tensor flatten.using_ints flip floor floor_divide.default/Scalar
fmod.Tensor/Scalar full full_like gather ge.Tensor/Scalar gelu glu greater.Tensor/Scalar
greater_equal.Tensor/Scalar grid_sampler grid_sampler_2d group_norm gt.Tensor/Scalar hardsigmoid
hardswish hardtanh hstack im2col index.Tensor index_add index_copy index_put index_select
instance_norm isfinite isinf isnan kthvalue layer_norm le.Tensor/Scalar leaky_relu
less.Tensor/Scalar less_equal.Tensor/Scalar lift_fresh_copy linalg_norm linalg_vector_norm linear
log log10 log1p log2 log_sigmoid _log_softmax log_softmax.int logical_and logical_not logical_or
logsumexp.default lt.Tensor/Scalar masked_fill.Scalar/Tensor masked_scatter matmul
max.default/dim/other max_pool1d max_pool2d max_pool2d_with_indices maximum mean.default/dim
median.default/dim meshgrid.default/indexing min.default/dim/other minimum mish mm
moveaxis.int/intlist movedim.int/intlist mul.Tensor/Scalar multiply.Tensor/Scalar mv nan_to_num
narrow _native_batch_norm_legit.no_stats _native_batch_norm_legit_no_training native_group_norm
native_layer_norm ne.Tensor/Scalar neg negative new_full new_ones new_zeros
norm.ScalarOpt_dim/Scalar not_equal.Tensor/Scalar one_hot ones ones_like outer pad permute
pixel_shuffle pixel_unshuffle polar positive pow.Tensor_Scalar/Tensor_Tensor/Scalar prelu
prod.default/dim_int reciprocal reflection_pad2d relu relu6 remainder.Tensor/Scalar repeat
repeat_interleave.self_int replication_pad2d reshape reshape_as rms_norm roll round.default/decimals
rsqrt rsub.Tensor/Scalar scalar_tensor scaled_dot_product_attention scatter.src/value scatter_add
scatter_reduce.two searchsorted.Tensor select.int select_scatter selu sigmoid sign silu sin sinc
slice.Tensor slice_scatter _softmax softmax.int softplus sort.default/stable split.Tensor/sizes
split_with_sizes sqrt square squeeze.default/dim/dims stack std.default/dim/correction
std_mean.correction/dim sub.Tensor/Scalar subtract.Tensor/Scalar sum.default/dim_IntList sum_to_size
swapaxes sym_numel sym_size.int sym_stride.int t take_along_dim tanh tensor_split.sections/indices
threshold tile to.dtype/other _to_copy topk transpose.int tril triu trunc type_as unbind.int
unflatten.int unfold _unsafe_view unsqueeze upsample_bicubic2d.default/vec
_upsample_bicubic2d_aa.default/vec upsample_bilinear2d.default/vec
_upsample_bilinear2d_aa.default/vec upsample_linear1d.default/vec upsample_nearest2d.default/vec
_upsample_nearest_exact2d.default/vec var.default/dim/correction var_mean.correction/dim view
view.dtype view_as vstack where.self/ScalarOther/ScalarSelf/Scalar xlogy.Tensor zeros zeros_like
""".split()

_PYTHON = ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow", "getitem",
           "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "pos", "abs")  # fmt: skip


def _aten_operators() -> dict[str, Operator]:
    """The listed ATen overloads that this torch has."""
    operators: dict[str, Operator] = {}
    for entry in _ATEN:
        name, _, overloads = entry.partition(".")
        packet = getattr(torch.ops.aten, name, None)
        for overload in (overloads or "default").split("/"):
            target = getattr(packet, overload, None)
            if target is not None and not target._schema.is_mutable:
                operators[f"aten.{name}.{overload}"] = target
    return operators


OPERATORS: dict[str, Operator] = {
    **_aten_operators(),
    **{f"operator.{name}": getattr(operator, name) for name in _PYTHON},
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.trunc": math.trunc,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_not": torch.sym_not,
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
    "torch.sym_ite": torch.sym_ite,
    "quantized_decomposed.quantize_per_tensor.default": torch_ao.QUANTIZE_PER_TENSOR,
    "quantized_decomposed.dequantize_per_tensor.default": torch_ao.DEQUANTIZE_PER_TENSOR,
    "quantized_decomposed.quantize_per_channel.default": torch_ao.QUANTIZE_PER_CHANNEL,
    "quantized_decomposed.dequantize_per_channel.default": torch_ao.DEQUANTIZE_PER_CHANNEL,
    "quantized_decomposed.quantize_per_token.default": torch_ao.QUANTIZE_PER_TOKEN,
    "quantized_decomposed.dequantize_per_token.default": torch_ao.DEQUANTIZE_PER_TOKEN,
    "qwt_fx.choose_qparams_per_token.default": ops.CHOOSE_QPARAMS_PER_TOKEN,
    "qwt_fx.quantize_log_sqrt2.default": ops.QUANTIZE_LOG_SQRT2,
    "qwt_fx.dequantize_log_sqrt2.default": ops.DEQUANTIZE_LOG_SQRT2,
}
# `fake_quantize_affine` and `fake_quantize_log_sqrt2` are missing on purpose: what they compute has
# no integer code (`compat="original"`), so a graph with them is evaluated, never stored.
NAMES: dict[object, str] = {target: name for name, target in OPERATORS.items()}
