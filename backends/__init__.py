"""Backends: each lowers a converted graph to something that runs it."""

from __future__ import annotations

from qwt_fx.backends.base import Backend
from qwt_fx.backends.eager import Eager
from qwt_fx.errors import ConfigError

_BACKENDS: dict[str, Backend] = {"eager": Eager()}


def backend_for(name: str) -> Backend:
    """The backend with this name. Raises `ConfigError` for an unknown one."""
    if name not in _BACKENDS:
        raise ConfigError(f"backend: got {name!r}, wanted one of {', '.join(_BACKENDS)}")
    return _BACKENDS[name]
