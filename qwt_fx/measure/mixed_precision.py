"""The best bit width of every layer under a budget of bytes, from each layer's losses alone.

Errors of different layers are nearly uncorrelated, so the model's error is about the sum of the
losses of its operands (`measure.bit_losses`), and the choice of widths is a knapsack: least sum of
losses, sum of weight bytes within the budget. Each operand offers the widths on the lower convex hull
of (bytes, loss); taking the steps of all hulls by loss removed per byte is optimal at every size that
it passes (the Lagrangian bound). An input takes no bytes: its least loss comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwt_fx.errors import ConfigError
from qwt_fx.measure.bit_losses import INPUT, BitLoss

Operand = tuple[tuple[str, ...], str]  # layers, "weight" or "input"
Choice = dict[Operand, int]  # bits


@dataclass(frozen=True)
class Widening:
    """One operand goes from one width to a wider one.

    Attributes:
        operand: layers and "weight" or "input".
        bits: the width it gets.
        bytes: added to the weights.
        gain: loss removed, relative squared error of the output.
    """

    operand: Operand
    bits: int
    bytes: float
    gain: float


def by_operand(losses: Sequence[BitLoss]) -> dict[Operand, list[BitLoss]]:
    """The losses of each operand, narrowest first, in the order the operands were measured."""
    grouped: dict[Operand, list[BitLoss]] = {}
    for loss in losses:
        grouped.setdefault((loss.layers, loss.operand), []).append(loss)
    return {operand: sorted(rows, key=lambda r: r.bits) for operand, rows in grouped.items()}


def weight_bytes(losses: Sequence[BitLoss], choice: Mapping[Operand, int]) -> float:
    """Bytes of the packed weight codes at the widths chosen."""
    return sum(r.elements * r.bits / 8 for r in losses if choice[r.layers, r.operand] == r.bits)


def total_error(losses: Sequence[BitLoss], choice: Mapping[Operand, int]) -> float:
    """Sum of the losses at the widths chosen: relative squared error of the output, predicted."""
    return sum(r.error for r in losses if choice[r.layers, r.operand] == r.bits)


def narrowest(losses: Sequence[BitLoss]) -> Choice:
    """The narrowest width of every weight; of every input, the narrowest of least loss."""
    choice = {}
    for operand, rows in by_operand(losses).items():
        free = operand[1] == INPUT
        choice[operand] = min(rows, key=lambda r: (r.error, r.bits)).bits if free else rows[0].bits
    return choice


def steps(losses: Sequence[BitLoss]) -> list[Widening]:
    """From `narrowest` to the least loss: every step of every hull, most gain per byte first."""
    widenings = [
        step
        for operand, rows in by_operand(losses).items()
        if operand[1] != INPUT
        for step in _hull(operand, rows)
    ]
    return sorted(widenings, key=lambda step: -step.gain / step.bytes)


def _hull(operand: Operand, rows: Sequence[BitLoss]) -> list[Widening]:
    """The steps along the lower convex hull of (bytes, loss)."""
    taken, current = [], 0
    while current < len(rows) - 1:
        here = rows[current]
        offers = [
            Widening(operand, r.bits, r.elements * (r.bits - here.bits) / 8, here.error - r.error)
            for r in rows[current + 1 :]
        ]
        best = max(offers, key=lambda step: step.gain / step.bytes)
        if best.gain <= 0.0:
            break
        taken.append(best)
        current += 1 + offers.index(best)
    return taken


def choose_bits(losses: Sequence[BitLoss], budget: float) -> Choice:
    """Widths of least loss whose packed weights take at most `budget` bytes.

    A step that does not fit any more is left out, with those behind it on the same hull; others may
    still fit. Raises `ConfigError` where even the narrowest widths are too large.
    """
    choice = narrowest(losses)
    used = weight_bytes(losses, choice)
    if used > budget:
        raise ConfigError(
            f"the budget leaves {budget:,.0f} bytes for the weights searched, but the narrowest "
            f"widths take {used:,.0f}; give a larger one, or narrower candidates"
        )
    closed: set[Operand] = set()
    for step in steps(losses):
        if step.operand in closed:
            continue
        if used + step.bytes > budget:
            closed.add(step.operand)
            continue
        choice[step.operand] = step.bits
        used += step.bytes
    return choice


def frontier(losses: Sequence[BitLoss]) -> list[Choice]:
    """Choices of rising size, each optimal at its size; the first is `narrowest`."""
    choices = [narrowest(losses)]
    for step in steps(losses):
        choices.append(choices[-1] | {step.operand: step.bits})
    return choices


def overrides(choice: Mapping[Operand, int], kept: Mapping[str, int]) -> dict[str, str]:
    """Layer name -> "wNaM" in the order of the choice.

    kept: bits of an operand that was not searched, by "weight" and "input".
    """
    bits: dict[str, dict[str, int]] = {}
    for (layers, operand), width in choice.items():
        for layer in layers:
            bits.setdefault(layer, dict(kept))[operand] = width
    return {layer: f"w{b['weight']}a{b['input']}" for layer, b in bits.items()}
