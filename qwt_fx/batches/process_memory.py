"""Gives memory that was freed back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function; `None` under another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


def release_freed() -> None:
    """Give freed memory between blocks still in use back to the system, where glibc can.

    Activations of a few megabytes lie in the heap, which shrinks from its end alone: half a gigabyte of
    freed ones stayed in the process while a wide layer was fitted.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
