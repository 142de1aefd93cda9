"""The ATen operators that passes look for, by what they do."""

from __future__ import annotations

import torch

aten = torch.ops.aten

LINEAR = aten.linear.default
LAYER_NORM = aten.layer_norm.default
RMS_NORM = aten.rms_norm.default
SDPA = aten.scaled_dot_product_attention.default
CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
        aten.convolution.default,
    }
)  # fmt: skip
MATMULS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default})
# Products that no pass quantizes; they are listed so that none goes unreported.
OTHER_PRODUCTS = frozenset(
    {
        aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose1d.default,
        aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.addmm.default,
        aten.addmv.default, aten.baddbmm.default, aten.mv.default, aten.dot.default,
        aten.bilinear.default,
    }
)  # fmt: skip
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
# Ops that move elements without changing one, and that a per-last-channel quantizer commutes with
# as long as the last dimension stays the last one (`keeps_last_dim` checks that).
SHAPE_ONLY = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.roll.default,
        aten.detach.default,
    }
)
MOVES = SHAPE_ONLY | {
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
}  # fmt: skip
