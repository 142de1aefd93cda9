"""How images are prepared for a model: what its weights were trained with, or what the user says.

open_clip keeps mean, std, interpolation and resize mode with each tag of a registry model, not with the
model: a checkpoint file names no tag. What all tags of the model agree on holds for the file too; where
they differ, a wrong guess is a model that answers and is wrong, so the user is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import open_clip
from open_clip.transform import PreprocessCfg

from qwt_fx.errors import ConfigError, ModelError

INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")
_SHOWN = 3  # tags named for each value

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


def flag(field: str) -> str:
    """The command line's flag for a field of the preprocessing."""
    return f"--image-{field}" if field in ("mean", "std") else f"--{field.replace('_', '-')}"


def words(field: str, value: Value) -> str:
    """A flag and its value, as a command line has it."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return f"{flag(field)} {shown}"


def of_tag(name: str, tag: str) -> dict[str, Value]:
    """The preprocessing that a tag of a registry model was trained with, every field but the size."""
    known = asdict(PreprocessCfg())
    known.pop("size")  # the model's own
    told = open_clip.get_pretrained_cfg(name, tag)
    return {f: _plain(told.get(f) or value) for f, value in known.items()}


def _plain(value: Value) -> Value:
    return tuple(value) if isinstance(value, list) else value


def of_file(name: str, *, openai: bool, overrides: PreprocessOverrides) -> dict[str, Value]:
    """The preprocessing of a checkpoint file for a registry model.

    Args:
        name: open_clip's name of the model.
        openai: the file is OpenAI's own archive, and so the model's tag `openai`.
        overrides: what the user says; such a field need not be known.

    Raises `ModelError` for a field that the model's tags differ in and the user does not give.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if openai:
        return of_tag(name, "openai") if "openai" in tags else {}
    told = {tag: of_tag(name, tag) for tag in tags}
    agreed: dict[str, Value] = {}
    problems: list[str] = []
    for field in next(iter(told.values()), {}):
        by_value: dict[Value, list[str]] = {}
        for tag in tags:
            by_value.setdefault(told[tag][field], []).append(tag)
        if len(by_value) == 1:
            (agreed[field],) = by_value
        elif field not in overrides.given():
            problems += [f"{words(field, value)} ({_listed(of)})" for value, of in by_value.items()]
    if problems:
        raise ModelError(
            f"{name}: its tags were trained with different preprocessing and a file names no tag; say "
            f"what yours was trained with: {', or '.join(problems)}"
        )
    return agreed


def _listed(tags: Sequence[str]) -> str:
    more = len(tags) - _SHOWN
    return ", ".join(tags[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def unusual_flags(name: str, tag: str) -> str:
    """The flags with which a file of a tag's weights is prepared as the tag; "" where none is needed."""
    told = {t: of_tag(name, t) for t in open_clip.list_pretrained_tags_by_model(name)}
    mine = of_tag(name, tag)
    differing = [f for f in mine if len({other[f] for other in told.values()}) > 1]
    return "".join(f" {words(f, mine[f])}" for f in differing)


def describe(preprocess: Mapping[str, Value]) -> str:
    """One line: size, resize mode, interpolation, mean and std."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[call-overload]
    parts = [f"{height}x{width} pixels", f"resize {preprocess['resize_mode']}"]
    parts.append(str(preprocess["interpolation"]))
    for name in ("mean", "std"):
        values = preprocess[name]
        assert isinstance(values, tuple | list)  # PreprocessCfg's
        parts.append(f"{name} {' '.join(f'{v:g}' for v in values)}")
    return ", ".join(parts)
