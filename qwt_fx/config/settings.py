"""What a configuration comes to: every choice made, each under the name that it has everywhere.

`settings_of` is the only place where a recipe, `attention` or "auto" is looked at: what comes behind
reads `Settings`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.config.config import AUTO, REMEDIES, QuantConfig
from qwt_fx.config.layer_settings import LayerSettings

# What each recipe takes where a configuration says "auto".
_RECIPES: dict[str, dict[str, Any]] = {
    "best": {
        # Refitting each layer on the floating-point path leaves a block's compensation nothing to do
        # that would pay for its multiplications (docs/accuracy.md has the table).
        "compensation": "none",
        "constant_tokens": True,
        "embedding_bits": 8,
        **vars(LayerSettings()),
    },
    "repq-vit": {
        "compensation": "none",
        "constant_tokens": False,
        "embedding_bits": 32,
        # The walk over the layers with every remedy off: what a single remedy is added to.
        **vars(
            LayerSettings(
                ranges="tensor",
                reparameterization=1.0,
                fold_values=False,
                input_scales=False,
                refit=False,
                target="local",
                rounding="nearest",
                bias_correction=False,
                symmetric_weights=False,
                token_masks="none",
                token_scales=False,
            )
        ),
    },
}
_CHOICES = ("compensation", "token_masks", *REMEDIES)
_LAYERS = tuple(f.name for f in fields(LayerSettings))
# Each of these asks for the walk over the layers; the other two mean something without it.
_ASK_FOR_WALK = frozenset(_LAYERS) - {"target", "token_masks", "hold_out"}


@dataclass(frozen=True)
class Settings:
    """How a graph is quantized, beside the bits of each layer (`QuantConfig.bits_for`).

    Attributes:
        storable: codes and zero points are integers of the width they have; `False`: as in the
            published code.
        decompose_attention: attention is computed in separate operators.
        quantize_attention: q, k, v and softmax(QK^T) are quantized.
        log_sqrt2: softmax outputs get log-sqrt2 quantizers of their product's bits.
        choose_softmax: each of these becomes uniform where that disturbs less.
        exceptions: weight bytes that 8 bits for sensitive layers may add, as a share of all.
        token_masks: "none", "regression" or "all"; see `QuantConfig`.
        constant_tokens: keys and values of the start token stay in floating point.
        embedding_bits: of embedding tables, 8 or 32.
        layers: what is done to each layer with all batches at hand; `None` is the published
            procedure: ranges from the first batch, weights rounded to nearest.
        compensation: how blocks are compensated; `None`: not at all.
    """

    storable: bool
    decompose_attention: bool
    quantize_attention: bool
    log_sqrt2: bool
    choose_softmax: bool
    exceptions: float
    token_masks: str
    constant_tokens: bool
    embedding_bits: int
    layers: LayerSettings | None
    compensation: CompensationSettings | None


def settings_of(config: QuantConfig) -> Settings:
    """Resolve a configuration: its recipe's choices, with those that it makes itself."""
    original = config.compat == "original"
    asked = {name: getattr(config, name) for name in _CHOICES if getattr(config, name) != AUTO}
    chosen = {**_RECIPES[config.recipe], **asked, "hold_out": config.hold_out}
    walk = config.recipe == "best" or not _ASK_FOR_WALK.isdisjoint(asked)
    compensation = None
    if chosen["compensation"] != "none":
        compensation = CompensationSettings(
            kind=chosen["compensation"],
            target=chosen["target"],
            hold_out=0.0 if original else config.hold_out,
            token_masks=chosen["token_masks"] != "none",
            half=not original,
        )
    quantize_attention = config.attention != "none"
    return Settings(
        storable=not original,
        # The published code computes attention in separate operators; the fused one rounds
        # differently, and a rounding flip at 6 bits moves later ranges by percents.
        decompose_attention=quantize_attention or original,
        quantize_attention=quantize_attention,
        log_sqrt2=config.attention in ("log2", AUTO),
        choose_softmax=config.attention == AUTO,
        exceptions=config.exceptions,
        token_masks=chosen["token_masks"],
        constant_tokens=chosen["constant_tokens"],
        embedding_bits=chosen["embedding_bits"],
        layers=LayerSettings(**{name: chosen[name] for name in _LAYERS}) if walk else None,
        compensation=compensation,
    )
