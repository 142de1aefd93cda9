"""`export --verify`: FP32, eager and exported towers on the same inputs, side by side.

Runtimes add in another order, and a value next to the boundary of two codes then takes the other one: a
whole step of a quantizer (benchmarks/runtime_differences.py). So a right export differs from the
artifact. It passes at `ENOUGH_DB`, `MARGIN_DB` below what quantization itself costs on these inputs, or
within `ROUNDING_DB` of what another order of sums alone does there: the artifact in our x86 backend.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwt_fx.backends import lower_to
from qwt_fx.backends.exports import runner_of
from qwt_fx.backends.onnx.openvino_runtime import openvino_model
from qwt_fx.backends.widening import compute_in_float32
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.screen import Screen, decibels, percent
from qwt_fx.errors import CheckFailed
from qwt_fx.evaluate.metrics import agreement, normalized
from qwt_fx.measure.floating import floating_graph
from qwt_fx.measure.measure import sqnr_db

ENOUGH_DB, ENOUGH_AGREEMENT = 40.0, 0.995
MARGIN_DB = 10.0  # a tenth of quantization's noise
ROUNDING_DB = 6.0  # four times the noise, twice the difference, of another order of sums
REFERENCE, FLOATING, ROUNDING = "eager", "activations in float", "x86"
Pairs = Sequence[tuple[Tensor, Tensor]]
Towers = Mapping[str, Callable[[Tensor], Tensor]]
Embeddings = dict[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """What was exported: the file of each tower, their format and how ONNX weights are packed."""

    files: Mapping[str, Path]
    format: str
    pack: str = "auto"


def noise_batches(model: ClipModel, samples: int = 32) -> list[tuple[Tensor, Tensor]]:
    """One batch of seeded images and texts, where there is no calibration data."""
    return [(model.image_example(samples), model.text_example(samples))]


def verify(
    model: ClipModel,
    floating: ClipModel | None,
    exported: Exported,
    batches: Pairs,
    screen: Screen,
    threads: int | None = None,
) -> None:
    """Print the comparison and raise `CheckFailed` where the export differs by more than rounding.

    Args:
        model: the artifact's towers, run as they are; those of an ONNX file in float32, as the file is.
        floating: the FP32 towers, which tell what quantization costs. Without them it is what the
            artifact's quantizers of activations cost: its weights are rounded on both sides.
        exported: the files. Those for OpenVINO (pack int8) run there as well, where it is installed.
        batches: pairs of images (n, 3, h, w) and token ids (n, context).

    A tower that was not exported takes part with the artifact's own features.
    """
    reference: dict[str, nn.Module] = dict(model.towers)
    if exported.format == "onnx":
        reference |= {tower: _in_float32(reference[tower]) for tower in exported.files}
    sides: dict[str, Towers] = {REFERENCE: reference}
    for name, opened in _runners(exported, threads).items():
        sides[name] = reference | {t: opened(path) for t, path in exported.files.items()}
    runtimes = [name for name in sides if name != REFERENCE]
    lowered = {t: lower_to(_graph(reference[t]), "x86") for t in exported.files}
    sides[ROUNDING] = {**reference, **lowered}
    cost = FLOATING if floating is None else "FP32"
    floats: Towers = {t: floating_graph(_graph(reference[t])) for t in exported.files}
    sides[cost] = {**reference, **floats} if floating is None else floating.towers
    features = {name: _features(towers, batches, screen, name) for name, towers in sides.items()}
    top1 = {name: _top1(found) for name, found in features.items()}
    same = {name: agreement(top1[REFERENCE], top1[name]) for name in sides}
    samples = len(top1[REFERENCE])
    # Differences in top-1 grow with the error itself, not with its power; one sample is no statistic.
    share = max((1.0 - same[cost]) * 10.0 ** (-MARGIN_DB / 20.0), 2.0 * (1.0 - same[ROUNDING]))
    alike = 1.0 - max(1.0 - ENOUGH_AGREEMENT, share, 1.0 / samples)
    rows, failures = [], []
    for name in (cost, ROUNDING, *runtimes):
        for tower in exported.files:
            exact, other = features[REFERENCE][tower], features[name][tower]
            sqnr = sqnr_db(exact, other)
            wanted = min(
                ENOUGH_DB,
                sqnr_db(exact, features[cost][tower]) + MARGIN_DB,
                sqnr_db(exact, features[ROUNDING][tower]) - ROUNDING_DB,
            )
            least = float((normalized(exact) * normalized(other)).sum(-1).min())
            rows.append([
                tower, f"{name} against {REFERENCE}", f"{least:.6f}", decibels(sqnr),
                decibels(wanted) if name in runtimes else "", percent(same[name]),
            ])  # fmt: skip
            if name in runtimes and not sqnr >= wanted:
                failures.append(f"{name}: the {tower} tower has {sqnr:.1f} dB, wanted {wanted:.1f}")
        if name in runtimes and same[name] < alike - 1e-9:
            failures.append(
                f"{name}: top-1 agrees on {100 * same[name]:.2f} %, wanted {100 * alike:.2f}"
            )
    screen.table(
        rows, ("tower", "", "least cosine", "SQNR (dB)", "wanted (dB)", "top-1 agreement (%)")
    )
    screen.note(
        f"--verify: on {samples} pairs; a right export lies {MARGIN_DB:g} dB below what quantization "
        f"costs ({cost}), within {ROUNDING_DB:g} dB of what another order of sums does ({ROUNDING}), or "
        f"at {ENOUGH_DB:g} dB"
    )
    if failures:
        raise CheckFailed(f"--verify: exported against {REFERENCE}: {'; '.join(failures)}")


def _runners(
    exported: Exported, threads: int | None
) -> dict[str, Callable[[Path], Callable[[Tensor], Tensor]]]:
    """What opens the files, by the name of its row."""
    found: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
        "exported": lambda path: runner_of(path, exported.format, threads)
    }
    if exported.pack == "int8" and importlib.util.find_spec("openvino") is not None:
        found["exported, in OpenVINO"] = lambda path: openvino_model(path, threads=threads)
    return found


def _graph(tower: nn.Module) -> GraphModule:
    assert isinstance(tower, GraphModule)  # of an artifact
    return tower


def _in_float32(tower: nn.Module) -> GraphModule:
    wide = copy.deepcopy(_graph(tower))
    compute_in_float32(wide)
    return wide


def _features(towers: Towers, batches: Pairs, screen: Screen, name: str) -> Embeddings:
    parts: dict[str, list[Tensor]] = {tower: [] for tower in TOWERS}
    with screen.phase(f"verify: {name}") as update, torch.no_grad():
        for done, batch in enumerate(batches):
            for tower, inputs in zip(TOWERS, batch, strict=True):
                parts[tower].append(towers[tower](inputs).detach().float())
            update(done + 1, len(batches))
    return {tower: torch.cat(chunks) for tower, chunks in parts.items()}


def _top1(features: Embeddings) -> Tensor:
    """The text nearest to each image, among those of all pairs."""
    image, text = normalized(features["image"]), normalized(features["text"])
    return (image @ text.T).argmax(dim=1)
