"""What each recipe means, as declarations: every data-dependent choice is a field."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.config.config import AUTO, REMEDIES, QuantConfig
from qwt_fx.config.layer_settings import STRENGTHS, LayerSettings


@dataclass(frozen=True)
class Recipe:
    """The choices a recipe makes.

    Attributes:
        compensation: a kind of compensation, or "none".
        mask_ranges, mask_regression: leave text positions that provably cannot matter out of the
            quantizers' ranges / of all least squares.
        held_out: judge each compensation on held-out samples and choose its ridge there;
            otherwise minimum-norm least squares judged on the samples that fitted it.
        half_compensation: store compensation weights in half precision.
        target: "local" or "fp".
        layers: what is done to each layer with all batches at hand; `None` is the published
            procedure: ranges from the first batch, weights rounded to nearest.
        constant_tokens: keep the start token's keys and values in floating point.
        embedding_bits: of embedding tables, 8 or 32.
    """

    compensation: str
    mask_ranges: bool = False
    mask_regression: bool = False
    held_out: bool = False
    half_compensation: bool = False
    target: str = "local"
    layers: LayerSettings | None = None
    constant_tokens: bool = False
    embedding_bits: int = 32


REPQ_VIT_ORIGINAL = Recipe(compensation="none")
REPQ_VIT = replace(REPQ_VIT_ORIGINAL, held_out=True, half_compensation=True)
BEST = Recipe(
    # Refitting each layer on the floating-point path leaves a block's compensation nothing to do
    # that would pay for its multiplications (docs/accuracy.md has the table).
    compensation="none",
    mask_regression=True,
    held_out=True,
    half_compensation=True,
    target="fp",
    layers=LayerSettings(),
    constant_tokens=True,
    embedding_bits=8,
)
# The layers' walk with every remedy switched off: what a single remedy is added to.
_BARE = LayerSettings(
    output_ranges=False,
    strengths=(1.0,),
    fold_values=False,
    input_scales=False,
    refit=False,
    fp_target=False,
    rounding="nearest",
    bias_correction=False,
    symmetric_weights=False,
    mask_sums=False,
    token_scales=False,
)

_OF_LAYERS = (
    "fold_values", "input_scales", "refit", "rounding", "bias_correction", "symmetric_weights",
    "token_scales", "tokens_per_input",
)  # fmt: skip


def recipe_for(config: QuantConfig) -> Recipe:
    """The recipe a configuration names, with the choices it makes itself."""
    if config.recipe == "best":
        recipe = BEST
    else:
        recipe = REPQ_VIT_ORIGINAL if config.compat == "original" else REPQ_VIT
    changes: dict[str, Any] = {}
    if config.compensation != AUTO:
        changes["compensation"] = config.compensation
    if config.token_masks != AUTO:
        changes["mask_ranges"] = config.token_masks == "all"
        changes["mask_regression"] = config.token_masks in ("all", "regression")
    for name in ("target", "constant_tokens", "embedding_bits"):
        if getattr(config, name) != AUTO:
            changes[name] = getattr(config, name)
    recipe = replace(recipe, **changes)
    return replace(recipe, layers=_layers(config, recipe))


def compensation_of(recipe: Recipe, hold_out: float) -> CompensationSettings | None:
    """How a recipe's blocks are compensated; `hold_out`: share of the samples that may judge it."""
    if recipe.compensation == "none":
        return None
    return CompensationSettings(
        kind=recipe.compensation,
        target=recipe.target,
        hold_out=hold_out if recipe.held_out else 0.0,
        token_masks=recipe.mask_regression,
        half=recipe.half_compensation,
    )


def _layers(config: QuantConfig, recipe: Recipe) -> LayerSettings | None:
    """The recipe's remedies of layers with those that the configuration sets."""
    named = {n: getattr(config, n) for n in REMEDIES if getattr(config, n) != AUTO}
    changes: dict[str, Any] = {name: named[name] for name in _OF_LAYERS if name in named}
    if "ranges" in named:
        changes["output_ranges"] = named["ranges"] == "output"
    if "reparameterization" in named:
        strength = named["reparameterization"]
        changes["strengths"] = STRENGTHS if strength == "search" else (float(strength),)
    layers = recipe.layers
    if layers is None:
        if not changes:
            return None
        layers = _BARE
    return replace(
        layers,
        **changes,
        fp_target=recipe.target == "fp",
        mask_ranges=recipe.mask_ranges,
        mask_sums=recipe.mask_regression,
        hold_out=config.hold_out,
    )
