"""Backends: each lowers a converted graph to something that runs it.

Read `base.py` first, then `lowering.py`, which they share. Nothing here calibrates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass

from torch.fx import GraphModule

from qwt_fx.backends.base import Backend
from qwt_fx.backends.cuda.cuda import Cuda
from qwt_fx.backends.eager import Eager
from qwt_fx.backends.x86.x86 import X86
from qwt_fx.errors import ConfigError, PreconditionError
from qwt_fx.measure.kernel_audit import LayerKernel

_BACKENDS: dict[str, Callable[..., Backend]] = {"eager": Eager, "x86": X86, "cuda": Cuda}
_KEY = "qwt_fx_backend"  # gm.meta of a lowered graph: the name of its backend


def backend_for(name: str, **options: object) -> Backend:
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


def lower_to(quantized: GraphModule, name: str, **options: object) -> GraphModule:
    """Lower a converted graph by the backend with this name, which the result remembers."""
    lowered = backend_for(name, **options).lower(quantized)
    lowered.meta[_KEY] = name
    return lowered


def audit_of(lowered: GraphModule) -> list[LayerKernel]:
    """What computes each layer of a graph from `lower_to`.

    Raises `PreconditionError` for another graph.
    """
    name = lowered.meta.get(_KEY)
    if not isinstance(name, str):
        raise PreconditionError("this graph was not lowered: call qwt_fx.lower(q, backend) first")
    return backend_for(name).audit(lowered)
