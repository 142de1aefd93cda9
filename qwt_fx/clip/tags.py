"""What open_clip's tags tell of a registry model's weights, for a file that names no tag.

open_clip keeps mean, std, interpolation, resize mode and QuickGELU with each tag, not with the model.
What all tags of the model agree on holds for the file too; where they differ, a wrong guess is a model
that answers and is wrong, so the user is asked (preprocessing) or told (the activation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import open_clip
from open_clip.transform import PreprocessCfg

from qwt_fx.clip.preprocessing import PreprocessOverrides, Value, words
from qwt_fx.errors import ModelError

_SHOWN = 3  # tags named for each value


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


def quick_gelu_of_file(name: str) -> tuple[bool, str | None]:
    """Whether a file of a registry model computes QuickGELU beyond its configuration; a note, or `None`.

    It does where all tags of the model do. Where they differ, the configuration holds and the note says
    which model the others are files of.
    """
    on: list[str] = []
    off: list[str] = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        (on if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu") else off).append(tag)
    if not on or not off:
        return bool(on), None
    other = f"{name}-quickgelu"
    remedy = (
        f"; if yours is one of them, use --model {other}"
        if open_clip.get_model_config(other)
        else ""
    )
    return False, (
        f"{name}: computing GELU; weights of the tags {_listed(on)} were trained with QuickGELU{remedy}"
    )
