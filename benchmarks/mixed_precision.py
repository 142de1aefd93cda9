"""Mixed precision on the demo: the bits that `qwt-fx sensitivity` finds at the size of uniform bits.

The search sees calibration pairs only. Uniform bits and the found ones are then quantized alike and
judged on the same validation images: drops against FP32, and one against the other, paired.

usage: python benchmarks/mixed_precision.py [--recipes best] [--bits 4] [--seeds 1] [--images 10000]
           [--max-act-bits 8] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    BATCH,
    RESULTS,
    SAMPLES,
    SCREEN,
    Demo,
    figures,
    machine,
    open_demo,
    write_results,
)
from tabulate import tabulate

from qwt_fx.cli import main as qwt_fx_main
from qwt_fx.clip.clip import TOWERS
from qwt_fx.commands.quantize.pipeline import quantize_towers
from qwt_fx.commands.quantize.quantize import save_clip
from qwt_fx.config.config import QuantConfig
from qwt_fx.evaluate.evaluate import ZeroShot
from qwt_fx.evaluate.metrics import mcnemar, paired_drop_interval


def search(demo: Demo, recipe: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What the program finds: its report, and how long it took in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = [
            "sensitivity", "--model", str(demo.files / "model.json"),
            "--pretrained", str(demo.files / "model.safetensors"),
            "--train-data", str(demo.files / "calib-{000..003}.tar"), "--seed", str(seed),
            "--recipe", recipe, "--max-size", f"{args.bits} bits",
            "--candidates", ",".join(str(b) for b in args.candidates),
            "--max-act-bits", str(args.max_act_bits), "--quiet",
            "--output", str(Path(folder) / "mixed.toml"), "--report", str(report),
        ]  # fmt: skip
        begun, used = time.perf_counter(), time.process_time()
        if code := qwt_fx_main(words):
            raise SystemExit(code)
        seconds = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - used}
        return json.loads(report.read_text()) | {"seconds": seconds}


def quantized(
    demo: Demo, config: QuantConfig, seed: int, exact: ZeroShot
) -> tuple[dict[str, Any], ZeroShot]:
    """Figures of one configuration on the validation images, and each image's outcome."""
    data = demo.calibration(SAMPLES, BATCH, seed)
    result = quantize_towers(demo.model, demo.graphs, data.batches, config, TOWERS, SCREEN)
    with tempfile.TemporaryDirectory() as folder:
        size = save_clip(Path(folder), demo.model, result, config, SCREEN)
    features = demo.evaluation.quantized(result, demo.reference, SCREEN)
    outcome = demo.evaluation.classify(features)
    found = figures(demo, features, exact, outcome, TOWERS)
    return found | {"size": size}, outcome


def run(demo: Demo, recipe: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Uniform bits and the bits found, at the same size of weights."""
    exact = demo.evaluation.classify(demo.reference)
    found = search(demo, recipe, args, seed)
    uniform = QuantConfig(w_bits=args.bits, a_bits=args.bits, recipe=recipe)
    mixed = QuantConfig.from_dict(found["config"])
    plain, first = quantized(demo, uniform, seed, exact)
    chosen, second = quantized(demo, mixed, seed, exact)
    only_mixed, only_uniform, p = mcnemar(second.correct1, first.correct1)
    return {
        "recipe": recipe,
        "seed": seed,
        "bits": args.bits,
        "search_seconds": found["seconds"],
        "search_trials": found["trials"],
        "weight_bytes": found["weight_bytes"],
        "overrides": found["config"]["overrides"],
        "uniform": plain,
        "mixed": chosen,
        "drop_removed": 1.0 - chosen["drop"] / plain["drop"] if plain["drop"] else None,
        "gain": chosen["acc1"] - plain["acc1"],
        "gain_ci": list(paired_drop_interval(only_mixed, only_uniform, len(exact.correct1))),
        "gain_mcnemar_p": p,
    }


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: two rows a run."""
    found = []
    for one in runs:
        for name in ("uniform", "mixed"):
            shown = one[name]
            low, high = shown["acc1_drop_ci"]
            found.append(
                {
                    "recipe": one["recipe"],
                    "seed": one["seed"],
                    "bits": f"{one['bits']}/{one['bits']}" if name == "uniform" else "mixed",
                    "top-1 (%)": 100 * shown["acc1"],
                    "drop": 100 * shown["drop"],
                    "95 %": f"[{100 * low:.2f} {100 * high:.2f}]",
                    "agreement (%)": 100 * shown["agreement"],
                    "image SQNR (dB)": shown["embedding_sqnr_db"]["image"],
                    "text SQNR (dB)": shown["embedding_sqnr_db"]["text"],
                    "file (MB)": shown["size"]["quantized_bytes"] / 1e6,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="hard")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--recipes", nargs="+", default=["best"], choices=("best", "repq-vit"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--max-act-bits", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep the rendered images there")
    parser.add_argument("--name", default="mixed_precision", help="results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    document: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "work"}
    document |= {"machine": machine(), "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        demo = open_demo(args.work or Path(folder), args.variant, args.images)
        document["fp32_acc1"] = demo.evaluation.classify(demo.reference).acc1
        for recipe in args.recipes:
            for seed in args.seeds:
                document["runs"].append(run(demo, recipe, args, seed))
                document["rows"] = rows(document["runs"])
                write_results(args.name, document)
    print(f"{args.variant}: FP32 top-1 {100 * document['fp32_acc1']:.2f} %")
    print(tabulate(document["rows"], headers="keys", floatfmt=".2f"))
    for one in document["runs"]:
        low, high = one["gain_ci"]
        print(
            f"{one['recipe']}, seed {one['seed']}: mixed - uniform {100 * one['gain']:.2f} "
            f"[{100 * low:.2f} {100 * high:.2f}], McNemar p {one['gain_mcnemar_p']:.2g}; search "
            f"{one['search_seconds']['wall']:.0f} s ({one['search_seconds']['cpu']:.0f} s CPU)",
            file=sys.stdout,
        )
    print(f"wrote {RESULTS / args.name}.json")


if __name__ == "__main__":
    main()
