"""Backends: each lowers a converted graph to something that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from qwt_fx.backends.base import Backend
from qwt_fx.backends.cuda import Cuda
from qwt_fx.backends.eager import Eager
from qwt_fx.errors import ConfigError

_BACKENDS: dict[str, Callable[..., Backend]] = {"eager": Eager, "cuda": Cuda}


def backend_for(name: str, **options: Any) -> Backend:
    """The backend with this name, its options being fields of its class.

    Raises `ConfigError` for an unknown name, option or value.
    """
    if name not in _BACKENDS:
        raise ConfigError(f"backend: got {name!r}, wanted one of {', '.join(_BACKENDS)}")
    backend = _BACKENDS[name]
    known: list[str] = [f.name for f in fields(backend)] if is_dataclass(backend) else []
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(
            f"backend {name!r}: got option {unknown[0]!r}, wanted {', '.join(known) or 'none'}"
        )
    return backend(**options)
