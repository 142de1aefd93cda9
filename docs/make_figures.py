"""Draws docs/figures/*.svg: with the package's own quantizers, and its rooms from its imports.

usage: python docs/make_figures.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from drawing import BLUE, GREY, INK, ORANGE, Drawing, Point
from floor_plan import floors

from qwt_fx.numerics.qparams import (
    QuantSpec,
    dequantize_log_sqrt2,
    fake_quantize_affine,
    qparams_from_range,
    quantize_log_sqrt2,
)

FOLDER = Path(__file__).parent / "figures"


def _axes(d: Drawing, left: float, top: float, w: float, h: float, x: str, y: str) -> None:
    d.line([(left, top), (left, top + h), (left + w, top + h)], GREY, width=1.0)
    d.text(left + w / 2, top + h + 30, x, color=GREY)
    d.text(left, top - 8, y, color=GREY, anchor="start")


def pipeline() -> Drawing:
    """The steps from a model to what runs."""
    d = Drawing(760, 150, "From a model to integers")
    steps = ["capture", "prepare", "calibrate", "convert", "lower"]
    after = [
        "ATen graph",
        "quantizers, off",
        "ranges, repairs",
        "integer weights",
        "integer kernels",
    ]
    for i, (step, words) in enumerate(zip(steps, after, strict=True)):
        x = 20 + 148 * i
        d.box(x, 40, 112, 40, step)
        d.text(x + 56, 102, words, color=GREY)
        if i < len(steps) - 1:
            d.arrow((x + 112, 60), (x + 146, 60))
    d.arrow((20 + 148 * 2 + 56, 14), (20 + 148 * 2 + 56, 38), ORANGE)
    d.text(20 + 148 * 2 + 68, 22, "calibration batches", color=ORANGE, anchor="start")
    d.text(20 + 148 * 3 + 56, 122, "save, evaluate, export", color=GREY)
    return d


def uniform() -> Drawing:
    """A 3-bit uniform quantizer: value in, level out."""
    d = Drawing(460, 320, "A 3-bit uniform quantizer")
    spec = QuantSpec(3)
    low, high = -1.0, 1.5
    scale, zero = qparams_from_range(torch.tensor(low), torch.tensor(high), spec)
    x = torch.linspace(-1.6, 2.1, 600)
    y = fake_quantize_affine(x, scale, zero, spec.quant_min, spec.quant_max)

    def place(u: float, v: float) -> Point:
        return 50 + (u + 1.6) / 3.7 * 380, 260 - (v + 1.6) / 3.7 * 220

    _axes(d, 50, 40, 380, 220, "x", "value after quantizing")
    d.line([place(-1.6, -1.6), place(2.1, 2.1)], GREY, width=1.0, dash="4 4")
    d.line([place(u, v) for u, v in zip(x.tolist(), y.tolist(), strict=True)], BLUE)
    d.text(*place(1.55, 0.62), "8 levels, s apart", color=BLUE)
    d.text(*place(1.25, -1.2), "outside the range: clipped", color=GREY)
    return d


def logarithmic() -> Drawing:
    """Levels of 4-bit uniform and log-sqrt2 quantizers on attention probabilities."""
    d = Drawing(560, 190, "Levels of two 4-bit quantizers on 0 to 1")
    codes = torch.arange(16)
    levels = {
        "uniform": (codes / 15, BLUE, 60.0),
        "log-sqrt2": (dequantize_log_sqrt2(codes.to(torch.uint8), 1.0, 4), ORANGE, 115.0),
    }
    for name, (values, color, y) in levels.items():
        d.text(16, y + 4, name, color=color, anchor="start")
        d.line([(100, y), (530, y)], GREY, width=1.0)
        for v in values.tolist():
            d.line([(100 + 430 * v, y - 14), (100 + 430 * v, y + 14)], color)
    for v in (0.0, 0.25, 0.5, 0.75, 1.0):
        d.text(100 + 430 * v, 155, f"{v:g}", color=GREY)
    d.text(315, 178, "probability after softmax", color=GREY)
    assert int(quantize_log_sqrt2(torch.tensor([1.0]), 1.0, 4)) == 0
    return d


def reparameterization() -> Drawing:
    """Ranges of a norm's channels before and after reparameterization, computed for real."""
    d = Drawing(720, 300, "Channel ranges before and after reparameterization")
    generator = torch.Generator().manual_seed(7)
    gamma = torch.exp(0.8 * torch.randn(24, generator=generator))
    beta = 0.7 * gamma * torch.randn(24, generator=generator)
    low, high = beta - 2.2 * gamma, beta + 2.2 * gamma
    spec = QuantSpec(8, ch_axis=-1, include_zero=False)
    scale, zero = qparams_from_range(low, high, spec)
    mean_scale, mean_zero = scale.mean(), zero.mean().round()
    r1, r2 = scale / mean_scale, zero - mean_zero
    after = [(v + scale * r2) / r1 for v in (low, high)]
    largest = float(torch.cat([low.abs(), high.abs()]).max())
    for title, left, (lows, highs), color in (
        ("before: a scale for each channel", 40.0, (low, high), ORANGE),
        ("after: one scale for all", 390.0, (after[0], after[1]), BLUE),
    ):
        _axes(d, left, 50, 290, 200, "channel of the norm's output", "")
        d.text(left + 145, 28, title, color=color)
        middle = 150.0
        d.line([(left, middle), (left + 290, middle)], GREY, width=0.5)
        d.text(left - 8, middle + 4, "0", color=GREY, anchor="end")
        for i, (a, b) in enumerate(zip(lows.tolist(), highs.tolist(), strict=True)):
            d.bar(
                left + 6 + 11.8 * i, middle - 96 * a / largest, middle - 96 * b / largest, 8, color
            )
    return d


def compensation() -> Drawing:
    """A quantized block with QwT's linear beside it."""
    d = Drawing(620, 200, "QwT: a linear layer beside a quantized block")
    d.text(40, 74, "x", color=INK)
    d.arrow((54, 70), (148, 70))
    d.box(150, 45, 200, 50, "quantized block")
    d.arrow((350, 70), (448, 70))
    d.line([(100, 70), (100, 150)], ORANGE, width=1.5)
    d.arrow((100, 150), (148, 150), ORANGE)
    d.box(150, 128, 200, 44, "x W + b, least squares", ORANGE)
    d.line([(350, 150), (462, 150)], ORANGE, width=1.5)
    d.arrow((462, 150), (462, 86), ORANGE)
    d.box(450, 56, 26, 28, "+")
    d.arrow((476, 70), (540, 70))
    d.text(548, 74, "y", anchor="start")
    d.text(476, 154, "what quantization lost", color=ORANGE, anchor="start")
    return d


FIGURES: dict[str, Callable[[], Drawing]] = {
    "pipeline.svg": pipeline,
    "uniform.svg": uniform,
    "log-sqrt2.svg": logarithmic,
    "reparameterization.svg": reparameterization,
    "compensation.svg": compensation,
    "floors.svg": floors,
}


def main() -> int:
    """Write every figure."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw().svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
