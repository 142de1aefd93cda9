"""Sums of two u8 x s8 products in int16: whether this CPU saturates them, and weights that cannot.

AVX2 and AVX-512 without VNNI multiply by `vpmaddubsw`, which adds the products of two neighbouring
pairs of bytes with int16 saturation before anything wider is reached. With activation codes up to m
(255 at 8 bits), no sum of two products of a row w leaves int16 when

    m (largest + second largest positive w) <= 32767,   m (the same of -w) <= 32768

whichever two meet. A row that breaks this is computed as two rows that keep it, w = low + high with
low = clamp(w, -c, c) and c = floor(32767 / 2m) = 64 at 8 bits; both products are exact, so the sum
is. VNNI and AMX accumulate in int32 and need none of this.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qwt_fx.backends.x86.packed_weight import PREPACK

QLINEAR = torch.ops.onednn.qlinear_pointwise.default
NO_POST_OP: tuple[str, list[float], str] = ("none", [], "")  # name, arguments, algorithm
_INT16 = 32767
_UINT8, _INT8 = 255, 127
# (rows, inner, outer): oneDNN picks its kernel by shape; one row alone is another kernel.
_PROBES = ((1, 256, 16), (2, 33, 17), (50, 384, 64), (64, 64, 64))


@cache
def saturates() -> bool:
    """Whether oneDNN's u8 x s8 products saturate on this CPU, found by computing the largest ones.

    Measured and not read from the CPU's flags: the kernel counts, and `ONEDNN_MAX_CPU_ISA` or a
    hypervisor can hide instructions.
    """
    return not all(_exact(*shape) for shape in _PROBES)


def _exact(rows: int, inner: int, outer: int) -> bool:
    codes = torch.full((rows, inner), _UINT8, dtype=torch.uint8)
    weight = torch.full((outer, inner), _INT8, dtype=torch.int8)
    weight[1::2] = -_INT8 - 1
    ones, zeros = torch.ones(outer), torch.zeros(outer, dtype=torch.int32)
    product = QLINEAR(
        codes, 1.0, 0, PREPACK(weight, None), ones, zeros, None, 1.0, 0, torch.float32, *NO_POST_OP
    )  # fmt: skip
    return bool(torch.equal(product.long(), codes.long() @ weight.long().T))  # below 2^24: exact


def fits_int16(weight: Tensor, largest_code: int) -> bool:
    """Whether no two products of any row (out, in) int8 with codes up to `largest_code` saturate."""
    values = weight.int()
    if values.shape[1] == 1:
        values = torch.nn.functional.pad(values, (0, 1))
    positive = values.clamp(min=0).topk(2, dim=1).values.sum(dim=1)
    negative = (-values).clamp(min=0).topk(2, dim=1).values.sum(dim=1)
    return (
        int(positive.max()) * largest_code <= _INT16
        and int(negative.max()) * largest_code <= _INT16 + 1
    )


def split(weight: Tensor, largest_code: int) -> tuple[Tensor, Tensor]:
    """(low, high) int8 of the weight's shape: they add up to it and neither can saturate.

    Exists for every int8 weight and codes up to 255.
    """
    limit = min(_INT16 // (2 * largest_code), _INT8)
    low = weight.clamp(-limit, limit)
    return low, weight - low
