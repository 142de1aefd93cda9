"""The zero-shot classification part of `quantize`, `eval` and `demo`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.batches.ranks import Ranks
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.commands.quantize.pipeline import QuantizedClip
from qwt_fx.commands.screen import Screen
from qwt_fx.data.classes import ClassPrompts
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer
from qwt_fx.evaluate.evaluate import (
    Features,
    ZeroShot,
    compare,
    image_features,
    text_features,
    zero_shot,
)


@dataclass
class Evaluation:
    """A validation set and the class prompts, ready to be embedded by any pair of towers."""

    batches: Iterable[tuple[Tensor, Tensor]]
    prompts: ClassPrompts
    tokens: Tensor
    device: str | torch.device
    store: FeatureStore = field(default_factory=FeatureStore)
    ranks: Ranks = field(default_factory=Ranks)

    def image(self, tower: nn.Module, screen: Screen, name: str) -> tuple[Tensor, Tensor]:
        """Image embeddings (n, e) and labels (n,)."""
        with screen.phase(f"{name}: images") as update:
            series = self.store.series(f"{name}-images")
            features, folders = image_features(
                tower, self.batches, self.device, update, series, self.ranks
            )
        classes = [self.prompts.class_of(k) for k in range(self.prompts.folders)]
        return features, torch.tensor(classes)[folders]

    def text(self, tower: nn.Module, screen: Screen, name: str) -> Tensor:
        """Prompt embeddings (p, e)."""
        with screen.phase(f"{name}: prompts") as update:
            series = self.store.series(f"{name}-prompts")
            return text_features(
                tower, self.tokens, device=self.device, progress=update, series=series,
                ranks=self.ranks,
            )  # fmt: skip

    def quantized(self, result: QuantizedClip, reference: Features, screen: Screen) -> Features:
        """Embeddings of the quantized towers; a floating-point tower's are the reference's."""
        images, prompts = reference.image, reference.prompts
        if "image" in result.quantized:
            images, _ = self.image(result.towers["image"], screen, "quantized")
        if "text" in result.quantized:
            prompts = self.text(result.towers["text"], screen, "quantized")
        return Features(images, prompts, reference.labels)

    def features(self, towers: Mapping[str, nn.Module], screen: Screen, name: str) -> Features:
        """Embeddings of both towers."""
        images, labels = self.image(towers["image"], screen, name)
        return Features(images, self.text(towers["text"], screen, name), labels)

    def classify(
        self, features: Features, classifier: ClassifierQuantizer = FLOATING_CLASSIFIER
    ) -> ZeroShot:
        """Zero-shot outcome of embeddings."""
        return zero_shot(features, len(self.prompts.templates), classifier)


def metrics_of(
    evaluation: Evaluation,
    reference: Features | None,
    quantized: Features | None,
    towers: Sequence[str],
    classifier: ClassifierQuantizer,
) -> JsonObject:
    """The `metrics` entry of report.json; a side that was not evaluated stays `null`.

    Empty but on the first rank, which alone has all features.
    """
    metrics: JsonObject = {}
    if not evaluation.ranks.first:
        return metrics
    exact = None if reference is None else evaluation.classify(reference)
    if exact is not None:
        metrics["fp32"] = exact.to_dict()
    if quantized is not None:
        used = classifier if tuple(towers) == ("image",) else FLOATING_CLASSIFIER
        rounded = evaluation.classify(quantized, used)
        metrics["quantized"] = rounded.to_dict()
        if reference is not None and exact is not None:
            metrics["quantized"] |= compare(reference, quantized, exact, rounded, towers)
    return metrics
