"""Which configuration and which weights a model's name stands for; open_clip's rules, spelled out.

Nothing is added to open_clip's registry of models, and nothing is downloaded but a named tag or
`hf-hub:` repository.
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.clip.checkpoint_files import WEIGHT_FILES
from qwt_fx.clip.tags import unusual_flags
from qwt_fx.errors import ModelError, first_line

_REQUIRED = frozenset({"embed_dim", "vision_cfg", "text_cfg"})
_HUB, _LOCAL = "hf-hub:", "local-dir:"
_CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: as reports call it; OpenAI's `ViT-B/32` becomes `ViT-B-32`.
        config: open_clip's model configuration.
        preprocess: open_clip's preprocessing configuration, every field of it.
        tokenizer: arguments of the tokenizer: `source` (None for CLIP's own byte-pair encoding,
            else a hub name or a folder), `context_length`, `mode`, `kwargs`.
        weights: the checkpoint file; None for random weights.
        quick_gelu: the weights were trained with QuickGELU, whatever the configuration says.
        untold: its name in the registry, where a file of weights does not tell the preprocessing.
    """

    name: str
    config: JsonObject
    preprocess: JsonObject
    tokenizer: JsonObject
    weights: Path | None
    quick_gelu: bool = False
    untold: str | None = None


def find_source(name: str, pretrained: str | None, allow_random: bool) -> ModelSource:
    """Resolve `--model` and `--pretrained`; downloads a tag's weights.

    Raises `ModelError` for a name, tag or file that is unknown, missing, malformed or out of reach.
    """
    if name.startswith((_HUB, _LOCAL)):
        if pretrained is not None:
            raise ModelError(f"{name} brings its own weights: leave --pretrained {pretrained} out")
        return _from_hub(name) if name.startswith(_HUB) else _from_folder(name, allow_random)
    if name.endswith(".json"):
        path = Path(name)
        config, preprocess = _read_config(path)
        weights = _local_weights(path.stem, pretrained, allow_random)
        return _source(path.stem, config, preprocess, weights)
    spelled = name.replace("/", "-")
    if open_clip.get_model_config(spelled) is None:
        raise ModelError(_unknown(name))
    return _from_registry(spelled, pretrained, allow_random)


def _source(
    name: str,
    config: JsonObject,
    preprocess: JsonObject,
    weights: Path | None,
    *,
    quick_gelu: bool = False,
    tokenizer_folder: str | None = None,
    untold: str | None = None,
) -> ModelSource:
    text = config["text_cfg"]
    source = text.get("hf_tokenizer_name") or None
    tokenizer = {
        "source": tokenizer_folder if source and tokenizer_folder else source,
        "context_length": text.get("context_length") or 77,
        "mode": text.get("tokenizer_mode"),
        "kwargs": text.get("tokenizer_kwargs") or {},
    }
    merged = merge_preprocess_dict(asdict(PreprocessCfg()), preprocess)
    return ModelSource(name, config, merged, tokenizer, weights, quick_gelu, untold)


def _unknown(name: str) -> str:
    known = open_clip.list_models()
    close = difflib.get_close_matches(name.replace("/", "-"), known, n=3, cutoff=0.5)
    if Path(name).exists() or name.startswith(("/", ".", "~")) or ("/" in name and not close):
        return _no_artifact(Path(name))
    hint = f"did you mean {' or '.join(close)}?" if close else f"{len(known)} names are known"
    return (
        f"unknown model {name!r}: {hint} (wanted an open_clip name, hf-hub:..., local-dir:..., "
        "a config .json or an artifact)"
    )


def _no_artifact(path: Path) -> str:
    """What a path is that was given for a model, and how its like is given."""
    wanted = "wanted an artifact of qwt-fx, or open_clip's name of a model or its config .json"
    if not path.exists():
        return f"{path}: no such file or folder; {wanted}"
    if path.is_file():
        return f"{path}: a file; {wanted}, and weights as --pretrained {path}"
    names = {entry.name for entry in path.iterdir()}
    if _CONFIG_FILE in names:
        return f"{path}: a model folder of open_clip: give it as local-dir:{path}"
    if names & {"config.json", "adapter_config.json", *WEIGHT_FILES}:
        return f"{path}: a folder of weights; {wanted}, and this folder as --pretrained {path}"
    return f"{path}: a folder, but no artifact of qwt-fx (no artifact.json in it); {wanted}"


