"""Runs the Triton kernel in Triton's interpreter and prints how far it is from exact integers.

A program of its own, because TRITON_INTERPRET must be set before triton is imported. Prints a JSON
object: case -> [largest relative error, share of unequal codes], one of which is null.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from qwt_fx.backends.cuda.epilogue import ACTIVATIONS, Epilogue
from qwt_fx.backends.cuda.int8_triton import launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(1, 1, 1), (19, 37, 45), (5, 33, 128), (49, 70, 131)]


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator)


def activate(y: Tensor, name: str) -> Tensor:
    """float64 -> float64, from the formulas."""
    if name == "gelu":
        return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return y / (1 + torch.exp(-1.702 * y)) if name == "quick_gelu" else y


class Case:
    """Unsigned codes and zero points, as the q/dq graph has them."""

    def __init__(self, rows: int, columns: int, inner: int) -> None:
        self.a, self.w = integers(0, 256, rows, inner), integers(0, 256, columns, inner, seed=1)
        self.z, self.v = 77, integers(0, 256, columns, seed=2)
        self.scale = (integers(1, 100, columns, seed=3) * 1e-4 / inner).float()
        self.bias: Tensor | None = integers(-50, 50, columns, seed=4) / 100
        self.rows: Tensor | None = None
        self.zeros: Tensor | None = None  # of rows that have their own

    def total(self) -> Tensor:
        """(rows, columns) int64."""
        zero = self.z if self.zeros is None else self.zeros[:, None]
        return (self.a - zero) @ (self.w - self.v[:, None]).T

    def exact(self, activation: str = "none") -> Tensor:
        """(rows, columns) float64."""
        y = self.total().double() * self.scale.double()
        if self.rows is not None:
            y = y * self.rows.double()[:, None]
        if self.bias is not None:
            y = y + self.bias.double()
        return activate(y, activation)

    def computed(self, epilogue: Epilogue) -> Tensor:
        weight, shift = self.w - 128, self.v - 128
        offset = -(weight - shift[:, None]).sum(dim=1)
        zeros = None if self.zeros is None else (self.zeros - 128).int()
        offset = offset if zeros is not None else (self.z - 128) * offset
        fits = bool((shift == 0).all())
        return launch(
            (self.a - 128).to(torch.int8), weight.to(torch.int8), self.scale,
            offset.int(), self.bias, self.rows, None if fits else shift.int(), zeros, epilogue,
        )  # fmt: skip


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def floating(case: Case, dtype: torch.dtype = torch.float32, activation: str = "none") -> Any:
    got = case.computed(Epilogue(dtype, activation))
    if got.dtype is not dtype:
        raise TypeError(f"got {got.dtype}, wanted {dtype}")
    return [relative(got, case.exact(activation)), None]


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            found[f"shape {shape} {dtype}"] = floating(Case(*shape), DTYPES[dtype])
    for activation, bias, rows in itertools.product(ACTIVATIONS, (True, False), (True, False)):
        case = Case(19, 37, 45)
        case.bias = case.bias if bias else None
        case.rows = 2.0 ** integers(-2, 3, 19) if rows else None
        found[f"epilogue {activation} bias {bias} rows {rows}"] = floating(
            case, activation=activation
        )
    for shape in SHAPES:
        for activation in ("none", "gelu"):
            case = Case(*shape)
            case.rows = integers(1, 100, shape[0], seed=6) / 50
            case.zeros = integers(0, 256, shape[0], seed=7)
            found[f"rows' zero points {shape} {activation}"] = floating(case, activation=activation)
    for a, w, z, v in itertools.product((0, 255), (0, 255), (0, 255), (0, 128, 255)):
        case = Case(2, 3, 3072)  # as long as a sum of ViT-B, every product at its extreme
        case.a.fill_(a)
        case.w.fill_(w)
        case.v.fill_(v)
        case.z, case.bias = z, None
        case.scale.fill_(1.0)
        equal = torch.equal(case.computed(Epilogue(torch.float32)), case.total().float())
        found[f"extreme a {a} w {w} z {z} v {v}"] = [None, 0.0 if equal else 1.0]
    for activation in ACTIVATIONS:
        case = Case(19, 37, 45)
        zero_point, low, high = -100, -128, -65  # 6 bits, shifted
        epilogue = Epilogue(torch.int8, activation, 0.02, zero_point, low, high)
        expected = (torch.round(case.exact(activation) / 0.02) + zero_point).clamp(low, high)
        saturated = float((expected == low).float().mean() + (expected == high).float().mean())
        unequal = float((case.computed(epilogue) != expected).float().mean())
        found[f"quantize {activation} saturated {saturated > 0.0}"] = [None, unequal]
    case = Case(19, 37, 45)
    case.w, case.v = integers(-1, 2, 37, 45) + 128, torch.full((37,), 128)
    case.a, case.z, case.bias = integers(0, 3, 19, 45), 0, None
    case.scale.fill_(0.5)
    expected = torch.round(case.total() * 0.5)
    ties = float((case.total() % 2 == 1).float().mean())
    unequal = float((case.computed(Epilogue(torch.int8, "none", 1.0)) != expected).float().mean())
    found[f"quantize ties {ties > 0.3}"] = [None, unequal]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(cases(), sys.stdout)
