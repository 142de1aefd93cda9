"""Quantizing and evaluating the two towers of a CLIP: what `quantize`, `eval` and `demo` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.batches.batch import Batch
from qwt_fx.batches.device_memory import with_smaller_batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.kept_batches import KeptBatches
from qwt_fx.batches.precision import to_device
from qwt_fx.batches.ranks import Ranks
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.clip.clip import ClipModel
from qwt_fx.commands.quantize.tower_checkpoints import FinishedTower, TowerCheckpoints
from qwt_fx.commands.screen import Screen
from qwt_fx.config.config import QuantConfig
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
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.measure.measure import sqnr_db, tensors_of

TOWERS = ("image", "text")


@dataclass
class QuantizedClip:
    """The towers after quantization, in the order image, text; an unquantized one is a captured graph.

    `classifier` is used where the image tower alone is quantized.
    """

    towers: dict[str, GraphModule]
    quantized: tuple[str, ...]
    classifier: ClassifierQuantizer
    seconds: dict[str, float] = field(default_factory=dict)


def quantize_towers(
    model: ClipModel,
    graphs: dict[str, GraphModule],
    batches: Sequence[tuple[Tensor, Tensor]] | DistributedBatches,
    config: QuantConfig,
    towers: Sequence[str],
    screen: Screen,
    checkpoints: TowerCheckpoints | None = None,
    store: ValueStore | None = None,
) -> QuantizedClip:
    """Quantize the named towers, the image tower first; `batches` are (images, texts).

    `graphs` are the captured towers; the others are taken as they are. The classifier is known on
    the first rank alone. `checkpoints` keep what is found on the way, `store` the activations. `seconds`
    of a resumed run are its own and those of the towers it found finished.
    """
    share = DistributedBatches.of(batches)
    kept = checkpoints or TowerCheckpoints()
    seconds: dict[str, float] = {}
    result = dict(graphs)
    classifier = FLOATING_CLASSIFIER
    for index, tower in enumerate(TOWERS):
        if tower not in towers:
            continue
        inputs = _inputs(share, index, model.device)
        of_tower = config_of_tower(config, graphs, tower)
        done = _within_memory(
            inputs, of_tower, kept, tower, graphs[tower], screen, store or ValueStore()
        )
        result[tower], classifier = done.graph, done.classifier or classifier
        for phase, spent in done.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return QuantizedClip(result, tuple(towers), classifier, seconds)


def config_of_tower(
    config: QuantConfig, graphs: Mapping[str, GraphModule], tower: str
) -> QuantConfig:
    """The configuration without the overrides that name layers of the other tower alone.

    An override that matches nothing anywhere stays: preparing the graph refuses it.
    """
    missed = {
        name: set(config.unmatched_overrides([layer_name(n) for n in weight_layers(gm)]))
        for name, gm in graphs.items()
    }
    nowhere = set.intersection(*missed.values())
    kept = {g: v for g, v in config.overrides.items() if g in nowhere or g not in missed[tower]}
    return config.replace(overrides=kept)


def _inputs(
    share: DistributedBatches, index: int, device: str | torch.device
) -> DistributedBatches:
    """What one tower reads of each batch."""
    if isinstance(share.batches, KeptBatches):
        return DistributedBatches(share.batches.column(index, device), share.sizes, share.ranks)
    return share.map(lambda batch: (to_device(batch[index], device),))


def _within_memory(
    inputs: DistributedBatches, config: QuantConfig, checkpoints: TowerCheckpoints, *rest: Any
) -> FinishedTower:
    """One tower, with smaller batches where the device has too little memory for these."""
    if inputs.ranks.world > 1 or config.compat == "original":
        # Ranks hold batches of known sizes, and the original's figures belong to its batches.
        return _quantize_tower(inputs, config, checkpoints, *rest)

    def run(tried: Sequence[Batch]) -> FinishedTower:
        if tried is inputs.batches:
            return _quantize_tower(inputs, config, checkpoints, *rest)
        # A checkpoint belongs to its batches: these would not be found again.
        return _quantize_tower(DistributedBatches.of(tried), config, TowerCheckpoints(), *rest)

    return with_smaller_batches(inputs.batches, run)


def _quantize_tower(
    inputs: DistributedBatches,
    config: QuantConfig,
    checkpoints: TowerCheckpoints,
    tower: str,
    graph: GraphModule,
    screen: Screen,
    store: ValueStore,
) -> FinishedTower:
    """One tower, quantized now or by the run that was cut off."""
    seconds: dict[str, float] = {}
    prepared = api.prepare(graph, config)
    checkpoint = checkpoints.open(tower, prepared, inputs, inputs.batches[0][0].device)
    for note in checkpoint.notes:
        screen.note(note)
    if checkpoint.finished is not None:
        screen.note(f"--resume: the {tower} tower is calibrated already")
        return checkpoint.finished
    classifier: list[ClassifierQuantizer] = []

    def ranges_found() -> None:
        # The published code finds the classifier's range in the very run that finds all others.
        if tower == "image":
            classifier.append(_observe_classifier(prepared, inputs, config, seconds))

    with screen.phase(f"{tower} tower: calibrate") as update:
        bar = partial(_advance, update)
        api.calibrate(
            prepared, inputs, seconds=seconds, progress=bar, checkpoint=checkpoint.journal,
            memory_budget=store, ranges_found=ranges_found,
        )  # fmt: skip
    done = FinishedTower(api.convert(prepared), classifier[0] if classifier else None, seconds)
    checkpoint.finish(done)
    return done


def _advance(update: Callable[[int, int], None], phase: str, done: int, total: int) -> None:
    update(done, total)


def _observe_classifier(
    prepared: GraphModule,
    inputs: DistributedBatches,
    config: QuantConfig,
    seconds: dict[str, float],
) -> ClassifierQuantizer:
    """The range of the classifier's input, from the quantized tower's features of the first batch."""
    if not inputs.ranks.first:
        return FLOATING_CLASSIFIER
    begun = time.perf_counter()
    with torch.no_grad():
        features = prepared(*inputs.batches[0])
    classifier = ClassifierQuantizer.observe(features, config)
    seconds["calibrate"] = seconds.get("calibrate", 0.0) + time.perf_counter() - begun
    return classifier


def capture_towers(model: ClipModel, seconds: dict[str, float]) -> dict[str, GraphModule]:
    """Both towers as captured graphs."""
    begun = time.perf_counter()
    graphs = {
        "image": api.capture(model.image, (model.image_example(2),)),
        "text": api.capture(model.text, (model.text_example(2),)),
    }
    seconds["capture"] = seconds.get("capture", 0.0) + time.perf_counter() - begun
    return graphs


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
                tower,
                self.tokens,
                device=self.device,
                progress=update,
                series=series,
                ranks=self.ranks,
            )

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
) -> dict[str, Any]:
    """The `metrics` entry of report.json; a side that was not evaluated stays `null`.

    Empty but on the first rank, which alone has all features.
    """
    metrics: dict[str, Any] = {}
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


def calibration_sqnr(
    graphs: dict[str, GraphModule],
    result: QuantizedClip,
    batches: Sequence[tuple[Tensor, Tensor]] | DistributedBatches,
    device: str | torch.device,
) -> dict[str, float | None]:
    """Embedding SQNR in dB of the quantized towers on the calibration samples; on the first rank."""
    share = DistributedBatches.of(batches)
    found: dict[str, float | None] = dict.fromkeys(TOWERS)
    for index, tower in enumerate(TOWERS):
        if tower not in result.quantized:
            continue
        sides, inputs = (graphs[tower], result.towers[tower]), _inputs(share, index, device)

        def embedded(
            at: int, inputs: DistributedBatches = inputs, sides: Any = sides
        ) -> Iterator[Any]:
            (batch,) = inputs.batches[at]
            yield [tensors_of(side(batch)) for side in sides]

        with torch.no_grad():
            both = list(share.in_order(embedded))
        if share.ranks.first:
            exact, rounded = (torch.cat([t for pair in both for t in pair[k]]) for k in range(2))
            found[tower] = sqnr_db(exact, rounded)
    return found
