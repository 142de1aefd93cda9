"""New weight and bias of one layer from its sums: refit, rounding, bias correction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwt_fx.config.layer_settings import LayerSettings
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.numerics.second_moments import LayerSums, choose_refit
from qwt_fx.numerics.weight_rounding import gptq, round_to_nearest, row_qparams

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class FittedLayer:
    """What a layer becomes: weight (o, i) and bias (o,), qparams of the weight, what was found.

    before, after: mean squared error of the layer's output per token, summed over channels, on the
    quantized input: with the weights as they were, and with the new ones.
    """

    weight: Tensor
    bias: Tensor | None
    qparams: tuple[Tensor, Tensor] | None
    ridge: float | None
    before: float
    after: float


def fit_layer(
    weight: Tensor,
    bias: Tensor | None,
    spec: QuantSpec | None,
    train: LayerSums,
    judge: LayerSums,
    settings: LayerSettings,
) -> FittedLayer:
    """Fit a layer with weight (o, i), bias (o,), and the quantizer `spec` of its weight, if any.

    train, judge: sums of what the layer's output misses on tokens that fit and that judge; consumed.
    """
    wanted, ridge = weight.double(), None
    if settings.refit:
        change, ridge = choose_refit(train, judge, RIDGES)
        if change is not None:
            wanted = wanted + change
    else:
        train.absorb(judge)
    everything = train
    rounded, qparams = wanted, None
    if spec is not None:
        count = max(everything.count, 1)
        free_bias = settings.bias_correction
        gram = everything.centred()[0].div_(count) if free_bias else everything.gram / count
        gram = gram.float()
        rounded, qparams = round_weight(wanted.float(), gram, spec, settings)
        del gram
        rounded = rounded.double()
    change = rounded - weight.double()
    moved = everything.bias(change) if settings.bias_correction else torch.zeros_like(everything.t)
    before = everything.residual(None, torch.zeros_like(everything.t))
    after = everything.residual(change, moved)
    new_bias = None if bias is None else bias.double()
    if settings.bias_correction:
        new_bias = moved if new_bias is None else new_bias + moved
    tokens = max(everything.count, 1)
    return FittedLayer(rounded, new_bias, qparams, ridge, before / tokens, after / tokens)


def round_weight(
    weight: Tensor, gram: Tensor, spec: QuantSpec, settings: LayerSettings
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Dequantized rounded weight (o, i) float32 and its (scale, zero_point), (o,) each."""
    importance = gram.diagonal().clamp_min(0.0)
    if settings.rounding == "nearest":
        importance = torch.ones_like(importance)
    qparams = row_qparams(weight, importance, spec, symmetric=settings.symmetric_weights)
    if settings.rounding == "gptq":
        return gptq(weight, gram, *qparams, spec), qparams
    return round_to_nearest(weight, *qparams, spec), qparams
