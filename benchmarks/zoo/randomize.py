"""Weights for which quantizing means something.

Fresh initializations are vacuous: a LayerScale of 1e-5, zero biases and norms without affine leave
blocks that contribute nothing and channels that are all alike. What a trained ViT has, and what
RepQ-ViT is about, is channels whose scales differ by orders of magnitude.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

GAIN = 0.7  # standard deviation of a weight times the square root of its fan-in
_MULTIPLIERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


class _Draw:
    """Seeded random fillings of a parameter, in place."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, tensor: Tensor, deviation: float) -> None:
        tensor.normal_(0.0, deviation, generator=self.generator)

    def uniform(self, tensor: Tensor, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=self.generator)

    def channel_scales(self, tensor: Tensor) -> None:
        """exp(N(0, 1)), with root mean square 1: attention stays as soft as without the scales."""
        self.normal(tensor, 1.0)
        tensor.exp_()
        tensor.div_(tensor.square().mean().sqrt())


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.dim() == 1


def randomize(model: nn.Module, seed: int = 0, x: Tensor | None = None) -> nn.Module:
    """Fill a model's parameters in place and put it into evaluation mode.

    Norms: weight exp(N(0, 1)) over its root mean square, of batch norms U(0.75, 1.25), bias 0.2 N(0, 1).
    Linears, convolutions and fused projections: weight N(0, 0.7 / sqrt(fan in)), bias 0.1 N(0, 1).
    LayerScale: U(0.5, 1).
    Other parameters (tokens, position tables) that are all equal become 0.1 N(0, 1); the rest keep
    the library's own initialization. Batch norms get the statistics of an input batch `x`.
    """
    draw = _Draw(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _fill(draw, module, name, parameter)
        if x is not None:
            _settle(model.eval(), x)
    return model.eval()


def _settle(model: nn.Module, x: Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        model(x)


def _fill(draw: _Draw, module: nn.Module, name: str, parameter: Tensor) -> None:
    if _is_norm(module):
        if name == "weight" and isinstance(module, _BatchNorm):
            draw.uniform(parameter, 0.75, 1.25)  # of convolutions on one quantizer for all channels
        elif name == "weight":
            draw.channel_scales(parameter)
        elif name == "bias":
            draw.normal(parameter, 0.2)
    elif isinstance(module, _MULTIPLIERS) or name.endswith("_proj_weight"):
        if parameter.dim() == 1:
            draw.normal(parameter, 0.1)
        else:
            draw.normal(parameter, GAIN / math.sqrt(parameter[0].numel()))
    elif _is_layer_scale(module, name):
        draw.uniform(parameter, 0.5, 1.0)
    elif (
        name != "logit_scale"
        and parameter.numel()
        and bool((parameter == parameter.reshape(-1)[0]).all())
    ):
        draw.normal(parameter, 0.1)


def _is_layer_scale(module: nn.Module, name: str) -> bool:
    words = ("gamma", "lambda", "layer_scale", "layerscale")
    return "LayerScale" in type(module).__name__ or any(word in name.lower() for word in words)
