"""What the files of a checkpoint hold, as plain containers and tensors: one file, shards, a folder.

No class but those of tensors is looked up, and no code of a file is run: what a training script pickled
beside its tensors (arguments, configurations, numpy's numbers, whole modules) is read as an `Inert`.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from qwt_fx.clip import torchscript
from qwt_fx.errors import ModelError

INDEX_SUFFIX = ".index.json"
# In this order where a folder holds several.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# By how a file begins: what it is, and what to do.
_STRANGERS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: run git lfs pull"),
    (b"<!doctype", "a web page, not a checkpoint: download the file itself"),
    (b"<html", "a web page, not a checkpoint: download the file itself"),
    (b"<?xml", "an XML answer of a server, not a checkpoint: download the file itself"),
    (b"gguf", "a GGUF file, wanted one of PyTorch or safetensors"),
    (b"\x89hdf", "an HDF5 file of Keras, wanted one of PyTorch or safetensors"),
)
_LEGACY_PICKLES = 4  # magic number, protocol, system, and the object
_WEIGHTS_ERROR = re.compile(r"WeightsUnpickler error: *(.*)")
_COMMANDS = ("os", "posix", "nt", "sys", "subprocess")


class Inert:
    """Stands for an object of a class that is not looked up. `name`: of the class."""

    name = ""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        """Whatever it was made of is let go."""
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        """See `__new__`."""

    def __setstate__(self, state: object) -> None:
        """See `__new__`."""


class InertMapping(Inert):
    """Stands for an object that is filled like a dict, such as a configuration."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        """An empty dict, which torch lets a file fill."""
        return OrderedDict()


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint that is given as a file, as the index of its shards, or as their folder.

    Raises `ModelError` for a path that is missing or names no checkpoint, and says what it is instead.
    """
    if path.is_dir():
        return files_of(_in_folder(path))
    if not path.is_file():
        raise ModelError(f"checkpoint {path}: no such file")
    return _shards(path) if path.suffix == ".json" else [path]


def _in_folder(folder: Path) -> Path:
    """The file of weights in a folder."""
    names = {entry.name for entry in folder.iterdir()}
    if "adapter_config.json" in names:
        raise ModelError(
            f"checkpoint {folder}: an adapter of PEFT, not a model: "
            "PeftModel.from_pretrained(model, folder).merge_and_unload(), then save its state_dict()"
        )
    for name in WEIGHT_FILES:
        if name in names:
            return folder / name
    if ".metadata" in names:
        raise ModelError(
            f"checkpoint {folder}: shards of torch.distributed.checkpoint (FSDP): make one file of them "
            "with torch.distributed.checkpoint.format_utils.dcp_to_torch_save(FOLDER, FILE)"
        )
    if "zero_to_fp32.py" in names or any(n.endswith("_optim_states.pt") for n in names):
        raise ModelError(
            f"checkpoint {folder}: shards of DeepSpeed: make one file of them with its "
            "zero_to_fp32.py FOLDER FILE"
        )
    alike = sorted(
        n for n in names if n.endswith((*_SUFFIXES, *(s + INDEX_SUFFIX for s in _SUFFIXES)))
    )
    if len(alike) == 1:
        return folder / alike[0]
    found = f"several files ({', '.join(alike)}): name one of them" if alike else "no weights in it"
    wanted = "" if alike else f"; wanted one of {', '.join(WEIGHT_FILES)}"
    raise ModelError(f"checkpoint {folder}: a folder with {found}{wanted}")


def _shards(index: Path) -> list[Path]:
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(document["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f'checkpoint {index}: a JSON file without a "weight_map", wanted the index of shards '
            f"(*{INDEX_SUFFIX}), or the weights themselves"
        ) from None
    files = [index.parent / str(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"checkpoint {index}: {len(missing)} of its {len(files)} shards are not beside it: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        )
    return files


def read_file(path: Path, *, allow_torchscript: bool) -> object:
    """What one file holds, tensors on the CPU; raises whatever its reader does where it is damaged."""
    with path.open("rb") as file:
        start = file.read(64)
    for magic, what in _STRANGERS:
        if start.lower().startswith(magic):
            raise ModelError(f"checkpoint {path}: {what}")
    if torchscript.is_torchscript(path):
        return _torchscript(path, allow_torchscript)
    # By name, or by content: 8 bytes of header length, then the header's JSON object.
    if path.suffix == ".safetensors" or (not zipfile.is_zipfile(path) and start[8:9] == b"{"):
        return safetensors.torch.load_file(path)
    return _pickled(path)


def _torchscript(path: Path, allow_torchscript: bool) -> object:
    try:
        return torchscript.read_state_dict(path)
    except torchscript.UnsafeArchive:
        if not allow_torchscript:
            raise
    with warnings.catch_warnings():
        # torch.jit is deprecated, but such files are what they are.
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return dict(scripted.state_dict())


def _pickled(path: Path) -> object:
    """A file of `torch.save`; every class that torch does not know is an `Inert`."""
    names = sorted(set(_classes(path)))
    if risky := [name for name in names if name.partition(".")[0] in _COMMANDS]:
        raise ModelError(
            f"checkpoint {path}: its pickle names {risky[0]}, which could run commands: nothing of it "
            "was loaded; do not use this file unless you know why"
        )
    # Mapped, so that a training checkpoint's optimizer state is never read.
    mapped = zipfile.is_zipfile(path)
    reason = ""
    for kind in (Inert, InertMapping):
        stand_ins: list[Any] = [(type("Inert", (kind,), {"name": name}), name) for name in names]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            found = _WEIGHTS_ERROR.search(str(error))
            reason = found[1] if found else str(error).strip().splitlines()[0]
    raise pickle.UnpicklingError(reason)


def _classes(path: Path) -> Iterator[str]:
    """The names that a file of `torch.save` asks for, as torch spells them; none of a damaged file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
                yield from _named(io.BytesIO(archive.read(name)))
            return
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                yield from _named(file)
    except (ValueError, StopIteration, EOFError, KeyError, zipfile.BadZipFile):
        return  # torch's own reader says what is wrong


def _named(pickled: BinaryIO) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
            yield f"{module}.{name}"
