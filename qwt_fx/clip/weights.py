"""Checkpoints of every kind, loaded into open_clip models, or why not.

A file may hold several state dicts (the model, its moving average, a teacher), under keys of its own and
names with prefixes of its own. What is loaded is what fits the model; where that is not one thing, the
user is told.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from qwt_fx.clip import hugging_face, torchscript
from qwt_fx.clip.checkpoint_files import Inert, files_of, read_file
from qwt_fx.errors import ModelError, first_line

log = logging.getLogger(__name__)

State = dict[str, Tensor]

# OpenAI's archives keep these numbers among their tensors.
_ARCHIVE_ONLY = frozenset({"input_resolution", "context_length", "vocab_size"})
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|averaged?)($|[^a-z])", re.IGNORECASE)
_MAX_DEPTH = 3  # of state dicts in containers
# Names that only these have: the weights lie in other tensors than the model's.
_STRANGERS = (
    (
        r"\.(lora_[A-Z]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|ia3_l|"
        r"hada_w|lokr_w|oft_[rR]|vera_lambda)",
        "adapters of PEFT (LoRA) beside or without the weights they change: merge them, "
        "model = model.merge_and_unload(), then torch.save(model.state_dict(), FILE)",
    ),
    (
        r"(^|\.)parametrizations\.",
        "parametrized weights: torch.nn.utils.parametrize.remove_parametrizations, then save again",
    ),
    (
        r"\.(SCB|absmax|quant_map|quant_state\..*|qweight|qzeros)$",
        "weights that are quantized already (bitsandbytes, GPTQ or AWQ): give those in floating point",
    ),
)
_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: the file, index or folder.
        states: each state dict by the keys that lead to it; "" for the file's own.
        openai: of OpenAI's archive.
        quick_gelu: what transformers' `config.json` beside it says; `None` where there is none.
        preprocess: what transformers' `preprocessor_config.json` beside it says, by open_clip's names.
    """

    path: Path
    states: tuple[tuple[str, State], ...]
    openai: bool = False
    quick_gelu: bool | None = None
    preprocess: Mapping[str, object] = field(default_factory=dict)


def read_checkpoint(path: Path, *, allow_torchscript: bool = False) -> Checkpoint:
    """Read a checkpoint of any kind onto the CPU.

    Args:
        path: a file, the index of shards, or the folder of one of them.
        allow_torchscript: load a TorchScript archive that cannot be read otherwise by running its
            code, as `torch.jit.load` does.

    Raises `ModelError` for a file that is missing, damaged, or not a checkpoint, and for an archive
    that needs `allow_torchscript`.
    """
    files = files_of(path)
    stored = [_read(file, allow_torchscript) for file in files]
    states = list(_states(stored[0]))
    if len(files) > 1:  # shards of one state dict
        states = [("", {k: v for part in stored for _, s in _states(part) for k, v in s.items()})]
    if not states:
        raise ModelError(f"checkpoint {path}: {_nothing_in(stored[0])}")
    for _, state in states:
        for pattern, advice in _STRANGERS:
            if name := next((n for n in state if re.search(pattern, n)), None):
                raise ModelError(f"checkpoint {path}: its tensor {name} is of {advice}")
    openai = any(state.keys() >= _ARCHIVE_ONLY for _, state in states)
    kept = tuple(
        (label, {n: t for n, t in state.items() if n not in _ARCHIVE_ONLY})
        for label, state in states
    )
    if not any("vision_model" in name for _, state in kept for name in state):
        return Checkpoint(path, kept, openai)
    folder = files[0].parent
    return Checkpoint(
        path,
        kept,
        openai,
        hugging_face.quick_gelu_of(folder),
        hugging_face.preprocessing_of(folder),
    )


def _read(path: Path, allow_torchscript: bool) -> object:
    try:
        return read_file(path, allow_torchscript=allow_torchscript)
    except ModelError:
        raise
    except torchscript.UnsafeArchive as error:
        raise ModelError(
            f"checkpoint {path}: this TorchScript archive cannot be read without running its code: "
            f"{error}; if you trust where it comes from, give --allow-torchscript"
        ) from error
    except Exception as error:  # the readers raise a dozen kinds, pickle's and zip's among them
        raise ModelError(f"checkpoint {path}: cannot be read: {first_line(error)}") from error


