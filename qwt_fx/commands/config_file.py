"""`--config FILE.toml`: any flag of the command, by its long name; flags on the line win."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from qwt_fx.errors import ConfigError


def config_arguments(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The file's settings as command-line words, to be put before the real ones.

    Keys are long flag names with `-` or `_` (`w-bits = 6`, `qwt = true`); `override` is a table
    glob -> "w8a8", `remedy` a table name -> value. Raises `ConfigError` naming the file and the key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: nested too deeply") from None
    except ValueError as error:  # not UTF-8, not TOML, or a zero byte in the path
        raise ConfigError(f"--config {str(path)!r}: not valid TOML: {error}") from None
    flags = {
        option.lstrip("-").replace("_", "-"): (option, action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    words: list[str] = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in flags or name in ("config", "help", "version"):
            raise ConfigError(f"--config {path}: unknown key {key!r}; known: {sorted(flags)}")
        words += _words(path, key, value, *flags[name])
    return words


def plain_text(value: object) -> str:
    """A setting as a flag's value."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(path: Path, key: str, value: object, option: str, action: argparse.Action) -> list[str]:
    if key in ("override", "remedy"):
        if not isinstance(value, dict):
            wanted = "glob -> 'w8a8'" if key == "override" else "name -> value"
            raise ConfigError(f"--config {path}: {key}: wanted a table {wanted}")
        return [
            word
            for name, entry in value.items()
            for word in (option, f"{name}={plain_text(entry)}")
        ]
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ConfigError(f"--config {path}: {key}: got {value!r}, wanted true or false")
        return [option] if value else []
    if isinstance(action.nargs, int) and isinstance(value, list):
        return [option, *map(str, value)]  # argparse says how many of which kind it wants
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"--config {path}: {key}: got {value!r}, wanted a string or a number")
    return [f"{option}={value}"]
