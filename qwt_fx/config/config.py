"""`QuantConfig`: everything that decides how a model is quantized, frozen and validated."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from qwt_fx.config.compensation_kind import FORMS, parse_compensation
from qwt_fx.config.layer_bits import LayerBits, check_bits, parse_override
from qwt_fx.errors import ConfigError

RECIPES = ("repq-vit", "best")
COMPATS = ("none", "original")
TOKEN_MASKS = ("auto", "none", "regression", "all")
RANGES = ("auto", "tensor", "output")
TARGETS = ("auto", "local", "fp")
ROUNDINGS = ("auto", "nearest", "gptq")
AUTO = "auto"
SWITCHES = (
    "fold_values",
    "input_scales",
    "refit",
    "bias_correction",
    "symmetric_weights",
    "token_scales",
    "constant_tokens",
)
REMEDIES = (
    "ranges", "reparameterization", "target", "rounding", "embedding_bits", "tokens_per_input",
    *SWITCHES,
)  # fmt: skip
ACTIVATIONS = ("static", "dynamic")
FIELDS = (
    "w_bits", "a_bits", "recipe", "compat", "compensation", "attention", "activations", "exceptions",
)  # fmt: skip
"""Those of `QuantConfig` that are one flag of the program each."""
ATTENTIONS = ("none", "uniform", "log2", "auto")


def check_compensation(value: object) -> None:
    """Raise `ConfigError`, naming the allowed forms, unless this is a compensation or "auto"."""
    if value == AUTO:
        return
    try:
        parse_compensation(value)
    except ConfigError:
        raise ConfigError(
            f"compensation: got {value!r}, wanted one of {', '.join((AUTO, *FORMS))} "
            "(R a whole number of at least 1)"
        ) from None


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}, wanted one of {', '.join(allowed)}")


def _switch(name: str, value: object) -> None:
    if value != AUTO and not isinstance(value, bool):
        raise ConfigError(f"{name}: got {value!r}, wanted true, false or 'auto'")


def _fraction(name: str, value: object, *, below: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 <= float(value) < below:  # type: ignore[arg-type]
        raise ConfigError(f"{name}: got {value!r}, wanted a number in [0, {below:g})")


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize a model.

    Attributes:
        w_bits, a_bits: bits of weights and of their input activations, 2..8; 16 or 32 leaves
            that side in floating point.
        recipe: "best" (default) or "repq-vit" (the published procedure).
        compat: "original" reproduces the published CLIP code exactly, non-integer and unclamped
            zero points included (only with recipe "repq-vit"); such a model can be evaluated,
            not saved, lowered or exported.
        compensation: what each block's error is repaired with: "qwt", a linear of the block's input
            in half precision (QwT, arXiv 2411.13918); "lowrank:R", that linear as two factors of
            rank R; "int8", an 8-bit linear of the block's first quantized activation; "affine", a
            scale and shift of its last linear, folded away (QwT-v2, arXiv 2505.20932); "none";
            "auto" is the recipe's own choice.
        attention: "none" leaves q, k, v and softmax(QK^T) in floating point, "uniform" quantizes
            them uniformly, "log2" the softmax with the log-sqrt2 quantizer, "auto" each softmax with
            whichever disturbs its product with the values less.
        exceptions: layers that hurt the output most get 8 bits until the quantized weights are this
            share larger, in [0, 1]; 0 makes none.
        activations: "static" finds the range of every quantized activation on calibration data;
            "dynamic" lets the input of each linear find the range of each token when it runs.
            Convolutions' inputs and attention's products stay static.
        overrides: layer-name glob -> "wNaM" or "skip"; "wNaMd" and "wNaMs" make the layer's input
            dynamic or static; the last match wins; a glob that matches nothing is an error when the
            graph is prepared.
        hold_out: share of the calibration samples that judges each compensation and chooses its
            ridge, in [0, 0.5); 0 judges on the samples that fitted it, as the original does.
        token_masks: where text positions that provably cannot influence the output are left out:
            "none", "regression" (of all least squares), "all" (ranges too).

    The remedies of `best`, each alone (see `config.layer_settings`); "auto", the default of every one,
    is the recipe's choice.

    Attributes:
        ranges: from all batches, what disturbs the layers' "output" least, or the "tensor" itself;
            "auto" is, in recipe "repq-vit", the percentile search of the first batch.
        reparameterization: how much of a norm's channel differences moves into the weights: a
            number in [0, 1], 1 being RepQ-ViT's own, or "search".
        fold_values: move the scales of attention's output into the rows of the values.
        input_scales: where nothing upstream can take the differences between channels, multiply a
            layer's input by a constant per channel, if it is worth it.
        refit: refit each weight on its quantized input.
        target: what refit and compensation aim at: "local", the float layer or block on the
            quantized path's input (as published), or "fp", the floating-point path's.
        rounding: of weights, "nearest" or "gptq".
        bias_correction: let biases take mean errors.
        symmetric_weights: fix the zero point of weights at 2^(bits - 1).
        token_scales: give the few positions that are far larger than all others a scale of their own.
        constant_tokens: keep keys and values of the start token, which every text shares, in
            floating point.
        embedding_bits: 8 stores embedding tables as integers (weights only), 32 does not.
        tokens_per_input: layers with more inputs than outputs are refitted and rounded on a fixed
            random part of the calibration tokens, at least this many for each input channel and
            4,096; a number larger than there are tokens means all of them.
    """

    w_bits: int = 8
    a_bits: int = 8
    recipe: str = "best"
    compat: str = "none"
    compensation: str = "auto"
    attention: str = "none"
    exceptions: float = 0.0
    activations: str = "static"
    overrides: Mapping[str, str] = field(default_factory=dict)
    hold_out: float = 0.2
    token_masks: str = AUTO
    ranges: str = AUTO
    reparameterization: str | float = AUTO
    fold_values: bool | str = AUTO
    input_scales: bool | str = AUTO
    refit: bool | str = AUTO
    target: str = AUTO
    rounding: str = AUTO
    bias_correction: bool | str = AUTO
    symmetric_weights: bool | str = AUTO
    token_scales: bool | str = AUTO
    constant_tokens: bool | str = AUTO
    embedding_bits: int | str = AUTO
    tokens_per_input: int | str = AUTO

    def __post_init__(self) -> None:
        check_bits("w_bits", self.w_bits)
        check_bits("a_bits", self.a_bits)
        _choice("recipe", self.recipe, RECIPES)
        _choice("compat", self.compat, COMPATS)
        check_compensation(self.compensation)
        _choice("attention", self.attention, ATTENTIONS)
        _choice("activations", self.activations, ACTIVATIONS)
        _choice("token_masks", self.token_masks, TOKEN_MASKS)
        _fraction("hold_out", self.hold_out, below=0.5)
        _fraction("exceptions", self.exceptions, below=1.0 + 1e-9)
        _choice("ranges", self.ranges, RANGES)
        _choice("target", self.target, TARGETS)
        _choice("rounding", self.rounding, ROUNDINGS)
        for name in SWITCHES:
            _switch(name, getattr(self, name))
        if self.reparameterization not in (AUTO, "search"):
            _fraction("reparameterization", self.reparameterization, below=1.0 + 1e-9)
        if self.embedding_bits not in (AUTO, 8, 32) or isinstance(self.embedding_bits, bool):
            raise ConfigError(
                f"embedding_bits: got {self.embedding_bits!r}, wanted 8, 32 or 'auto'"
            )
        if self.tokens_per_input != AUTO and (
            not isinstance(self.tokens_per_input, int)
            or isinstance(self.tokens_per_input, bool)
            or self.tokens_per_input < 1
        ):
            raise ConfigError(
                f"tokens_per_input: got {self.tokens_per_input!r}, wanted an integer of at least 1 "
                "or 'auto'"
            )
        if self.compat == "original" and self.recipe != "repq-vit":
            raise ConfigError(
                f"compat='original' with recipe={self.recipe!r}: it reproduces the published "
                "procedure, so it needs recipe='repq-vit'"
            )
        if self.compat == "original" and self.compensation not in (AUTO, "none", "qwt"):
            raise ConfigError(
                f"compensation={self.compensation!r} with compat='original': the published "
                "procedure knows none and qwt; use compat='none'"
            )
        if self.compat == "original" and self.activations != "static":
            raise ConfigError(
                f"activations={self.activations!r} with compat='original': the published procedure has "
                "static activations alone; use compat='none'"
            )
        if self.compat == "original" and (self.attention == AUTO or self.exceptions > 0.0):
            raise ConfigError(
                f"attention={self.attention!r}, exceptions={self.exceptions} with "
                "compat='original': the published procedure has neither 'auto' nor exceptions; use "
                "compat='none'"
            )
        chosen = [name for name in REMEDIES if getattr(self, name) != AUTO]
        if self.compat == "original" and chosen:
            raise ConfigError(
                f"{chosen[0]} with compat='original': the published procedure has no such remedy; "
                "use compat='none'"
            )
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides: got {self.overrides!r}, wanted a mapping glob -> 'w8a8'")
        for glob, value in self.overrides.items():
            if not isinstance(glob, str) or not isinstance(value, str):
                raise ConfigError(f"overrides: {glob!r}={value!r}: both must be strings")
            if parse_override(glob, value).dynamic and self.compat == "original":
                raise ConfigError(
                    f"override {glob}={value} with compat='original': the published procedure has "
                    "static activations alone; use compat='none'"
                )
        object.__setattr__(self, "overrides", MappingProxyType(dict(self.overrides)))

    def bits_for(self, layer: str) -> LayerBits:
        """Bits of the layer with this name, overrides applied (the last match wins)."""
        bits = LayerBits(check_bits("w_bits", self.w_bits), check_bits("a_bits", self.a_bits))
        for glob, value in self.overrides.items():
            if fnmatch.fnmatchcase(layer, glob):
                bits = parse_override(glob, value)
        dynamic = self.activations == "dynamic" if bits.dynamic is None else bits.dynamic
        return dataclasses.replace(bits, dynamic=dynamic)

    def unmatched_overrides(self, layers: list[str]) -> list[str]:
        """Globs that match none of these layer names."""
        return [g for g in self.overrides if not any(fnmatch.fnmatchcase(n, g) for n in layers)]

    def overridden(self, layer: str) -> bool:
        """Whether an override names the layer with this name."""
        return any(fnmatch.fnmatchcase(layer, glob) for glob in self.overrides)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["overrides"] = dict(self.overrides)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Build from plain values; an unknown key raises `ConfigError`."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown configuration keys {unknown}; known: {sorted(known)}")
        return cls(**dict(values))

    def replace(self, **changes: Any) -> QuantConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantConfig:
        return self  # frozen: a copy would be equal, and mappingproxy cannot be copied
