"""Read the shipped demo CLIP and write its files where `qwt-fx quantize` can use them.

The weights are shipped in fp16, and only for the token rows that occur in the captions; upcast
to float32, with zeros in the other rows, they are the FP32 reference. `assets/CARD.md` says how
they were trained.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qwt_fx.demo.hard import harden
from qwt_fx.errors import ConfigError, OutputError

VARIANTS = ("plain", "hard")
HARD_SEED = 0
SHARDS = ("calib-000.tar", "calib-001.tar", "calib-002.tar", "calib-003.tar")
TEXT_FILES = ("model.json", "classnames.txt", "templates.txt")

_TOKEN_TABLE = "token_embedding.weight"
_TOKEN_ROWS = "token_rows"


def read_asset(name: str) -> bytes:
    """Return the content of one shipped file."""
    return files("qwt_fx.demo").joinpath("assets").joinpath(name).read_bytes()


def demo_config() -> dict[str, Any]:
    """Return the model's configuration in open_clip's schema."""
    config: dict[str, Any] = json.loads(read_asset("model.json"))
    return config


def demo_state_dict(variant: str = "plain") -> dict[str, Tensor]:
    """Return the float32 state dict of the demo CLIP, by open_clip's names.

    ``plain`` is the model as trained; ``hard`` computes the same features with weights that are
    much harder to quantize (see `qwt_fx.demo.hard`).
    """
    if variant not in VARIANTS:
        raise ConfigError(f"unknown demo variant {variant!r}; use one of {', '.join(VARIANTS)}.")
    return unpack_weights(read_asset("weights.safetensors"), demo_config(), variant)


def unpack_weights(packed: bytes, config: dict[str, Any], variant: str) -> dict[str, Tensor]:
    """The float32 state dict of a CLIP packed as the demo's is: fp16, occurring token rows only."""
    stored = safetensors.torch.load(packed)
    rows = stored.pop(_TOKEN_ROWS)  # (r,) int64
    state = {name: tensor.to(torch.float32) for name, tensor in stored.items()}
    table = state[_TOKEN_TABLE]  # (r, width)
    vocabulary = config["text_cfg"]["vocab_size"]
    state[_TOKEN_TABLE] = table.new_zeros(vocabulary, table.shape[1]).index_copy(0, rows, table)
    return harden(state, seed=HARD_SEED) if variant == "hard" else state


def write_files(directory: Path, variant: str = "plain") -> None:
    """Write the demo's files under ``directory``, each one whole or not at all.

    ``model.json``, ``model.safetensors``, four calibration shards ``calib-{000..003}.tar``, the
    validation images as class folders under ``val/``, ``classnames.txt`` and ``templates.txt``.
    Files of an earlier call are replaced; other files under ``val/`` are an error, since they
    would be taken for validation images.
    """
    weights = safetensors.torch.save(demo_state_dict(variant))
    with zipfile.ZipFile(io.BytesIO(read_asset("val.zip"))) as archive:
        images = {name: archive.read(name) for name in archive.namelist()}
    _refuse_strangers(directory / "val", set(images))
    try:
        for name in (*TEXT_FILES, *SHARDS):
            _write(directory / name, read_asset(name))
        for name, data in images.items():
            _write(directory / "val" / name, data)
        _write(directory / "model.safetensors", weights)
    except OSError as error:
        raise OutputError(f"cannot write the demo files to {directory}: {error}") from error


def _refuse_strangers(folder: Path, expected: set[str]) -> None:
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if strangers := sorted(present - expected):
        raise OutputError(
            f"{folder} holds {len(strangers)} files that are not the demo's, {strangers[0]} among "
            "them; choose another directory or remove them."
        )


def _write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in its own folder, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
