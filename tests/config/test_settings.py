"""What a configuration comes to: each recipe's choices, single ones beside them, and attention."""

from __future__ import annotations

from dataclasses import fields

import pytest

from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.config.config import AUTO, REMEDIES, QuantConfig
from qwt_fx.config.layer_settings import STRENGTHS, LayerSettings
from qwt_fx.config.settings import settings_of

# What asks for the walk over the layers, each at its weakest.
WEAKEST = {
    "ranges": "tensor", "reparameterization": 1.0, "fold_values": False, "input_scales": False,
    "refit": False, "rounding": "nearest", "bias_correction": False, "symmetric_weights": False,
    "token_scales": False, "tokens_per_input": 4,
}  # fmt: skip


def test_fields_of_layers_have_the_names_they_have_in_the_configuration() -> None:
    of_layers = {f.name for f in fields(LayerSettings)}
    assert of_layers <= {f.name for f in fields(QuantConfig)}
    assert of_layers == set(WEAKEST) | {"target", "token_masks", "hold_out"}
    assert set(REMEDIES) - of_layers == {"constant_tokens", "embedding_bits"}


def test_best_does_everything_but_compensate() -> None:
    settings = settings_of(QuantConfig())
    assert settings.layers == LayerSettings()
    assert settings.layers.target == "fp"
    assert settings.layers.token_masks == settings.token_masks == "regression"
    assert settings.layers.strengths == STRENGTHS
    assert settings.compensation is None
    assert settings.constant_tokens
    assert settings.embedding_bits == 8
    assert settings.storable


def test_the_published_procedure_does_nothing_to_layers_and_original_keeps_its_own_regression() -> (
    None
):
    settings = settings_of(QuantConfig(recipe="repq-vit", compensation="qwt"))
    assert settings.layers is None
    assert settings.token_masks == "none"
    assert not settings.constant_tokens
    assert settings.embedding_bits == 32
    assert settings.compensation == CompensationSettings("qwt", "local", 0.2, False, True)
    original = settings_of(QuantConfig(recipe="repq-vit", compat="original", compensation="qwt"))
    assert original.compensation == CompensationSettings("qwt", "local", 0.0, False, False)
    assert not original.storable


@pytest.mark.parametrize("name", WEAKEST)
def test_one_remedy_of_layers_asks_for_the_walk_with_all_others_off(name: str) -> None:
    layers = settings_of(QuantConfig(recipe="repq-vit", **{name: WEAKEST[name]})).layers
    assert layers == LayerSettings(**WEAKEST, target="local", token_masks="none", hold_out=0.2)


@pytest.mark.parametrize(
    "change", [{"target": "fp"}, {"token_masks": "all"}, {"hold_out": 0.1}, {"embedding_bits": 8}]
)
def test_what_means_something_without_the_walk_does_not_ask_for_it(change: dict) -> None:
    assert settings_of(QuantConfig(recipe="repq-vit", **change)).layers is None


@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
def test_a_choice_of_the_configuration_reaches_layers_and_compensation(recipe: str) -> None:
    change = {"target": "local", "token_masks": "all", "hold_out": 0.3, "refit": True}
    settings = settings_of(QuantConfig(recipe=recipe, compensation="lowrank:2", **change))
    assert settings.layers is not None
    assert {name: getattr(settings.layers, name) for name in change} == change
    assert settings.compensation == CompensationSettings("lowrank:2", "local", 0.3, True, True)
    assert settings.token_masks == "all"


def test_a_given_strength_is_the_only_candidate() -> None:
    assert LayerSettings(reparameterization="search").strengths == STRENGTHS
    assert LayerSettings(reparameterization=1).strengths == (1.0,)


@pytest.mark.parametrize(
    ("attention", "quantized", "log_sqrt2", "chosen"),
    [
        ("none", False, False, False),
        ("uniform", True, False, False),
        ("log2", True, True, False),
        (AUTO, True, True, True),
    ],
)
# Bits are no part of it: an override may quantize a product's operands where nothing else is.
@pytest.mark.parametrize("a_bits", [4, 16])
def test_attention_is_decided_here(
    attention: str, quantized: bool, log_sqrt2: bool, chosen: bool, a_bits: int
) -> None:
    settings = settings_of(QuantConfig(a_bits=a_bits, attention=attention))
    assert settings.decompose_attention is quantized
    assert settings.quantize_attention is quantized
    assert settings.log_sqrt2 is log_sqrt2
    assert settings.choose_softmax is chosen


def test_the_published_code_computes_attention_in_separate_operators() -> None:
    settings = settings_of(QuantConfig(recipe="repq-vit", compat="original"))
    assert settings.decompose_attention
    assert not settings.quantize_attention
