"""Make a CLIP hard to quantize without changing its function.

A small model loses little when it is quantized. Two rescales give it what makes real CLIPs lose,
in every block of both towers, with FP32 features equal up to rounding:

* Norm channels. For ``ln_1`` and ``ln_2`` with positive scales s (d,), the affine is multiplied
  and the input columns of the linear that follows are divided:
  ``(W / s) (s * LN(x)) == W LN(x)``. RepQ-ViT's reparameterization undoes this one exactly.
* Ill-conditioned V/out_proj pairs. Attention mixes the rows of V by token, never by channel, so
  the rows of V (and their biases) can be multiplied by t (d,) and the input columns of
  ``out_proj`` divided: ``(O / t) (A (t * V)) == O (A V)``. ``out_proj`` has a per-tensor
  activation quantizer, which then sees channels of very different size.

All is computed in float64 and stored in the tensors' own dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwt_fx.errors import ConfigError, ModelError

_BLOCK = re.compile(
    r"^(?P<block>(?:visual\.)?transformer\.resblocks\.(?P<index>\d+)\.)ln_1\.weight$"
)


@dataclass(frozen=True)
class Strength:
    """How far the rescale goes.

    Attributes:
        norm_sigma: standard deviation of the logarithm of the norm scales.
        norm_outliers: share of a norm's channels (at least one) scaled by `norm_factor` more.
        norm_factor: the factor of these channels.
        value_sigma: standard deviation of the logarithm of the V scales.
        value_outliers: number of V channels per block scaled by `value_factor` more.
        value_factor: the factor of these channels.
    """

    norm_sigma: float = 1.0
    norm_outliers: float = 0.01
    norm_factor: float = 20.0
    value_sigma: float = 1.05
    value_outliers: int = 2
    value_factor: float = 8.0

    def __post_init__(self) -> None:
        for name, low in (
            ("norm_sigma", 0.0),
            ("norm_outliers", 0.0),
            ("value_sigma", 0.0),
            ("value_outliers", 0),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= low):
                raise ConfigError(f"Strength.{name} is {value}; it must be at least {low}.")
        if self.norm_outliers > 1.0:
            raise ConfigError(f"Strength.norm_outliers is {self.norm_outliers}; at most 1.")
        for name in ("norm_factor", "value_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"Strength.{name} is {value}; it must be positive.")


def harden(
    state_dict: Mapping[str, Tensor], *, seed: int, strength: Strength | None = None
) -> dict[str, Tensor]:
    """Return a rescaled copy of an open_clip CLIP ``state_dict`` that computes the same features.

    Every tensor that is not touched is the one given; nothing is changed in place. The blocks are
    visited in a fixed order, so equal seeds give equal weights.
    """
    strength = Strength() if strength is None else strength
    matches = [match for name in state_dict if (match := _BLOCK.match(name))]
    if not matches:
        raise ModelError(
            "the state dict has no transformer.resblocks.*.ln_1.weight; "
            "only open_clip's CLIP with its own transformer blocks can be hardened."
        )
    result = dict(state_dict)
    generator = torch.Generator().manual_seed(seed)
    order = sorted((match["block"].startswith("visual."), int(match["index"])) for match in matches)
    for is_visual, index in order:
        block = f"{'visual.' if is_visual else ''}transformer.resblocks.{index}."
        scale_norm(result, f"{block}ln_1", f"{block}attn.in_proj_weight", generator, strength)
        scale_norm(result, f"{block}ln_2", f"{block}mlp.c_fc.weight", generator, strength)
        scale_values(result, f"{block}attn", generator, strength)
    return result


def scale_norm(
    state: dict[str, Tensor],
    norm: str,
    linear: str,
    generator: torch.Generator,
    strength: Strength,
) -> None:
    """Scale the affine (d,) of ``norm`` and divide the columns of ``linear`` (o, d) by as much."""
    weight = state[f"{norm}.weight"]
    count = min(len(weight), max(1, round(strength.norm_outliers * len(weight))))
    count = count if strength.norm_outliers > 0.0 else 0
    scale = _scales(len(weight), strength.norm_sigma, count, strength.norm_factor, generator)
    for name in (f"{norm}.weight", f"{norm}.bias"):
        state[name] = _product(state[name], scale)
    state[linear] = _product(state[linear], 1.0 / scale)


def scale_values(
    state: dict[str, Tensor], attention: str, generator: torch.Generator, strength: Strength
) -> None:
    """Scale the V rows (d of 3d) of ``in_proj`` and divide the columns of ``out_proj`` (d, d)."""
    width = state[f"{attention}.out_proj.weight"].shape[1]
    count = min(width, strength.value_outliers)
    scale = _scales(width, strength.value_sigma, count, strength.value_factor, generator)
    rows = torch.cat([torch.ones(2 * width, dtype=torch.float64), scale])
    weight, bias = f"{attention}.in_proj_weight", f"{attention}.in_proj_bias"
    state[weight] = _product(state[weight], rows[:, None])
    if bias in state:
        state[bias] = _product(state[bias], rows)
    out = f"{attention}.out_proj.weight"
    state[out] = _product(state[out], 1.0 / scale)


def _scales(
    count: int, sigma: float, outliers: int, factor: float, generator: torch.Generator
) -> Tensor:
    """Draw (count,) float64 positive scales exp(N(0, sigma)), ``outliers`` of them x ``factor``."""
    scale = (sigma * torch.randn(count, generator=generator, dtype=torch.float64)).exp()
    chosen = torch.randperm(count, generator=generator)[:outliers]
    scale[chosen] *= factor
    return scale


def _product(tensor: Tensor, scale: Tensor) -> Tensor:
    return (tensor.to(torch.float64) * scale).to(tensor.dtype)
