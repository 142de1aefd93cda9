"""RepQ-ViT against RepQ-ViT + QwT on the demo CLIP: 10,000 images, 3 calibration seeds, paired tests.

usage: python benchmarks/demo_accuracy.py [--images 10000] [--seeds 1 2 3] [--bits 6 4]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import SETTINGS, Demo, both_settings, machine, open_demo, write_results
from tabulate import tabulate

from qwt_fx.config.config import QuantConfig
from qwt_fx.evaluate.metrics import mcnemar

METHODS: dict[str, dict[str, Any]] = {
    "original": {"recipe": "repq-vit", "compat": "original"},
    "RepQ-ViT": {"recipe": "repq-vit"},
    "RepQ-ViT + QwT": {"recipe": "repq-vit", "compensation": "qwt"},
    "best": {"recipe": "best"},
}


def measure(demo: Demo, method: str, bits: int, seed: int) -> dict[str, dict[str, Any]]:
    """Figures and per-sample outcomes of one quantization, for both settings of towers."""
    config = QuantConfig.from_dict({"w_bits": bits, "a_bits": bits, **METHODS[method]})
    found = both_settings(demo, config, seed)
    return {s: figures | {"correct": outcome.correct1} for s, (figures, outcome) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bits", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--variant", default="hard")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, tests = [], []
    with tempfile.TemporaryDirectory() as folder:
        demo = open_demo(Path(folder), args.variant, args.images)
        fp32 = demo.evaluation.classify(demo.reference).acc1
        for bits in args.bits:
            runs = {
                (method, seed): measure(demo, method, bits, seed)
                for seed in args.seeds
                for method in METHODS
            }
            for setting in SETTINGS:
                rows += [_row(runs, args.seeds, method, setting, bits, fp32) for method in METHODS]
                tests += [_paired(runs, seed, setting, bits) for seed in args.seeds]
            print(tabulate(rows, headers="keys", floatfmt=".2f"), flush=True)
    print(tabulate(tests, headers="keys", floatfmt=".4f"))
    known = vars(args) | {"fp32_acc1": fp32, "machine": machine(), "rows": rows, "mcnemar": tests}
    write_results(f"demo_accuracy_{args.variant}", known)


def _row(
    runs: dict[tuple[str, int], Any],
    seeds: list[int],
    method: str,
    setting: str,
    bits: int,
    fp32: float,
) -> dict[str, Any]:
    found = [runs[method, seed][setting] for seed in seeds]
    accuracies = [100 * f["acc1"] for f in found]
    mean = sum(accuracies) / len(accuracies)

    def sqnr(tower: str) -> float | None:
        values = [f["embedding_sqnr_db"][tower] for f in found]
        return None if values[0] is None else sum(values) / len(values)

    return {
        "W/A": f"{bits}/{bits}",
        "towers": setting,
        "method": method,
        "top-1 (%)": mean,
        "min": min(accuracies),
        "max": max(accuracies),
        "drop": 100 * fp32 - mean,
        "agreement (%)": 100 * sum(f["agreement"] for f in found) / len(found),
        "image SQNR (dB)": sqnr("image"),
        "text SQNR (dB)": sqnr("text"),
    }


def _paired(runs: dict[tuple[str, int], Any], seed: int, setting: str, bits: int) -> dict[str, Any]:
    """McNemar's test of RepQ-ViT + QwT against RepQ-ViT on the same images and calibration."""
    base, qwt = (runs[m, seed][setting]["correct"] for m in ("RepQ-ViT", "RepQ-ViT + QwT"))
    only_base, only_qwt, p = mcnemar(base, qwt)
    return {
        "W/A": f"{bits}/{bits}",
        "towers": setting,
        "seed": seed,
        "only RepQ right": only_base,
        "only +QwT right": only_qwt,
        "p": p,
    }


if __name__ == "__main__":
    main()
