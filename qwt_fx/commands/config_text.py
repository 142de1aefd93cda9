"""A configuration as the TOML file that `--config` takes, with comments for whoever edits it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qwt_fx.config.config import AUTO, FIELDS, REMEDIES, QuantConfig


def config_text(
    config: QuantConfig,
    towers: str,
    *,
    head: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
) -> str:
    """The file's text.

    towers: what `--towers` takes. head: comment lines at the top. notes: a comment for an override,
    by its glob.
    """
    lines = [f"# {line}".rstrip() for line in head]
    lines += ["", f"towers = {_value(towers)}"]
    for key in FIELDS:
        lines.append(f"{key.replace('_', '-')} = {_value(getattr(config, key))}")
    named = {n: getattr(config, n) for n in (*REMEDIES, "token_masks")}
    chosen = {name: value for name, value in named.items() if value != AUTO}
    if chosen:
        lines += ["", "[remedy]"]
        lines += [f"{name} = {_value(value)}" for name, value in chosen.items()]
    if config.overrides:
        lines += ["", "[override]"]
        for glob, bits in config.overrides.items():
            note = (notes or {}).get(glob)
            lines.append(f"{_value(glob)} = {_value(bits)}" + (f"  # {note}" if note else ""))
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    """A TOML value: its strings, numbers and booleans are written as JSON's are."""
    return json.dumps(value, ensure_ascii=False)
