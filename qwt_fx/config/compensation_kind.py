"""The kinds of compensation a block can get, and how a configuration writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwt_fx.errors import ConfigError

FORMS = ("none", "qwt", "affine", "lowrank:R", "int8")
"""What a configuration may say; R is a whole number of at least 1."""

_FORM = re.compile(r"none|qwt|affine|int8|lowrank:([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class CompensationKind:
    """A kind of compensation: "none", "qwt", "affine", "lowrank" with its rank, or "int8"."""

    name: str
    rank: int | None = None

    def __str__(self) -> str:
        return self.name if self.rank is None else f"{self.name}:{self.rank}"


def parse_compensation(value: object) -> CompensationKind:
    """The kind that a configuration names. Raises `ConfigError` listing the forms."""
    match = _FORM.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(
            f"compensation: got {value!r}, wanted one of {', '.join(FORMS)} (R a whole number "
            "of at least 1)"
        )
    name, _, _ = match.group().partition(":")
    rank = match.group(1)
    return CompensationKind(name, None if rank is None else int(rank))


TARGETS = ("local", "fp")


@dataclass(frozen=True)
class CompensationSettings:
    """What is fitted to what, and what judges it.

    Attributes:
        kind: "qwt", "affine", "lowrank:R" (R at least 1; at most the width is used) or "int8".
        target: what a block's output should be: "local", the floating-point block on the quantized
            path's input, as published; "fp", the floating-point path's own output, so that errors
            from before the block are repaired, too.
        hold_out: share of the samples, in [0, 0.5), that chooses the ridge and decides whether a
            block is compensated: only with a positive R^2 there. 0 fits and judges on every
            sample by minimum-norm least squares, as published.
        token_masks: leave out text positions that provably cannot matter.
        half: store weights in half precision (they are read back as float32); one that overflows
            half precision stays in float32.

    Raises `ConfigError` for values outside of these.
    """

    kind: str = "qwt"
    target: str = "local"
    hold_out: float = 0.2
    token_masks: bool = True
    half: bool = True

    def __post_init__(self) -> None:
        if parse_compensation(self.kind).name == "none":
            raise ConfigError("compensation kind: got 'none': leave the pass out instead")
        if self.target not in TARGETS:
            raise ConfigError(
                f"compensation target: got {self.target!r}, wanted one of {', '.join(TARGETS)}"
            )
        if not 0.0 <= self.hold_out < 0.5:
            raise ConfigError(f"compensation hold_out: got {self.hold_out}, wanted [0, 0.5)")
