"""Latency of ViT-B/32 with random weights: FP32 compile, x86, our ONNX export, the runtimes' own int8.

All sides of a tower and batch size run in one process, in interleaved rounds, quantized on the same
samples. ONNX Runtime's own quantize_static and, with nncf installed, OpenVINO with NNCF are the rivals;
what is not installed is left out, and the results say so. Our export is timed with 8-bit weights as
uint8 (`pack="auto"`, exact on every CPU) and as int8; in OpenVINO with floats in float32 and as it comes
(bfloat16 on CPUs that have it). A text tower whose graph takes any length is also
timed on captions of 12 tokens.

usage: python benchmarks/latency.py [--threads 2] [--towers image text] [--batch-sizes 1 16]
    [--rounds 15] [--bits 8/8] [--samples 64] [--compensations int8 qwt] [--output latency]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from common import machine, write_results
from rivals import Run, export_floating, onnxruntime_static, openvino_nncf
from tabulate import tabulate
from torch import Tensor, nn

from qwt_fx import api
from qwt_fx.backends.compiled import compile_graph
from qwt_fx.backends.onnx.onnx_runtime import onnx_runtime_session
from qwt_fx.backends.onnx.openvino_runtime import openvino_model
from qwt_fx.clip.clip import ImageTower, TextTower
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.measure.machine import sums_byte_products_exactly
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.measure.timing import interleaved

START, END, CONTEXT, SHORT = 49406, 49407, 77, 12
YARDSTICK = "fp32-compile"
# The rivals' models take 77 tokens only.
FULL_LENGTH = {
    "onnxruntime quantize_static", "onnxruntime quantize_static, may overflow", "openvino nncf",
    "openvino nncf, as it comes",
}  # fmt: skip


def build() -> dict[str, nn.Module]:
    """Both towers of open_clip's ViT-B-32 with seeded random weights."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained=None).eval().requires_grad_(False)
    return {"image": ImageTower(model), "text": TextTower(model)}


def inputs(tower: str, batch: int, length: int = CONTEXT, seed: int = 0) -> Tensor:
    """Images (n, 3, 224, 224), or texts (n, length) of the whole length."""
    generator = torch.Generator().manual_seed(seed)
    if tower == "image":
        return torch.randn(batch, 3, 224, 224, generator=generator)
    ids = torch.randint(1, START, (batch, length), generator=generator)
    ids[:, 0], ids[:, -1] = START, END
    return ids


def quantize(tower: str, module: nn.Module, args: argparse.Namespace, compensation: str) -> Any:
    """The tower in integers, recipe `best`."""
    weight, activation = (int(b) for b in args.bits.split("/"))
    batches = inputs(tower, args.samples, seed=1).split(32)
    config = QuantConfig(w_bits=weight, a_bits=activation, compensation=compensation)
    return api.quantize(module, (batches[0][:2],), list(batches), config)


def onnx_sides(
    tower: str, module: nn.Module, quantized: Any, args: argparse.Namespace, folder: Path
) -> dict[str, Run]:
    """Our export and the rivals of each runtime that is installed."""
    runs: dict[str, Run] = {}
    if importlib.util.find_spec("onnxruntime") is None:
        return runs
    example, threads = inputs(tower, 2), args.threads
    floating, ours = folder / f"{tower}.onnx", folder / f"{tower}-ours.onnx"
    signed = folder / f"{tower}-signed.onnx"
    export_floating(module, (example,), floating)
    samples = [(x,) for x in inputs(tower, args.samples, seed=1).split(1)]
    api.export(quantized, ours, (example,))
    api.export(quantized, signed, (example,), pack="int8")
    runs["onnxruntime, our export"] = onnx_runtime_session(ours, threads=threads)
    runs["onnxruntime, our export, int8"] = onnx_runtime_session(signed, threads=threads)
    overflows = not sums_byte_products_exactly()
    runs["onnxruntime quantize_static"] = onnxruntime_static(
        floating, samples, threads, exact=overflows
    )
    if overflows:
        name = "onnxruntime quantize_static, may overflow"
        runs[name] = onnxruntime_static(floating, samples, threads, exact=False)
    if importlib.util.find_spec("nncf") is not None:
        runs["openvino, our export"] = openvino_model(signed, threads=threads)
        runs["openvino, our export, as it comes"] = openvino_model(
            signed, threads=threads, as_it_comes=True
        )
        runs |= openvino_nncf(floating, samples, threads)
    return runs


