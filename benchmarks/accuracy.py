"""Accuracy of recipes and of every remedy, on two CLIPs: `best` against the published procedure.

Main rows: 3 calibration seeds, every bit setting. Ablation rows: one remedy added to RepQ-ViT, or
one taken from `best`, at the bits and seeds named.

usage: python benchmarks/accuracy.py [--models demo second] [--images 10000] [--seeds 1 2 3]
           [--bits 8/8 6/6 4/8 4/4] [--ablations] [--ablation-seeds 1] [--ablation-bits 4/4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    SETTINGS,
    Demo,
    both_settings,
    kept_results,
    machine,
    open_demo,
    write_results,
)
from tabulate import tabulate

from qwt_fx.config.config import QuantConfig

PUBLISHED = {"recipe": "repq-vit", "compat": "original"}
MAIN: dict[str, dict[str, Any]] = {
    "original": PUBLISHED,
    "original + QwT": {**PUBLISHED, "compensation": "qwt"},
    "best": {},
}
REMEDIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # remedy: (what adds it to RepQ-ViT, what takes it from best)
    "token masks": ({"token_masks": "regression"}, {"token_masks": "none"}),
    "start token": ({}, {"constant_tokens": False}),
    "searched reparameterization": (
        {"reparameterization": "search"},
        {"reparameterization": 1.0},
    ),
    "positions' scales": ({"token_scales": True}, {"token_scales": False}),
    "output ranges": ({"ranges": "output"}, {"ranges": "tensor"}),
    "GPTQ": ({"rounding": "gptq"}, {"rounding": "nearest"}),
    "refit": ({"refit": True, "bias_correction": True}, {"refit": False}),
    "bias correction": ({"bias_correction": True}, {"bias_correction": False}),
    "value scales": ({"fold_values": True}, {"fold_values": False}),
    "input scales": ({"input_scales": True}, {"input_scales": False}),
    "FP-path target": ({}, {"target": "local"}),
    "symmetric weights": ({"symmetric_weights": True}, {"symmetric_weights": False}),
}
EVERY_TOKEN = 1_000_000  # for each input channel: more than there are


def ablations() -> dict[str, dict[str, Any]]:
    """One configuration a row: a remedy alone on RepQ-ViT, and `best` without it."""
    rows: dict[str, dict[str, Any]] = {"RepQ-ViT, all batches": {"ranges": "tensor"}}
    for remedy, (added, _) in REMEDIES.items():
        if added:
            rows[f"+ {remedy}"] = added
    rows = {name: {"recipe": "repq-vit", **options} for name, options in rows.items()}
    rows |= {f"best - {remedy}": removed for remedy, (_, removed) in REMEDIES.items()}
    rows |= {
        "best, all tokens of every layer": {"tokens_per_input": EVERY_TOKEN},
        "best + QwT": {"compensation": "qwt"},
    }
    return rows


def measure(demo: Demo, options: dict[str, Any], bits: str, seed: int) -> dict[str, Any]:
    """Figures of one quantization, for both settings of towers."""
    w_bits, a_bits = (int(b) for b in bits.split("/"))
    config = QuantConfig.from_dict({"w_bits": w_bits, "a_bits": a_bits, **options})
    found = both_settings(demo, config, seed)
    return {setting: figures for setting, (figures, _) in found.items()}


def row(name: str, bits: str, setting: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the calibration seeds."""
    found = [run[setting] for run in runs]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def sqnr(tower: str) -> float | None:
        values = [f["embedding_sqnr_db"][tower] for f in found]
        return None if values[0] is None else mean(values)

    return {
        "row": name,
        "W/A": bits,
        "towers": setting,
        "seeds": len(found),
        "top-1 (%)": 100 * mean([f["acc1"] for f in found]),
        "drop": 100 * mean([f["drop"] for f in found]),
        "drop, 95 %": " ".join(
            "[{:.2f} {:.2f}]".format(*(100 * side for side in f["acc1_drop_ci"])) for f in found
        ),
        "agreement (%)": 100 * mean([f["agreement"] for f in found]),
        "image SQNR (dB)": sqnr("image"),
        "text SQNR (dB)": sqnr("text"),
        "McNemar p": " ".join(f"{f['mcnemar']['p']:.2g}" for f in found),
    }


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each recipe, bit setting and setting of towers."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["row"], run["W/A"]), []).append(run)
    return [row(n, b, s, r) for (n, b), r in grouped.items() for s in SETTINGS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=("demo", "second"), default=["demo", "second"]
    )
    parser.add_argument("--variant", default="hard")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bits", nargs="+", default=["8/8", "6/6", "4/8", "4/4"])
    parser.add_argument("--rows", nargs="+", default=list(MAIN), choices=list(MAIN))
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--ablation-seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--ablation-bits", nargs="+", default=["4/4"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep the rendered images there")
    parser.add_argument("--name", default="accuracy", help="results/NAME.json")
    parser.add_argument(
        "--resume", action="store_true", help="keep the runs that results/NAME.json has"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    jobs = [(n, MAIN[n], b, s) for s in args.seeds for b in args.bits for n in args.rows]
    if args.ablations:
        jobs += [
            (name, options, bits, seed)
            for seed in args.ablation_seeds
            for bits in args.ablation_bits
            for name, options in ablations().items()
        ]
    options_given = {k: v for k, v in vars(args).items() if k not in ("work", "resume")}
    kept = kept_results(args.name, resume=args.resume)
    document: dict[str, Any] = options_given | {"machine": machine()}
    document["models"] = kept.get("models", {})
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            second = model == "second"
            demo = open_demo(args.work or Path(folder), args.variant, args.images, second=second)
            fp32 = demo.evaluation.classify(demo.reference).acc1
            entry = document["models"].setdefault(model, {"runs": []})
            entry["fp32_acc1"] = fp32
            for name, options, bits, seed in jobs:
                key = {"row": name, "W/A": bits, "seed": seed}
                if any(key.items() <= run.items() for run in entry["runs"]):
                    continue
                begun = time.perf_counter()
                entry["runs"].append(key | measure(demo, options, bits, seed))
                took = time.perf_counter() - begun
                print(f"{model} {name} {bits} seed {seed}: {took:.0f} s", file=sys.stderr)
                write_results(args.name, document)  # what is done stays, should the rest not be
            rows = entry["rows"] = table(entry["runs"])
            write_results(args.name, document)
            print(f"{model}, {args.variant}: FP32 top-1 {100 * fp32:.2f} %")
            print(tabulate(rows, headers="keys", floatfmt=".2f"), flush=True)
    print(f"wrote {RESULTS / args.name}.json")


if __name__ == "__main__":
    main()
