"""An open_clip model and its tokenizer, built from what a source names."""

from __future__ import annotations

import copy
import logging

import open_clip
from torch import nn

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.clip.model_source import ModelSource
from qwt_fx.clip.tags import quick_gelu_of_file
from qwt_fx.clip.weights import Checkpoint, load_weights
from qwt_fx.data.data import Tokenizer
from qwt_fx.errors import MissingExtraError, ModelError, first_line

_log = logging.getLogger(__name__)


def open_clip_model(source: ModelSource, checkpoint: Checkpoint | None) -> nn.Module:
    """The open_clip model of a source, float32 on the CPU; sets `quick_gelu` in its config."""
    quick_gelu = source.quick_gelu or (checkpoint is not None and checkpoint.openai)
    told = None if checkpoint is None else checkpoint.quick_gelu
    if told is not None:
        quick_gelu = source.config["quick_gelu"] = told
    elif not quick_gelu and source.untold is not None and not source.config.get("quick_gelu"):
        quick_gelu, note = quick_gelu_of_file(source.untold)
        if note is not None:
            _log.warning("%s", note)
    if quick_gelu and told is None:
        if not source.config.get("quick_gelu"):
            _log.warning(
                "%s: these weights were trained with QuickGELU; using it instead of GELU",
                source.name,
            )
        source.config["quick_gelu"] = True
    model = _build(source)
    if checkpoint is not None:
        load_weights(model, checkpoint, source.name)
    return model


def _build(source: ModelSource) -> nn.Module:
    """An open_clip model with random weights.

    open_clip's own create_model would do, but it configures the root logger, and takes a
    configuration by name only.
    """
    config = copy.deepcopy(source.config)
    text, vision = config["text_cfg"], config["vision_cfg"]
    # Whole-model weights follow: neither tower's own pretrained ones are wanted.
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    kind = open_clip.CLIP
    if config.pop("custom_text", False) or "hf_model_name" in text:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        model: nn.Module = kind(**config)
    except Exception as error:  # whatever open_clip, timm or transformers make of a bad value
        raise ModelError(
            f"{source.name}: open_clip cannot build this configuration: {first_line(error)}"
        ) from error
    return model


def tokenizer_of(config: JsonObject) -> Tokenizer:
    """The tokenizer of a source. Raises `ModelError`, or `MissingExtraError` without transformers."""
    tokenizer: Tokenizer
    if config["source"] is None:
        tokenizer = open_clip.SimpleTokenizer(
            context_length=config["context_length"], **config["kwargs"]
        )
        return tokenizer
    try:
        tokenizer = open_clip.tokenizer.HFTokenizer(
            config["source"],
            context_length=config["context_length"],
            tokenizer_mode=config["mode"],
            **config["kwargs"],
        )
    except ImportError as error:
        raise MissingExtraError(
            f"tokenizer {config['source']} needs transformers: pip install 'qwt-fx[hf]'"
        ) from error
    except Exception as error:  # the hub's client raises many kinds
        raise ModelError(f"tokenizer {config['source']}: {first_line(error)}") from error
    return tokenizer
