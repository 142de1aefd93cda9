"""What each recipe means, as declarations: every data-dependent choice is a field."""

from __future__ import annotations

from dataclasses import dataclass

from qwt_fx.config import QuantConfig


@dataclass(frozen=True)
class Recipe:
    """The choices a recipe makes.

    Attributes:
        compensation: "qwt" or "none".
        token_masks: leave out text positions that provably cannot matter (method W4).
        held_out: judge each compensation on held-out samples and choose its ridge there (W1, W2);
            otherwise minimum-norm least squares judged on the samples that fitted it.
        half_compensation: store compensation weights in half precision.
    """

    compensation: str
    token_masks: bool
    held_out: bool
    half_compensation: bool


REPQ_VIT_ORIGINAL = Recipe(
    compensation="none", token_masks=False, held_out=False, half_compensation=False
)
REPQ_VIT = Recipe(compensation="none", token_masks=False, held_out=True, half_compensation=True)
BEST = Recipe(compensation="qwt", token_masks=True, held_out=True, half_compensation=True)


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