def _states(stored: object, label: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Every dict of names and tensors in a checkpoint, the outer ones first."""
    if not isinstance(stored, dict):
        return
    own = {k: v for k, v in stored.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if own:
        yield label, own
    if depth < _MAX_DEPTH:
        for key, value in stored.items():
            yield from _states(value, f"{label}.{key}" if label else str(key), depth + 1)


def _nothing_in(stored: object) -> str:
    entries = stored if isinstance(stored, dict) else {"": stored}
    for key, value in entries.items():
        if isinstance(value, Inert):
            where = f" ({key})" if key else ""
            return (
                f"holds a pickled {value.name}{where}, which only its code could read; "
                "save its weights instead: torch.save(model.state_dict(), FILE)"
            )
    got = type(stored).__name__
    if isinstance(stored, dict):
        got = f"the keys {_some(list(map(str, stored)), ', ')}" if stored else "nothing"
    return (
        "holds no state dict; wanted names with tensors, or an open_clip training checkpoint with a "
        f'"state_dict", got {got}'
    )


def load_weights(model: nn.Module, checkpoint: Checkpoint, model_name: str) -> None:
    """Copy a checkpoint's tensors into an open_clip model, cast to the model's dtype.

    Of several state dicts that fit, the one that is no moving average, said aloud. Names of open_clip's
    older and related layouts are translated as open_clip does, those of transformers too. Position
    embeddings of another size are not interpolated: that would be another model than the one asked
    for. Raises `ModelError` naming the first tensors that do not match, both shapes given, and for
    several state dicts that fit equally.
    """
    wanted = model.state_dict()
    tried = []
    for label, state in _views(checkpoint, len(wanted) // 2):
        try:
            translated = _translated(model, state)
        except (KeyError, RuntimeError):  # a layout that only looked like a known one
            translated = state
        tried.append((_problems(wanted, translated), label, translated))
    fitting = [(label, state) for problems, label, state in tried if not any(problems)]
    if not fitting:
        problems, label, _ = min(tried, key=lambda one: sum(map(len, one[0])))
        raise ModelError(
            f"checkpoint {checkpoint.path}{f' ({label})' * bool(label)} does not fit the model "
            f"{model_name}: {_told(problems)}"
        )
    model.load_state_dict(_the_one(checkpoint, fitting))


def _views(checkpoint: Checkpoint, least: int) -> list[tuple[str, State]]:
    """The state dicts that may be the model's: whole, and what lies under one prefix of their names."""
    sizeable = [(label, state) for label, state in checkpoint.states if len(state) >= least]
    largest = max(checkpoint.states, key=lambda one: len(one[1]))
    return [
        view
        for label, state in sizeable or [largest]
        for view in _prefixed(label, "", state, least)
    ]


def _prefixed(label: str, prefix: str, state: State, least: int) -> Iterator[tuple[str, State]]:
    """A state dict, and what lies under each prefix of its names, the prefix taken off."""
    yield ", ".join(filter(None, (label, f"{prefix}*" if prefix else ""))), state
    for part in dict.fromkeys(name.partition(".")[0] + "." for name in state):
        under = {n.removeprefix(part): t for n, t in state.items() if n.startswith(part)}
        if len(under) >= max(least, 2):
            yield from _prefixed(label, prefix + part, under, least)


def _the_one(checkpoint: Checkpoint, fitting: Sequence[tuple[str, State]]) -> State:
    """The state dict to load of those that fit."""
    different = [
        one for at, one in enumerate(fitting) if not any(_same(one[1], b[1]) for b in fitting[:at])
    ]
    plain = [one for one in different if not _AVERAGED.search(one[0])]
    others = [label for label, _ in different if _AVERAGED.search(label)]
    if len(different) == 1:
        return different[0][1]
    if len(plain) == 1:
        log.warning(
            "%s: taking %s; it holds %s as well: save that alone to use it instead",
            checkpoint.path, plain[0][0] or "the state dict itself", " and ".join(others),
        )  # fmt: skip
        return plain[0][1]
    labels = ", ".join(label or "the file's own" for label, _ in different)
    raise ModelError(
        f"checkpoint {checkpoint.path}: {len(different)} different state dicts in it fit the model: "
        f"{labels}; save the one you want alone, with torch.save"
    )


def _same(a: State, b: State) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def _translated(model: nn.Module, state: State) -> State:
    """`state` with the names and shapes this version of open_clip gives its tensors."""
    state = hugging_face.to_open_clip(state) if hugging_face.is_hugging_face(state) else dict(state)
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


Problems = tuple[list[str], list[str], list[str]]
"""Shapes that differ, names missing, names unexpected, in the model's order."""


def _problems(wanted: State, state: State) -> Problems:
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(tensor.shape)} in "
        "the model"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = [name for name in wanted if name not in state]
    return shapes, missing, [name for name in state if name not in wanted]


def _told(problems: Problems) -> str:
    titles = (("shapes differ", "; "), ("missing", ", "), ("unexpected", ", "))
    return "; ".join(
        f"{len(items)} {title}: {_some(items, separator)}"
        for items, (title, separator) in zip(problems, titles, strict=True)
        if items
    )


def _some(items: Sequence[str], separator: str) -> str:
    return separator.join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
