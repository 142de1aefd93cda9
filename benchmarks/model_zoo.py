"""RepQ-ViT and QwT on models that no pass was prepared for: random weights, one table.

`--published`: at published sizes instead, 8/8 beside the model's own sensitivity (`zoo/published.py`).

usage: python benchmarks/model_zoo.py [--models GLOB ...] [--samples 128] [--batch 128] [--seed 0]
           [--published]
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata

import torch
from common import machine, write_results
from tabulate import tabulate
from zoo.measure import Figures, measure
from zoo.models import ZOO
from zoo.published import PUBLISHED, SAMPLES, measure_published

HEADERS = (
    "model", "M param.", "blocks", "blocks' share", "norms moved", "norms skipped", "layers",
    "in float", "8/8 (dB)", "4/4 (dB)", "+ QwT (dB)", "gain (dB)", "seconds",
)  # fmt: skip
LIBRARIES = ("open_clip_torch", "timm", "transformers", "torchvision")


def _row(figures: Figures) -> tuple[object, ...]:
    return (
        figures.model,
        figures.parameters / 1e6,
        figures.blocks,
        f"{100 * figures.blocks_share:.0f} %",
        figures.reparameterized,
        sum(figures.skipped.values()),
        figures.quantized,
        figures.floating,
        figures.w8a8,
        figures.w4a4,
        figures.w4a4_qwt,
        figures.w4a4_qwt - figures.w4a4,
        figures.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["*"], help="globs of model names")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument(
        "--batch", type=int, default=128, help="ranges come from the first; as many are evaluated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--published", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.published:
        published(args)
        return
    chosen = [e for e in ZOO if any(fnmatch.fnmatchcase(e.name, g) for g in args.models)]
    found = []
    for entry in chosen:
        found.append(measure(entry, args.samples, args.batch, args.seed))
        print(tabulate([_row(found[-1])], floatfmt=".1f", tablefmt="plain"), flush=True)
    print(tabulate([_row(f) for f in found], headers=HEADERS, floatfmt=(".1f")))
    gains = [f.w4a4_qwt - f.w4a4 for f in found]
    print(
        f"{len(found)} models; 8/8: least {min(f.w8a8 for f in found):.1f} dB; QwT's gain at 4/4: "
        f"mean {sum(gains) / len(gains):+.2f} dB, least {min(gains):+.2f} dB"
    )
    for figures in found:
        for reason, count in figures.skipped.items():
            print(f"{figures.model}: {count} norms skipped: {reason}")
    if args.models == ["*"]:
        write_results("model_zoo", known(args) | {"models": [f.to_dict() for f in found]})


def published(args: argparse.Namespace) -> None:
    """The table of published sizes."""
    args.samples = args.batch = SAMPLES
    rows: list[dict[str, object]] = []
    for entry in PUBLISHED:
        if any(fnmatch.fnmatchcase(entry.name, g) for g in args.models):
            rows.append(measure_published(entry, args.seed).to_dict())
            print(tabulate(rows[-1:], floatfmt=".1f", tablefmt="plain"), flush=True)
            if args.models == ["*"]:  # what is done stays, should the rest not be
                write_results("model_zoo_published", known(args) | {"models": rows})
    print(tabulate(rows, headers="keys", floatfmt=".1f"))


def known(args: argparse.Namespace) -> dict[str, object]:
    """Where and how the figures were measured."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"machine": machine(), "versions": versions} | vars(args)


if __name__ == "__main__":
    main()
