"""Quantizing and evaluating the two towers of a CLIP: what `quantize`, `eval` and `demo` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.artifact.graph_json import why_not_storable
from qwt_fx.batches.batch import Batch
from qwt_fx.batches.device_memory import with_smaller_batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.kept_batches import KeptBatches
from qwt_fx.batches.precision import to_device
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.capture.capture import capture
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.quantize.tower_checkpoints import FinishedTower, TowerCheckpoints
from qwt_fx.commands.screen import Screen
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import CaptureError
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.measure.measure import sqnr_db, tensors_of


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
    batches = DistributedBatches.of(batches)
    kept = checkpoints or TowerCheckpoints()
    seconds: dict[str, float] = {}
    result = dict(graphs)
    classifier = FLOATING_CLASSIFIER
    for index, tower in enumerate(TOWERS):
        if tower not in towers:
            continue
        inputs = _inputs(batches, index, model.device)
        run = partial(
            _quantize_tower, config=config_of_tower(config, graphs, tower), tower=tower,
            graph=graphs[tower], screen=screen, store=store or ValueStore(),
        )  # fmt: skip
        if batches.ranks.world > 1 or config.compat == "original":
            # Ranks hold batches of known sizes, and the original's figures belong to its batches.
            done = run(inputs, kept)
        else:
            done = _within_memory(inputs, kept, run)
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
    pairs: DistributedBatches, index: int, device: str | torch.device
) -> DistributedBatches:
    """What one tower reads of each batch."""
    if isinstance(pairs.batches, KeptBatches):
        return DistributedBatches(pairs.batches.column(index, device), pairs.sizes, pairs.ranks)
    return pairs.map(lambda batch: (to_device(batch[index], device),))


def _within_memory(
    inputs: DistributedBatches,
    checkpoints: TowerCheckpoints,
    run: Callable[[DistributedBatches, TowerCheckpoints], FinishedTower],
) -> FinishedTower:
    """One tower, with smaller batches where the device has too little memory for these."""

    def attempt(tried: Sequence[Batch]) -> FinishedTower:
        if tried is inputs.batches:
            return run(inputs, checkpoints)
        # A checkpoint belongs to its batches: these would not be found again.
        return run(DistributedBatches.of(tried), TowerCheckpoints())

    return with_smaller_batches(inputs.batches, attempt)


def _quantize_tower(
    inputs: DistributedBatches,
    checkpoints: TowerCheckpoints,
    config: QuantConfig,
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
            tell=lambda why: screen.note(f"{tower} tower: {why}"),
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
    graphs = {t: capture(tower, (model.example(t, 2),)) for t, tower in model.towers.items()}
    seconds["capture"] = seconds.get("capture", 0.0) + time.perf_counter() - begun
    return graphs


def require_storable(graphs: Mapping[str, GraphModule]) -> None:
    """Raise `CaptureError` for a tower that could be quantized but not saved."""
    for tower, graph in graphs.items():
        if (reason := why_not_storable(graph)) is not None:
            raise CaptureError(f"{tower} tower: {reason}")


def calibration_sqnr(
    graphs: dict[str, GraphModule],
    result: QuantizedClip,
    batches: Sequence[tuple[Tensor, Tensor]] | DistributedBatches,
    device: str | torch.device,
) -> dict[str, float | None]:
    """Embedding SQNR in dB of the quantized towers on the calibration samples; on the first rank."""
    batches = DistributedBatches.of(batches)
    sqnr: dict[str, float | None] = dict.fromkeys(TOWERS)
    for index, tower in enumerate(TOWERS):
        if tower not in result.quantized:
            continue
        sides, inputs = (graphs[tower], result.towers[tower]), _inputs(batches, index, device)

        def embedded(
            at: int, inputs: DistributedBatches = inputs, sides: Sequence[GraphModule] = sides
        ) -> Iterator[list[list[Tensor]]]:
            (batch,) = inputs.batches[at]
            yield [tensors_of(side(batch)) for side in sides]

        with torch.no_grad():
            both = list(batches.in_order(embedded))
        if batches.ranks.first:
            exact, rounded = (torch.cat([t for pair in both for t in pair[k]]) for k in range(2))
            sqnr[tower] = sqnr_db(exact, rounded)
    return sqnr
