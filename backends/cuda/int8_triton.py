"""The Triton kernel of `qwt_fx::int8_linear`: an int8 GEMM with everything behind it in its epilogue.

    y_mj = act(row_m * scale_j * (sum_k a_mk w_jk  -  v_j sum_k a_mk  +  z_m offset_j) + bias_j)

in one pass over the operands; the sum of a row of codes is taken from the tiles that the product
reads anyway. Edges are masked, so no size is a special case. Under TRITON_INTERPRET=1 (set before
this module is imported) `launch` runs on CPU tensors, which is how the kernel is tested without a
GPU.
"""

# A kernel's arguments have no Python types; Triton infers its own.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwt_fx.backends.cuda.epilogue import Epilogue

# The interpreter cannot time configurations; it runs the plain kernel with these sizes.
INTERPRETED_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2}


@triton.jit
def _round_half_even(x):
    """What torch.round computes; libdevice's rint does not run in the interpreter."""
    low = tl.floor(x)
    part = x - low
    odd = (low - 2.0 * tl.floor(low * 0.5)) == 1.0
    up = (part > 0.5) | ((part == 0.5) & odd)
    return tl.where(up, low + 1.0, low)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """y float32; the codes of ACTIVATION are `Epilogue`'s."""
    if ACTIVATION == 1:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 2:  # gelu with tanh: 0.5 (1 + tanh u) is sigmoid(2u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == 3:
        y = y * tl.sigmoid(1.702 * y)
    return y


@triton.jit
def _int8_linear(
    codes, weight, scale, offset, bias, row_scale, weight_zero_point, row_zero_point, out,
    M, N, K, out_inverse_scale, out_zero_point, out_min, out_max,
    HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
    HAS_ROW_ZEROS: tl.constexpr,
    ACTIVATION: tl.constexpr, QUANTIZE: tl.constexpr, EVEN_K: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Tiles in groups of GROUP_M rows of tiles, so that neighbours share operands in the L2 cache.
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    rows = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_ok, column_ok = rows < M, columns < N
    # Out-of-range rows and columns read row 0 instead of being masked: they are never stored.
    # 64-bit row offsets: batch 1024 of a large model passes 2**31 elements.
    row_starts = tl.where(row_ok, rows, 0).to(tl.int64) * K
    column_starts = tl.where(column_ok, columns, 0).to(tl.int64) * K
    a_pointers = codes + row_starts[:, None] + inner[None, :]
    w_pointers = weight + column_starts[None, :] + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    row_sums = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_pointers)
            w = tl.load(w_pointers)
        else:
            a = tl.load(a_pointers, mask=inner[None, :] < K - start, other=0)
            w = tl.load(w_pointers, mask=inner[:, None] < K - start, other=0)
        total = tl.dot(a, w, total, out_dtype=tl.int32)
        if HAS_ZERO_POINT:
            row_sums += tl.sum(a.to(tl.int32), axis=1)
        a_pointers += BLOCK_K
        w_pointers += BLOCK_K
    if HAS_ZERO_POINT:
        zero_points = tl.load(weight_zero_point + columns, mask=column_ok, other=0)
        total -= row_sums[:, None] * zero_points[None, :]
    shift = tl.load(offset + columns, mask=column_ok, other=0)[None, :]
    if HAS_ROW_ZEROS:
        shift = shift * tl.load(row_zero_point + rows, mask=row_ok, other=0)[:, None]
    total += shift
    y = total.to(tl.float32) * tl.load(scale + columns, mask=column_ok, other=0.0)[None, :]
    if HAS_ROWS:
        y = y * tl.load(row_scale + rows, mask=row_ok, other=0.0)[:, None]
    if HAS_BIAS:
        y = y + tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    y = _activate(y, ACTIVATION)
    if QUANTIZE:
        y = _round_half_even(y * out_inverse_scale) + out_zero_point
        y = tl.minimum(tl.maximum(y, out_min), out_max)
    pointers = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def _configuration(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


_tuned = triton.autotune(
    [
        # Few rows: narrow tiles, so that enough of them exist to fill the GPU.
        _configuration(16, 32, 128, 2, 4),
        _configuration(32, 32, 128, 4, 4),
        _configuration(64, 32, 128, 4, 4),
        _configuration(64, 64, 128, 4, 4),
        # Many rows: wide tiles, so that each byte read takes part in many products.
        _configuration(128, 64, 128, 4, 4),
        _configuration(128, 128, 64, 4, 4),
        _configuration(128, 128, 128, 8, 3),
        _configuration(128, 256, 64, 8, 3),
        _configuration(128, 256, 128, 8, 3),
        _configuration(256, 128, 128, 8, 3),
    ],
    key=["N", "K", "FEW_ROWS", "HAS_ZERO_POINT", "HAS_ROW_ZEROS", "ACTIVATION"],
)(_int8_linear)


def launch(
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
    """Run the kernel. codes (M, K) and weight (N, K) int8, contiguous; see `int8_gemm` for the rest.

    `row_scale` is (M,) float32, `row_zero_point` (M,) int32. Returns (M, N).
    """
    rows, inner = codes.shape
    columns = weight.shape[0]
    out = torch.empty((rows, columns), dtype=epilogue.dtype, device=codes.device)
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_ROWS": row_scale is not None,
        "HAS_ZERO_POINT": weight_zero_point is not None,
        "HAS_ROW_ZEROS": row_zero_point is not None,
        "ACTIVATION": epilogue.activation_code,
        "QUANTIZE": epilogue.quantizes,
        "FEW_ROWS": 0 if rows <= 32 else 1 if rows <= 256 else 2,
    }
    # An argument that a flag says is absent still has to be a tensor; which one does not matter.
    tensors = (
        codes, weight, scale, offset,
        scale if bias is None else bias,
        scale if row_scale is None else row_scale,
        offset if weight_zero_point is None else weight_zero_point,
        offset if row_zero_point is None else row_zero_point,
        out,
    )  # fmt: skip
    limits = (
        epilogue.inverse_scale, float(epilogue.zero_point),
        float(epilogue.quant_min), float(epilogue.quant_max),
    )  # fmt: skip
    arguments = (*tensors, rows, columns, inner, *limits)

    def grid(meta: dict[str, int]) -> tuple[int]:
        tiles_m = (rows + meta["BLOCK_M"] - 1) // meta["BLOCK_M"]
        tiles_n = (columns + meta["BLOCK_N"] - 1) // meta["BLOCK_N"]
        return (tiles_m * tiles_n,)

    if codes.is_cuda:
        # Every BLOCK_K above divides 128.
        flags["EVEN_K"] = inner % 128 == 0
        torch.library.wrap_triton(_tuned)[grid](*arguments, **flags)
    else:
        flags["EVEN_K"] = inner % INTERPRETED_BLOCKS["BLOCK_K"] == 0
        _int8_linear[grid](*arguments, **flags, **INTERPRETED_BLOCKS)
    return out
