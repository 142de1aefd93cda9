"""What each recipe means, as declarations: every data-dependent choice is a field."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwt_fx.config import QuantConfig


@dataclass(frozen=True)
class Recipe:
    """The choices a recipe makes.

    Attributes:
        compensation: "qwt" or "none".
        mask_ranges, mask_regression: leave text positions that provably cannot matter out of the
            quantizers' ranges / of the compensation's least squares.
        held_out: judge each compensation on held-out samples and choose its ridge there (W1, W2);
            otherwise minimum-norm least squares judged on the samples that fitted it.
        half_compensation: store compensation weights in half precision.
    """

    compensation: str
    mask_ranges: bool
    mask_regression: bool
    held_out: bool
    half_compensation: bool


REPQ_VIT_ORIGINAL = Recipe(
    compensation="none",
    mask_ranges=False,
    mask_regression=False,
    held_out=False,
    half_compensation=False,
)
REPQ_VIT = replace(REPQ_VIT_ORIGINAL, held_out=True, half_compensation=True)
# Ranges keep the positions behind the end of a text: their activations resemble those of the
# end-of-text token, which is the one that is pooled, and leaving them out costs the demo's text tower
# about 1 dB at 4 bits (README, Limits).
BEST = replace(REPQ_VIT, compensation="qwt", mask_regression=True)


def masks_for(config: QuantConfig) -> tuple[bool, bool]:
    """Whether (ranges, regression) leave out positions that cannot matter."""
    if config.token_masks == "auto":
        recipe = recipe_for(config)
        return recipe.mask_ranges, recipe.mask_regression
    return config.token_masks == "all", config.token_masks in ("all", "regression")


def recipe_for(config: QuantConfig) -> Recipe:
    """The recipe a configuration names."""
    if config.recipe == "best":
        return BEST
    return REPQ_VIT_ORIGINAL if config.compat == "original" else REPQ_VIT


def compensation_for(config: QuantConfig) -> str:
    """The compensation a configuration asks for; "auto" is the recipe's own."""
    if config.compensation == "auto":
        return recipe_for(config).compensation
    return config.compensation
