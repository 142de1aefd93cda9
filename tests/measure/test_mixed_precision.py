"""The search of bit widths: optimal at the sizes it passes, never above its budget."""

from __future__ import annotations

import itertools
import random

import pytest

from qwt_fx.errors import ConfigError
from qwt_fx.measure.bit_losses import INPUT, WEIGHT, BitLoss
from qwt_fx.measure.mixed_precision import (
    choose_bits,
    frontier,
    narrowest,
    overrides,
    total_error,
    weight_bytes,
)

WIDTHS = (4, 6, 8)


def _losses(seed: int, layers: int = 4) -> list[BitLoss]:
    """Losses that fall with the width, by factors that are not the same."""
    rng = random.Random(seed)
    found = []
    for index in range(layers):
        for operand in (WEIGHT, INPUT):
            error = rng.uniform(0.1, 1.0)
            elements = rng.choice([64, 128, 512]) if operand == WEIGHT else 0
            for bits in WIDTHS:
                found.append(BitLoss((f"layer{index}",), operand, bits, elements, error))
                error *= rng.uniform(0.05, 0.9)
    return found


def _best(losses: list[BitLoss], budget: float) -> float:
    """Least sum of losses within the budget, by trying every choice of weights' widths."""
    operands = [(f"layer{i}",) for i in range(4)]
    inputs = {(layers, INPUT): 8 for layers in operands}
    found = []
    for bits in itertools.product(WIDTHS, repeat=4):
        weights = {(o, WEIGHT): b for o, b in zip(operands, bits, strict=True)}
        if weight_bytes(losses, weights | inputs) <= budget:
            found.append(total_error(losses, weights | inputs))
    return min(found)


@pytest.mark.parametrize("seed", range(5))
def test_every_choice_of_the_frontier_is_the_best_of_its_size(seed: int) -> None:
    losses = _losses(seed)
    choices = frontier(losses)
    assert len(choices) > 4
    for choice in choices:
        size = weight_bytes(losses, choice)
        assert total_error(losses, choice) == pytest.approx(_best(losses, size))


@pytest.mark.parametrize("seed", range(5))
def test_a_choice_keeps_to_its_budget_and_lies_between_its_neighbours_on_the_frontier(
    seed: int,
) -> None:
    losses = _losses(seed)
    sizes = [weight_bytes(losses, choice) for choice in frontier(losses)]
    for before, after in itertools.pairwise(sizes):
        budget = (before + after) / 2
        choice = choose_bits(losses, budget)
        assert weight_bytes(losses, choice) <= budget
        assert _best(losses, budget) <= total_error(losses, choice) + 1e-12
        assert total_error(losses, choice) <= _best(losses, before) + 1e-12


def test_inputs_cost_no_bytes_and_get_the_least_loss_at_any_budget() -> None:
    losses = _losses(0)
    choice = choose_bits(losses, weight_bytes(losses, narrowest(losses)))
    assert {bits for (_, operand), bits in choice.items() if operand == INPUT} == {8}
    assert {bits for (_, operand), bits in choice.items() if operand == WEIGHT} == {4}


def test_of_equal_losses_the_narrower_input_is_taken() -> None:
    losses = [BitLoss(("a",), INPUT, bits, 0, 0.0) for bits in WIDTHS]
    assert narrowest(losses) == {(("a",), INPUT): 4}


def test_a_width_that_gains_nothing_is_left_out() -> None:
    errors = {4: 0.5, 6: 0.1, 8: 0.2}
    losses = [BitLoss(("a",), WEIGHT, bits, 64, error) for bits, error in errors.items()]
    assert choose_bits(losses, 1e9) == {(("a",), WEIGHT): 6}


def test_a_width_above_the_hull_is_skipped_on_the_way() -> None:
    errors = {4: 0.50, 6: 0.49, 8: 0.0}
    losses = [BitLoss(("a",), WEIGHT, bits, 64, error) for bits, error in errors.items()]
    assert [choice[("a",), WEIGHT] for choice in frontier(losses)] == [4, 8]


def test_a_budget_below_the_narrowest_widths_is_refused_with_both_sizes() -> None:
    losses = _losses(0)
    least = weight_bytes(losses, narrowest(losses))
    with pytest.raises(ConfigError, match=f"{least:,.0f}"):
        choose_bits(losses, least - 1)


def test_overrides_name_every_layer_of_a_group_and_keep_what_was_not_searched() -> None:
    choice = {(("q", "k"), WEIGHT): 4, (("q", "k"), INPUT): 6, (("conv",), WEIGHT): 8}
    found = overrides(choice, {WEIGHT: 16, INPUT: 8})
    assert found == {"q": "w4a6", "k": "w4a6", "conv": "w8a8"}
