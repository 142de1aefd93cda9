"""`export --verify`: FP32, eager and exported towers on the same inputs, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwt_fx.backends.exports import runner_of
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.screen import Screen, decibels, percent
from qwt_fx.errors import CheckFailed
from qwt_fx.evaluate.metrics import agreement, normalized
from qwt_fx.measure.measure import sqnr_db

MIN_SQNR_DB = 40.0
MIN_AGREEMENT = 0.995
Pairs = Sequence[tuple[Tensor, Tensor]]
Towers = Mapping[str, Callable[[Tensor], Tensor]]
Embeddings = dict[str, Tensor]


def noise_batches(model: ClipModel, samples: int = 32) -> list[tuple[Tensor, Tensor]]:
    """One batch of seeded images and texts, where there is no calibration data."""
    return [(model.image_example(samples), model.text_example(samples))]


def verify(
    model: ClipModel,
    floating: ClipModel | None,
    files: Mapping[str, Path],
    format: str,
    batches: Pairs,
    screen: Screen,
    threads: int | None = None,
) -> None:
    """Print the comparison and raise `CheckFailed` where the export differs from the artifact.

    Args:
        model: the artifact's towers, run as they are: the reference.
        floating: the FP32 towers, shown beside where given.
        files: the exported file of each tower.
        format: of the files.
        batches: pairs of images (n, 3, h, w) and token ids (n, context).

    A tower that was not exported takes part with the artifact's own features.
    """
    sides: dict[str, Towers] = {
        "eager": model.towers,
        "exported": model.towers
        | {t: runner_of(path, format, threads) for t, path in files.items()},
    }
    if floating is not None:
        sides["FP32"] = floating.towers
    features = {name: _features(towers, batches, screen, name) for name, towers in sides.items()}
    pairs = [("eager", "exported")]
    if floating is not None:
        pairs += [("FP32", "eager"), ("FP32", "exported")]
    rows = []
    failures = []
    for first, second in pairs:
        same = agreement(*(_top1(features[side]) for side in (first, second)))
        for tower in files:
            exact, other = features[first][tower], features[second][tower]
            sqnr = sqnr_db(exact, other)
            cosine = float((normalized(exact) * normalized(other)).sum(-1).min())
            rows.append(
                [tower, f"{second} against {first}", f"{cosine:.6f}", decibels(sqnr), percent(same)]
            )
            if (first, second) == ("eager", "exported") and sqnr < MIN_SQNR_DB:
                failures.append(f"the {tower} tower has {sqnr:.1f} dB, wanted {MIN_SQNR_DB:g}")
        if (first, second) == ("eager", "exported") and same < MIN_AGREEMENT:
            failures.append(f"top-1 agrees on {100 * same:.2f} %, wanted {100 * MIN_AGREEMENT:g}")
    screen.table(rows, ("tower", "", "least cosine", "SQNR (dB)", "top-1 agreement (%)"))
    if failures:
        raise CheckFailed(f"--verify: exported against eager: {'; '.join(failures)}")


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
