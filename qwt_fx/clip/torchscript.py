"""The tensors of a TorchScript archive, such as OpenAI's, read without running any of its code.

An archive is a zip: `data.pkl` pickles the tree of modules, `data/N` hold the tensors' bytes, `code/`
the modules' sources, which `torch.jit.load` compiles and whose `__setstate__` it runs. Here the
pickle is read with a closed list of opcodes and of names, each standing for a function of this module,
and of the sources only the lists of parameters and buffers are looked at, as text.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Everything TorchScript's own writer uses, and nothing that looks up extensions or builds strangers.
_OPCODES = frozenset(
    """PROTO STOP MARK GLOBAL NEWOBJ REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS NONE
    NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE""".split()
)
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MAX_PICKLE = 64 << 20
_MAX_DEPTH = 100


class UnsafeArchive(ValueError):
    """The archive holds something that only running its code could rebuild."""


class _Module:
    """A module of the archive: its class's qualified name and its attributes."""

    qualified_name = ""

    def __setstate__(self, state: object) -> None:
        self.attributes = state


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip that holds TorchScript."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the archive's module by their names, on the CPU.

    Raises `UnsafeArchive` for an archive that cannot be read in this way; `zipfile.BadZipFile`,
    `KeyError` and others for damaged files.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(
            name.removesuffix("constants.pkl")
            for name in archive.namelist()
            if name.endswith("/constants.pkl")
        )
        order = root + "byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise UnsafeArchive("its tensors are stored in the other byte order")
        if archive.getinfo(root + "data.pkl").file_size > _MAX_PICKLE:
            raise UnsafeArchive(f"its data.pkl is larger than {_MAX_PICKLE} bytes")
        data = archive.read(root + "data.pkl")
        _check_opcodes(data)
        module = _Unpickler(data, archive, root).load()
        if not isinstance(module, _Module):
            raise UnsafeArchive(f"it holds a {type(module).__name__}, wanted a module")
        return dict(_tensors(module, "", archive, root, 0))


def _check_opcodes(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise UnsafeArchive(f"its pickle uses {opcode.name}, which TorchScript does not write")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(data):
            raise UnsafeArchive("its pickle's memo is out of range")


class _Unpickler(pickle.Unpickler):
    """Knows module classes, tensors and the few containers that TorchScript writes."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(data))
        self._archive, self._root = archive, root
        # Made anew for each archive: a pickle may set attributes of whatever it is given.
        self._known: dict[tuple[str, str], Callable[..., object]] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _tensor(*args),
            ("collections", "OrderedDict"): dict,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        for kind in ("int", "double", "bool", "tensor"):
            self._known["torch.jit._pickle", f"build_{kind}list"] = lambda values: list(values)

    def find_class(self, module: str, name: str, /) -> object:
        """The stand-in for a name; raises `UnsafeArchive` for one that is not listed."""
        if module.startswith("__torch__"):
            return type("_Named", (_Module,), {"qualified_name": f"{module}.{name}"})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in self._known:
            raise UnsafeArchive(f"its pickle names {module}.{name}")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The one-dimensional tensor of a storage, ("storage", dtype, key, location, elements)."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not re.fullmatch(r"\d+", key):
            raise UnsafeArchive(f"its pickle refers to {kind!r}, wanted a storage")
        info = self._archive.getinfo(f"{self._root}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != count * dtype.itemsize:
            raise UnsafeArchive(f"storage {key} is compressed, or not of {count} elements")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self._archive.read(info)), dtype=dtype)


def _tensor(
    storage: object, offset: int, size: Sequence[int], stride: Sequence[int], *_: object
) -> Tensor:
    """A tensor over a storage; raises where it would leave the storage."""
    if not isinstance(storage, Tensor):
        raise UnsafeArchive("a tensor without a storage")
    return torch.as_strided(storage, size, stride, offset)


def _tensors(
    module: _Module, prefix: str, archive: zipfile.ZipFile, root: str, depth: int
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module and those inside it, (name, tensor)."""
    attributes = getattr(module, "attributes", None)
    if not isinstance(attributes, dict) or depth > _MAX_DEPTH:
        raise UnsafeArchive(
            f"{module.qualified_name} rebuilds itself by code (it has a __setstate__ of its own)"
        )
    declared = _declared(module.qualified_name, archive, root)
    for name, value in attributes.items():
        if isinstance(value, Tensor) and name in declared:
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.", archive, root, depth + 1)


def _declared(qualified_name: str, archive: zipfile.ZipFile, root: str) -> set[str]:
    """Names of the parameters and buffers that a class of the archive declares."""
    module, _, name = qualified_name.rpartition(".")
    source = archive.read(f"{root}code/{module.replace('.', '/')}.py").decode()
    body = re.split(rf"^class {re.escape(name)}\(", source, maxsplit=1, flags=re.MULTILINE)[-1]
    names: set[str] = set()
    for kind in ("parameters", "buffers"):
        if match := re.search(rf"^  __{kind}__ = \[(.*?)\]", body, flags=re.MULTILINE | re.DOTALL):
            names.update(re.findall(r'"([^"]+)"', match[1]))
    return names