def _from_registry(name: str, pretrained: str | None, allow_random: bool) -> ModelSource:
    config = open_clip.get_model_config(name)
    tag = None if pretrained is None else open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        weights = _local_weights(name, pretrained, allow_random)
        return _source(name, config, {}, weights, untold=name if weights else None)
    try:
        weights = Path(open_clip.download_pretrained(tag))
    except Exception as error:  # the hub's client, urllib and the file system raise many kinds
        raise ModelError(
            f"weights {pretrained!r} of {name}: cannot be downloaded ({first_line(error)}); give "
            f"a local checkpoint as --pretrained FILE{unusual_flags(name, str(pretrained))}"
        ) from error
    return _source(name, config, tag, weights, quick_gelu=bool(tag.get("quick_gelu")))


def _local_weights(name: str, pretrained: str | None, allow_random: bool) -> Path | None:
    """A checkpoint file; None where random weights are asked for."""
    if pretrained is None:
        if allow_random:
            return None
        raise ModelError(
            f"{name}: no weights; give --pretrained TAG or FILE (without them the model would be "
            f"random{_tags_hint(name)})"
        )
    path = Path(pretrained)
    if not path.exists():
        raise ModelError(
            f"weights {pretrained!r} of {name}: no such file or folder, and no tag{_tags_hint(name)}"
        )
    return path


def _tags_hint(name: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"; tags: {', '.join(tags)}" if tags else ""


def _from_folder(name: str, allow_random: bool) -> ModelSource:
    folder = Path(name[len(_LOCAL) :])
    if (folder / "config.json").is_file() and not (folder / _CONFIG_FILE).is_file():
        raise ModelError(
            f"{name}: a folder of transformers, without open_clip's {_CONFIG_FILE}: give the model's "
            f"open_clip name as --model, and --pretrained {folder}"
        )
    config, preprocess = _read_config(folder / _CONFIG_FILE)
    files = [folder / file for file in WEIGHT_FILES if (folder / file).is_file()]
    if not files and not allow_random:
        raise ModelError(f"{name}: no weights; wanted one of {', '.join(WEIGHT_FILES)}")
    weights = files[0] if files else None
    return _source(folder.name, config, preprocess, weights, tokenizer_folder=str(folder))


def _from_hub(name: str) -> ModelSource:
    repository = name[len(_HUB) :]
    try:
        file = Path(download_pretrained_from_hf(repository, filename=_CONFIG_FILE))
        weights = Path(download_pretrained_from_hf(repository))
    except Exception as error:  # as above
        raise ModelError(f"{name}: cannot be downloaded ({first_line(error)})") from error
    config, preprocess = _read_config(file)
    return _source(name, config, preprocess, weights)


def _read_config(path: Path) -> tuple[JsonObject, JsonObject]:
    """Model and preprocessing configuration of a JSON file: open_clip's, or its hub layout."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"model config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"model config {path}: not valid JSON: {first_line(error)}") from error
    config = document.get("model_cfg", document) if isinstance(document, dict) else document
    if not isinstance(config, dict) or not config.keys() >= _REQUIRED:
        raise ModelError(
            f"model config {path}: wanted open_clip's {', '.join(sorted(_REQUIRED))}, got "
            f"{', '.join(sorted(config)) if isinstance(config, dict) else type(config).__name__}"
        )
    config = copy.deepcopy(config)
    preprocess = config.pop("preprocess_cfg", None) or document.get("preprocess_cfg") or {}
    for key, value in (*config.items(), ("preprocess_cfg", preprocess)):
        if key.endswith("_cfg") and not isinstance(value, dict):
            raise ModelError(f"model config {path}: {key}: got {value!r}, wanted an object")
    return config, preprocess
