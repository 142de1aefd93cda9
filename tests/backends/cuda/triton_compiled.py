"""Compiles the Triton kernel for GPUs that need not be there; prints what each binary contains.

A JSON object: compute capability -> [configurations, those with int8 tensor core instructions,
those that fit the GPU's shared memory].
"""

from __future__ import annotations

import json
import re
import sys
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwt_fx.backends.cuda import int8_triton

POINTERS = {
    "codes": "*i8", "weight": "*i8", "scale": "*fp32", "offset": "*i32", "bias": "*fp32",
    "row_scale": "*fp32", "weight_zero_point": "*i32", "row_zero_point": "*i32", "out": "*bf16",
}  # fmt: skip
SIZES = {"M": "i32", "N": "i32", "K": "i32"}
FLAGS = {
    "HAS_BIAS": True, "HAS_ROWS": True, "HAS_ZERO_POINT": True, "HAS_ROW_ZEROS": True,
    "ACTIVATION": 1, "QUANTIZE": False, "EVEN_K": False, "FEW_ROWS": 2,
}  # fmt: skip
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
INSTRUCTION = {80: r"mma\.sync\S+\.s32\.s8\.s8\.s32", 90: r"(wgmma|mma)\S+\.s32\.s8\.s8"}


def binary(configuration: triton.Config, capability: int) -> tuple[bool, bool]:
    kernel = int8_triton._int8_linear
    constants = FLAGS | configuration.kwargs
    kinds = POINTERS | SIZES
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "fp32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in (*POINTERS, "N", "K")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
    )
    found = re.search(INSTRUCTION[capability], compiled.asm["ptx"]) is not None
    return found, compiled.metadata.shared <= SHARED_BYTES[capability]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Triton's, about its own defaults
    result = {}
    for capability in INSTRUCTION:
        built = [binary(c, capability) for c in int8_triton._tuned.configs]
        result[capability] = [len(built), *(sum(column) for column in zip(*built, strict=True))]
    json.dump(result, sys.stdout)
