"""How images are prepared for a model: what the user says of it, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qwt_fx.errors import ConfigError

INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")

Value = object
"""A number, a text, or a tuple of numbers."""


@dataclass(frozen=True)
class PreprocessOverrides:
    """What the user says of the preprocessing; `None` leaves a field as the model has it.

    Attributes:
        mean, std: of each channel, red, green, blue, for pixels in [0, 1].
        resize_mode: "shortest" edge to the size and the centre cut out, "longest" edge to the size and
            the rest filled, or "squash" to the size.
        interpolation: "bicubic" or "bilinear".

    Raises `ConfigError` for values outside of these.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize_mode: str | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ConfigError(f"image_{name}: got {list(values)}, wanted 3 numbers: R, G, B")
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if self.std is not None and min(self.std) <= 0.0:
            raise ConfigError(f"image_std: got {list(self.std)}, wanted numbers above 0")
        for name, choices in (
            ("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ConfigError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}")

    def given(self) -> dict[str, Value]:
        """The fields that are given, by open_clip's names."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, known: Mapping[str, Any]) -> PreprocessOverrides:
        """These, and `known` for the fields that are not given."""
        return PreprocessOverrides(**(dict(known) | self.given()))


def flag(field: str) -> str:
    """The command line's flag for a field of the preprocessing."""
    return f"--image-{field}" if field in ("mean", "std") else f"--{field.replace('_', '-')}"


def words(field: str, value: Value) -> str:
    """A flag and its value, as a command line has it."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return f"{flag(field)} {shown}"


def describe(preprocess: Mapping[str, Any]) -> str:
    """One line: size, resize mode, interpolation, mean and std of open_clip's `PreprocessCfg`."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    statistics = [
        f"{name} {' '.join(f'{v:g}' for v in preprocess[name])}" for name in ("mean", "std")
    ]
    shape = f"{height}x{width} pixels, resize {preprocess['resize_mode']}"
    return ", ".join((shape, str(preprocess["interpolation"]), *statistics))
