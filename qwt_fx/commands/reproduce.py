"""The command that makes a model again, from the settings that its report holds."""

from __future__ import annotations

import shlex

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.commands.config_file import plain_text

# Of the settings: what no flag says.
_NOT_FLAGS = frozenset({"qwt_fx", "torch", "data", "artifact", "html", "no_stages", "graph_order"})


def command_line(settings: JsonObject | None, output: str = "DIR") -> str | None:
    """`qwt-fx quantize ...` with a flag a line; `None` without settings.

    settings: the `run.settings` of report.json: flags by their long names, unset ones `None` or false.
    """
    if settings is None:
        return None
    words = ["qwt-fx quantize"]
    for name, value in settings.items():
        if name not in _NOT_FLAGS:
            words += _words(f"--{name.replace('_', '-')}", value)
    words.append(f"--output {output}")
    return " \\\n    ".join(words)


def _words(flag: str, value: object) -> list[str]:
    if value is None or value is False or value == []:
        return []
    if value is True:
        return [flag]
    if isinstance(value, list) and all(isinstance(v, float) for v in value):
        return [f"{flag} {' '.join(map(plain_text, value))}"]
    if isinstance(value, list):  # pairs: GLOB=w8a8, NAME=VALUE
        return [f"{flag} {shlex.quote(f'{key}={plain_text(entry)}')}" for key, entry in value]
    return [f"{flag} {shlex.quote(plain_text(value))}"]
