"""What a figure was measured on: the processor, its integer instructions, memory of this process."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

# Instructions that decide how fast integers and half precision are.
_INSTRUCTIONS = ("avx2", "avx512", "avx_vnni", "amx", "asimddp", "i8mm", "bf16")


def processor() -> dict[str, object]:
    """{"name": str, "flags": [str, ...]}; the flags that matter for integers, [] where unknown."""
    name, flags = platform.processor() or platform.machine(), []
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = sorted(f for f in value.split() if f.startswith(_INSTRUCTIONS))
    return {"name": name, "flags": flags}


def sums_byte_products_exactly() -> bool:
    """Whether uint8 x int8 products add up in 32 bits here: VNNI, AMX, or no x86 processor.

    Other x86 processors add them in pairs as int16, which 8-bit weights overflow.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True
    flags = processor()["flags"]
    assert isinstance(flags, list)  # see `processor`
    return any("vnni" in flag or flag == "amx_int8" for flag in flags)


def memory_of(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident size rose, at its peak, above its level before the call.

    `None` where the system keeps no peak that can be reset (Linux does). Freed memory is given back
    first, so that what a former call left is not reused unseen.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)