def sides(tower: str, module: nn.Module, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is timed, by name, and what is known of it."""
    begun = time.perf_counter()
    quantized = quantize(tower, module, args, "auto")
    lowered = api.lower(quantized, "x86")
    kernels = api.kernel_audit(lowered)
    runs: dict[str, Run] = {YARDSTICK: compile_graph(module), "x86": compile_graph(lowered)}
    for kind in args.compensations:
        other = quantize(tower, module, args, kind)
        runs[f"x86, {kind}"] = compile_graph(api.lower(other, "x86"))
    runs |= onnx_sides(tower, module, quantized, args, folder)
    example = inputs(tower, 2, seed=2)
    with torch.no_grad():
        exact, wanted = module(example), quantized(example)
        quality = {
            name: {
                "against FP32": sqnr_db(exact, run(example)),
                "against eager": sqnr_db(wanted, run(example)),
            }
            for name, run in runs.items()
            if "onnx" in name or "openvino" in name
        }
        quality["x86"] = {
            "against FP32": sqnr_db(exact, lowered(example)),
            "against eager": sqnr_db(wanted, lowered(example)),
        }
    return {
        "runs": runs,
        "any_length": graph_info(quantized).end_of_text is not None,
        "sqnr_db": quality,
        "integer_layers": sum(k.integer for k in kernels),
        "layers": len(kernels),
        "kernels": sorted({k.kernel for k in kernels if k.integer}),
        "floating": {k.name: k.reason for k in kernels if not k.integer},
        "seconds_to_prepare": time.perf_counter() - begun,
    }


def measure(tower: str, batch: int, length: int, runs: dict[str, Run], rounds: int) -> list[Any]:
    """One row a side."""
    example = inputs(tower, batch, length)
    for run in runs.values():
        run(example)  # compiles
    calls = {name: (lambda run=run: run(example)) for name, run in runs.items()}
    latencies = interleaved(calls, rounds, warm_up=3)
    reference = latencies[YARDSTICK].median
    return [
        {
            "tower": tower,
            "batch": batch,
            "length": length if tower == "text" else None,
            "runtime": name,
            "median_seconds": latency.median,
            "p90_seconds": latency.p90,
            "speedup": reference / latency.median,
        }
        for name, latency in latencies.items()
    ]


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--towers", nargs="+", default=["image", "text"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bits", default="8/8")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--compensations", nargs="*", default=[], help="also time x86 with these, slow to compile"
    )
    parser.add_argument("--output", default="latency", help="results/OUTPUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    towers = build()
    rows: list[dict[str, Any]] = []
    known: dict[str, Any] = {}
    document = {
        "machine": machine(),
        "bits": args.bits,
        "rounds": args.rounds,
        "samples": args.samples,
        "installed": {n: importlib.util.find_spec(n) is not None for n in ("onnxruntime", "nncf")},
        "towers": known,
        "rows": rows,
    }
    with TemporaryDirectory() as folder:
        for tower in args.towers:
            found = sides(tower, towers[tower], args, Path(folder))
            runs = found.pop("runs")
            known[tower] = found
            for batch in args.batch_sizes:
                rows += measure(tower, batch, CONTEXT, runs, args.rounds)
                if tower == "text" and found["any_length"]:
                    short = {k: v for k, v in runs.items() if k not in FULL_LENGTH}
                    rows += measure(tower, batch, SHORT, short, args.rounds)
                write_results(args.output, document)  # what is done stays, should the rest not be
    table = [
        [r["tower"], r["batch"], r["length"], r["runtime"], f"{1e3 * r['median_seconds']:.1f}",
         f"{1e3 * r['p90_seconds']:.1f}", f"{r['speedup']:.2f}"]
        for r in rows
    ]  # fmt: skip
    print(
        tabulate(table, ["tower", "batch", "tokens", "runtime", "median ms", "p90 ms", "speedup"])
    )


if __name__ == "__main__":
    main()
