"""open_clip models and qwt-fx artifacts as two towers, a transform and a tokenizer."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torchvision.transforms import Compose

from qwt_fx.artifact.artifact import Artifact, read_artifact
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.clip.model_source import find_source
from qwt_fx.clip.open_clip_model import open_clip_model, tokenizer_of
from qwt_fx.clip.preprocessing import PreprocessOverrides, words
from qwt_fx.clip.tags import of_file
from qwt_fx.clip.towers import ClipEncoder, ImageTower, TextTower
from qwt_fx.clip.weights import read_checkpoint
from qwt_fx.data.data import Tokenizer
from qwt_fx.data.decoding import Transform, to_rgb
from qwt_fx.errors import ArtifactError, ConfigError, ModelError, first_line
from qwt_fx.graph.conditions import plain_conditions

TOWERS = ("image", "text")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ClipModel:
    """A CLIP as qwt-fx uses it: from open_clip, or from an artifact.

    Attributes:
        name: the model's name, as reports call it.
        pretrained: the tag or file of the weights; None for random ones.
        image: images (n, 3, h, w) float32 -> embeddings (n, e), not normalized.
        text: token ids (n, context) int64 -> embeddings (n, e), not normalized.
        logit_scale: the factor of cosine similarities (100 for OpenAI's models).
        model_config: open_clip's model configuration.
        preprocess: open_clip's preprocessing configuration.
        tokenizer_config: see `qwt_fx.clip.model_source.ModelSource`.
        device: where the towers are.
    """

    name: str
    pretrained: str | None
    image: nn.Module
    text: nn.Module
    logit_scale: float
    model_config: JsonObject
    preprocess: JsonObject
    tokenizer_config: JsonObject
    device: str = "cpu"

    @property
    def towers(self) -> dict[str, nn.Module]:
        """Both towers by name."""
        return {"image": self.image, "text": self.text}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image tower's input."""
        size = self.preprocess["size"]
        return (size, size) if isinstance(size, int) else (size[0], size[-1])

    @property
    def context_length(self) -> int:
        """Tokens of a text, padding included."""
        length: int = self.tokenizer_config["context_length"]
        return length

    @cached_property
    def transform(self) -> Transform:
        """Evaluation preprocessing: a PIL image of any mode to float32 (3, h, w).

        Converted to RGB first (`data.decoding.to_rgb`): open_clip would resize alpha and palettes, and
        make 16 bits white. EXIF rotation is ignored, as open_clip does.
        """
        steps = image_transform_v2(PreprocessCfg(**self.preprocess), is_train=False)
        transform: Transform = Compose([to_rgb, *steps.transforms])
        return transform

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """A list of n texts to token ids (n, context) int64.

        Made on first use: some models' tokenizers come from the Hugging Face hub. Raises
        `ModelError` when it cannot be had.
        """
        return tokenizer_of(self.tokenizer_config)

    def example(self, tower: str, batch: int = 1) -> Tensor:
        """What a tower reads, for capture; see `image_example` and `text_example`."""
        return self.image_example(batch) if tower == "image" else self.text_example(batch)

    def image_example(self, batch: int = 1) -> Tensor:
        """Seeded noise (batch, 3, h, w) float32 on the model's device, for capture."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, *self.image_size, generator=generator).to(self.device)

    def text_example(self, batch: int = 1) -> Tensor:
        """Token ids (batch, context) int64 on the model's device, for capture; no tokenizer needed.

        Row i rises from 1 to its end of text, the largest id of the row as in CLIP's vocabulary,
        and is padded with 0.
        """
        vocabulary = self.model_config["text_cfg"].get("vocab_size", 49408)
        longest = min(self.context_length, vocabulary - 1)
        lengths = torch.tensor([max(longest // 2, longest - i) for i in range(batch)])
        ids = torch.arange(1, self.context_length + 1).repeat(batch, 1)
        return ids.masked_fill(ids > lengths[:, None], 0).to(self.device)


@plain_conditions()
def load(
    name: str | PathLike[str],
    pretrained: str | PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    allow_random: bool = False,
    allow_torchscript: bool = False,
    preprocess: PreprocessOverrides | None = None,
) -> ClipModel:
    """Load a CLIP in evaluation mode.

    Args:
        name: an open_clip name (OpenAI's spelling `ViT-B/32` works), `hf-hub:ORG/REPO`,
            `local-dir:DIR`, the path of an open_clip model configuration (`.json`), or an artifact
            directory.
        pretrained: an open_clip tag, or a checkpoint: OpenAI's TorchScript archive, a training
            checkpoint or bare state dict of open_clip or transformers, safetensors, the index of
            its shards, or a folder with one of these. Weights of OpenAI run with QuickGELU,
            whatever the configuration says.
        device: where to put the towers.
        precision: "fp32", "bf16" or "fp16": what the towers compute in. Inputs and outputs are
            float32 all the same. An artifact keeps its own.
        allow_random: accept random weights where `pretrained` is None.
        allow_torchscript: run the code of a TorchScript archive that cannot be read otherwise.
        preprocess: mean, std, resize mode and interpolation that replace the model's own. A file of
            weights for a registry model has the preprocessing that all tags of the model agree on.

    Raises `ModelError` for a model or weights that are unknown, missing, damaged or do not match, and
    for a file whose preprocessing the model's tags do not agree on and `preprocess` does not give;
    `ConfigError` for an unknown precision, `ArtifactError` for a damaged artifact.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    overrides = preprocess or PreprocessOverrides()
    name, pretrained = fspath(name), None if pretrained is None else fspath(pretrained)
    if (Path(name) / "artifact.json").is_file():
        if pretrained is not None:
            raise ModelError(f"artifact {name} holds its weights: leave {pretrained!r} out")
        if given := overrides.given():
            raise ConfigError(
                f"artifact {name} holds its preprocessing: leave "
                f"{', '.join(words(f, v) for f, v in given.items())} out"
            )
        return from_artifact(read_artifact(Path(name)), device=device)
    source = find_source(name, pretrained, allow_random)
    checkpoint = None
    if source.weights is not None:
        checkpoint = read_checkpoint(source.weights, allow_torchscript=allow_torchscript)
        overrides = overrides.over(checkpoint.preprocess)
    told: dict[str, object] = {}
    if checkpoint is not None and source.untold is not None:
        told = of_file(source.untold, openai=checkpoint.openai, overrides=overrides)
    model = open_clip_model(source, checkpoint)
    size = getattr(model.visual, "image_size", None) or source.preprocess["size"]
    model = model.to(device=device, dtype=PRECISIONS[precision]).eval().requires_grad_(False)
    return ClipModel(
        name=source.name,
        pretrained=pretrained,
        image=ImageTower(model),
        text=TextTower(model),
        logit_scale=math.exp(model.get_parameter("logit_scale").item()),
        model_config=source.config,
        # The towers' own size rules: a configuration of the preprocessing may leave it out.
        preprocess=source.preprocess | told | overrides.given() | {"size": size},
        tokenizer_config=source.tokenizer,
        device=str(device),
    )


def load_clip_benchmark(
    model_name: str | PathLike[str],
    pretrained: str | PathLike[str] | None = None,
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[ClipEncoder, Transform, Tokenizer]:
    """A model or an artifact as (model, transform, tokenizer), as CLIP_benchmark loads its own.

    The arguments are those of its loading functions, so that one line adds this one to them:
    `TYPE2FUNC["qwt-fx"] = qwt_fx.clip.load_clip_benchmark`. `model` has open_clip's `encode_image`,
    `encode_text` and call. An empty `pretrained` is none: an artifact holds its weights.

    Raises as `load`, and `ConfigError` for a `cache_dir`: set HF_HOME for that.
    """
    if cache_dir:
        raise ConfigError(f"cache_dir: got {cache_dir!r}, wanted none; set HF_HOME instead")
    model = load(model_name, pretrained or None, device=device)
    encoder = ClipEncoder(model.image, model.text, model.logit_scale).to(device)
    return encoder, model.transform, model.tokenizer


_STORED = {
    "name": str,
    "pretrained": (str, type(None)),
    "logit_scale": (int, float),
    "model_config": dict,
    "preprocess": dict,
    "tokenizer_config": dict,
}


def to_extra(model: ClipModel) -> JsonObject:
    """What `from_artifact` needs beside the towers, for JSON: an entry "clip"."""
    return {"clip": {key: getattr(model, key) for key in _STORED}}


def from_artifact(artifact: Artifact, *, device: str | torch.device = "cpu") -> ClipModel:
    """The model of an artifact that holds both towers; needs no checkpoint and no network.

    Raises `ArtifactError` where the artifact holds something else, or its entry is malformed.
    """
    entry = artifact.extra.get("clip")
    if not isinstance(entry, dict) or set(artifact.towers) != set(TOWERS):
        raise ArtifactError(
            "this artifact holds a graph, not the two towers of a CLIP: use qwt_fx.load"
        )
    for key, kind in _STORED.items():
        if not isinstance(entry.get(key), kind):  # type: ignore[arg-type]
            raise ArtifactError(f"artifact.json: extra.clip.{key}: got {entry.get(key)!r}")
    model = ClipModel(
        image=artifact.towers["image"].to(device),
        text=artifact.towers["text"].to(device),
        device=str(device),
        **{key: copy.deepcopy(entry[key]) for key in _STORED},
    )
    try:
        _ = model.transform, model.image_size, model.context_length, model.text_example(1)
    except Exception as error:  # a malformed entry breaks anywhere in open_clip
        raise ArtifactError(f"artifact.json: extra.clip: {first_line(error)}") from error
    return model
