"""Bits of one layer: what overrides say of layers by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwt_fx.errors import ConfigError

FLOAT_BITS = (16, 32)
MIN_BITS, MAX_BITS = 2, 8

_OVERRIDE = re.compile(r"w(\d+)a(\d+)(?:(d|:dynamic)|(s|:static))?")


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer: `weight` and `activation`, `None` where that side stays in floating point.

    dynamic: whether a linear's input finds the range of each token when it runs; `None` in an
    override that leaves that to the configuration.
    """

    weight: int | None
    activation: int | None
    dynamic: bool | None = None

    @property
    def quantized(self) -> bool:
        """Whether anything of the layer is quantized."""
        return self.weight is not None or self.activation is not None


def check_bits(name: str, value: object) -> int | None:
    """Validate a bit width: 2..8 is an integer width, 16 and 32 mean floating point (`None`)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"{name}: got {value!r}, wanted an integer in 2..8 (16 or 32 = not quantized)"
        )
    if value in FLOAT_BITS:
        return None
    if not MIN_BITS <= value <= MAX_BITS:
        raise ConfigError(f"{name}: got {value}, wanted 2..8 (16 or 32 = not quantized)")
    return value


def parse_override(glob: str, value: str) -> LayerBits:
    """`"w8a8"`, `"w8a8d"` (dynamic), `"w8a8s"` (static) or `"skip"` as bits; the last letter may be
    written out, `"w8a8:dynamic"`. Raises `ConfigError` naming the glob."""
    if value == "skip":
        return LayerBits(None, None)
    match = _OVERRIDE.fullmatch(value)
    if match is None:
        raise ConfigError(
            f"override {glob}={value}: wanted wNaM such as w8a8, or skip; wNaMd and wNaMs say "
            "whether activations are dynamic or static"
        )
    weight, activation, dynamic, static = match.groups()
    return LayerBits(
        check_bits(f"override {glob}: weight bits", int(weight)),
        check_bits(f"override {glob}: activation bits", int(activation)),
        None if dynamic is static else dynamic is not None,
    )
