"""Activations of many batches: in memory within a budget, beyond it in files.

Batches are visited in turn, over and over. What came first stays in memory and what finds no room goes
to the disk: for such turns a fixed set in memory saves more reading than the most recently used one.

A value comes back with the same bits, strides and alignment, since kernels choose by these: results do
not depend on the budget.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwt_fx.errors import ConfigError, OutputError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_ALIGNED = 64  # bytes: what torch aligns memory to


def parse_size(value: str | int) -> int:
    """Bytes of `2GB`, `500 MB`, `1.5GiB` or a plain number; k = 1000, Ki = 1024.

    Raises `ConfigError` for anything else and for less than one byte.
    """
    match = _SIZE.fullmatch(str(value).strip())
    if match is not None:
        number, prefix, binary = match.groups()
        power = 0 if prefix is None else "KMGT".index(prefix.upper()) + 1
        size = int(float(number) * (1024 if binary else 1000) ** power)
        if size >= 1:
            return size
    raise ConfigError(f"memory budget: got {value!r}, wanted a size such as 2GB, 500MB or 1.5GiB")


class Kept:
    """A value in a store. `load` it as often as needed, then `drop` it."""

    def __init__(self, load: Callable[[], Any], drop: Callable[[], None]) -> None:
        self.load = load
        self.drop = drop


class ValueStore:
    """Keeps tensors, and tuples and lists of tensors; anything else costs nothing and stays in memory.

    Args:
        budget: bytes of tensors in memory, a number or a text like "2GB"; `None`: all of them.
        folder: of the files, made when needed and removed at the end of a `with` block; by default
            a temporary one.

    Attributes:
        held: bytes in memory, memory that several values share counted once.
        peak: the most there have been.
        spilled: bytes in files.
    """

    def __init__(self, budget: str | int | None = None, folder: Path | None = None) -> None:
        self.budget = None if budget is None else parse_size(budget)
        self.held = self.peak = self.spilled = 0
        self._folder = folder
        self._made: Path | None = None
        self._files = 0
        self._shared: Counter[tuple[str, int]] = Counter()  # how many values read this memory

    def keep(self, value: Any, *, in_memory: bool = True) -> Kept:
        """Keep a value; `in_memory=False`: on the disk if there is a budget at all."""
        if isinstance(value, Tensor):
            return self._keep_tensor(value, in_memory)
        if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            return self._keep_parts(value, in_memory)
        return Kept(lambda: value, lambda: None)

    def _keep_parts(self, value: tuple[Any, ...] | list[Any], in_memory: bool) -> Kept:
        parts = [self.keep(part, in_memory=in_memory) for part in value]
        kind = type(value)

        def drop() -> None:
            for part in parts:
                part.drop()

        return Kept(lambda: kind(part.load() for part in parts), drop)

    def _keep_tensor(self, value: Tensor, in_memory: bool) -> Kept:
        memory = (str(value.device), value.untyped_storage().data_ptr())
        size = 0 if memory in self._shared else value.untyped_storage().nbytes()
        room = self.budget is None or (in_memory and self.held + size <= self.budget)
        if not room and value.numel():
            return self._spill(value)
        self._shared[memory] += 1
        self.held += size
        self.peak = max(self.peak, self.held)
        size = value.untyped_storage().nbytes()

        def drop() -> None:
            self._shared[memory] -= 1
            if not self._shared[memory]:
                del self._shared[memory]
                self.held -= size

        return Kept(lambda: value, drop)

    def _spill(self, value: Tensor) -> Kept:
        """Write the memory a tensor spans; read it back at the same offset from aligned memory."""
        shape, stride, dtype, device = value.shape, value.stride(), value.dtype, value.device
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        data = value.detach().as_strided((span,), (1,)).cpu().view(torch.uint8).numpy()
        offset = value.data_ptr() % _ALIGNED if device.type == "cpu" else 0
        offset -= offset % value.element_size()
        path = self._next_path()
        try:
            with path.open("wb") as file:
                file.write(data.data)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
        self.spilled += len(data)
        size = len(data)

        last: list[weakref.ref[Tensor]] = []  # a reader of one batch often asks again

        def load() -> Tensor:
            if last and (alive := last[0]()) is not None:
                return alive
            memory = torch.empty(offset + size, dtype=torch.uint8)
            with path.open("rb") as file:
                if file.readinto(memory.numpy().data[offset:]) != size:
                    raise OutputError(f"{path}: another process cut it off")
            flat = memory[offset:].view(dtype)
            placed = flat if device.type == "cpu" else flat.to(device)
            loaded = placed.as_strided(shape, stride, placed.storage_offset())
            last[:] = [weakref.ref(loaded)]
            return loaded

        def drop() -> None:
            path.unlink(missing_ok=True)
            self.spilled -= size

        return Kept(load, drop)

    def _next_path(self) -> Path:
        if self._made is None:
            if self._folder is None:
                self._made = Path(tempfile.mkdtemp(prefix="qwt-fx-activations-"))
            else:
                shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
                os.makedirs(self._folder)
                self._made = self._folder
        self._files += 1
        return self._made / f"{self._files:08d}"

    def close(self) -> None:
        """Remove the files: nothing that was kept can be loaded any more."""
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            self._made = None

    def __enter__(self) -> ValueStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def value_store(budget: str | int | ValueStore | None) -> Iterator[ValueStore]:
    """The store that `qwt_fx.calibrate` was given, or one of its own with that budget."""
    if isinstance(budget, ValueStore):
        yield budget
        return
    with ValueStore(budget) as store:
        yield store
