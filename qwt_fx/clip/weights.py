"""Reads CLIP checkpoints of every kind and loads them into open_clip models, or says why not.

Kinds, told apart by content: OpenAI's TorchScript archives, open_clip's training checkpoints
(`{"state_dict": ...}`, names often prefixed by `module.`), bare state dicts, and safetensors.
Nothing is unpickled but tensors and plain containers, and no code of an archive is run unless
`allow_torchscript` says so.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from qwt_fx.clip import torchscript
from qwt_fx.errors import ModelError, first_line

# OpenAI's archives keep these numbers among their tensors.
_ARCHIVE_ONLY = frozenset({"input_resolution", "context_length", "vocab_size"})
# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by their names in the model; `openai`: of OpenAI's archive."""

    path: Path
    state: dict[str, Tensor]
    openai: bool


def read_checkpoint(path: Path, *, allow_torchscript: bool = False) -> Checkpoint:
    """Read a checkpoint of any kind onto the CPU.

    Args:
        path: the file.
        allow_torchscript: load a TorchScript archive that cannot be read otherwise by running its
            code, as `torch.jit.load` does.

    Raises `ModelError` for a file that is missing, damaged, or not a checkpoint, and for an archive
    that needs `allow_torchscript`.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path}: {'a directory' if path.is_dir() else 'no such file'}")
    try:
        stored = _read(path, allow_torchscript)
    except torchscript.UnsafeArchive as error:
        raise ModelError(
            f"checkpoint {path}: this TorchScript archive cannot be read without running its code: "
            f"{error}; if you trust where it comes from, give --allow-torchscript"
        ) from error
    except Exception as error:  # the readers raise a dozen kinds, pickle's and zip's among them
        raise ModelError(f"checkpoint {path}: cannot be read: {first_line(error)}") from error
    state = _state_dict(stored)
    if state is None:
        raise ModelError(
            f"checkpoint {path}: holds no state dict; wanted names with tensors, or an open_clip "
            'training checkpoint with a "state_dict"'
        )
    openai = state.keys() >= _ARCHIVE_ONLY
    state = {name: tensor for name, tensor in state.items() if name not in _ARCHIVE_ONLY}
    return Checkpoint(path, _unwrapped(state), openai)


def _read(path: Path, allow_torchscript: bool) -> object:
    if torchscript.is_torchscript(path):
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
    if zipfile.is_zipfile(path):
        # Mapped, so that a training checkpoint's optimizer state is never read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if _is_safetensors(path):
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_safetensors(path: Path) -> bool:
    """By name, or by content: 8 bytes of header length, then the header's JSON object."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _state_dict(stored: object) -> dict[str, Tensor] | None:
    """The state dict in what a checkpoint holds; `None` when there is none."""
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not stored:
        return None
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in stored.items()):
        return None
    return dict(stored)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            return _unwrapped({name[len(prefix) :]: tensor for name, tensor in state.items()})
    return state


def load_weights(model: nn.Module, checkpoint: Checkpoint, model_name: str) -> None:
    """Copy a checkpoint's tensors into an open_clip model, cast to the model's dtype.

    Names of open_clip's older and related layouts are translated as open_clip does. Position
    embeddings of another size are not interpolated: that would be another model than the one asked
    for. Raises `ModelError` naming the first tensors that do not match, both shapes given.
    """
    state = _translated(model, dict(checkpoint.state))
    if mismatch := _mismatch(model.state_dict(), state):
        raise ModelError(
            f"checkpoint {checkpoint.path} does not fit the model {model_name}: {mismatch}"
        )
    model.load_state_dict(state)


def _translated(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the names and shapes this version of open_clip gives its tensors."""
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # scalars, or vectors of one
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    if "logit_bias" in wanted and "logit_bias" not in state:  # trained without SigLIP's loss
        state["logit_bias"] = torch.zeros_like(wanted["logit_bias"])
    # Constants that the model makes itself: TorchScript stores them, as old transformers did.
    constants = {name for name, _ in model.named_buffers()} - wanted.keys()
    for name in (*constants, "text.transformer.embeddings.position_ids"):
        if name not in wanted:
            state.pop(name, None)
    return state


def _mismatch(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What differs between a model's and a checkpoint's tensors, in the model's order; or ""."""
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(tensor.shape)} in "
        "the model"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    groups = (
        ("shapes differ", shapes, "; "),
        ("missing", [name for name in wanted if name not in state], ", "),
        ("unexpected", [name for name in state if name not in wanted], ", "),
    )
    return "; ".join(
        f"{len(items)} {title}: {_some(items, separator)}"
        for title, items, separator in groups
        if items
    )


def _some(items: Sequence[str], separator: str) -> str:
    return separator.join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
