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
