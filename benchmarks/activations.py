"""Dynamic activations against static ones: latency of ViT-B/32's image tower with random weights.

Both sides in one process, in interleaved rounds: `x86` compiled, ONNX Runtime, OpenVINO.
RepQ-ViT with `best`'s symmetric weights calibrates: latency depends on no value.

usage: python benchmarks/activations.py [--threads 1] [--batch-sizes 1 16] [--rounds 11]
    [--layers 12] [--runtimes x86 onnxruntime openvino] [--output activations]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import machine, write_results
from latency import build, inputs
from tabulate import tabulate

from qwt_fx import api
from qwt_fx.backends.compiled import compile_graph
from qwt_fx.backends.onnx.onnx_runtime import onnx_runtime_session
from qwt_fx.backends.onnx.openvino_runtime import openvino_model
from qwt_fx.config.config import ACTIVATIONS, QuantConfig
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.measure.timing import interleaved


def sides(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is timed by (runtime, activations), and the SQNR of each against eager in dB."""
    tower, example = build()["image"], inputs("image", 2)
    blocks = tower.get_submodule("visual.transformer")
    blocks.resblocks = blocks.resblocks[: args.layers]
    runs: dict[str, Any] = {}
    quality: dict[str, Any] = {}
    graph = api.capture(tower, (example,))
    for kind in ACTIVATIONS:
        config = QuantConfig(recipe="repq-vit", symmetric_weights=True, activations=kind)
        quantized = api.quantize(graph, (example,), [(inputs("image", 8, seed=1),)], config)
        lowered = api.lower(quantized, "x86")
        made: dict[str, Any] = {"x86": compile_graph(lowered)} if "x86" in args.runtimes else {}
        path = folder / f"{kind}.onnx"
        if made.keys() != set(args.runtimes):
            api.export(quantized, path, (example,), pack="int8")
        if "onnxruntime" in args.runtimes:
            made["onnxruntime"] = onnx_runtime_session(path, threads=args.threads)
        if "openvino" in args.runtimes:
            made["openvino"] = openvino_model(path, threads=args.threads)
            kernels = [k.integer for k in made["openvino"].audit()]
            quality[f"openvino, {kind}, integer layers"] = sum(kernels)
        with torch.no_grad():
            wanted = quantized(example)
            for name, run in made.items():
                found = lowered(example) if name == "x86" else run(example)
                quality[f"{name}, {kind}"] = sqnr_db(wanted, found)
        runs |= {f"{name}, {kind}": run for name, run in made.items()}
    return runs, quality


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=12, help="fewer are compiled sooner")
    parser.add_argument("--runtimes", nargs="+", default=["x86", "onnxruntime"])
    parser.add_argument("--output", default="activations", help="results/OUTPUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with TemporaryDirectory() as folder:
        runs, quality = sides(args, Path(folder))
        for batch in args.batch_sizes:
            example = inputs("image", batch)
            calls = {name: (lambda run=run, x=example: run(x)) for name, run in runs.items()}
            for call in calls.values():
                call()  # compiles
            latencies = interleaved(calls, args.rounds, warm_up=1)
            for name in sorted(latencies):
                runtime, kind = name.split(", ")
                static = latencies[f"{runtime}, static"].median
                seconds = latencies[name].median
                row = {"batch": batch, "runtime": runtime, "activations": kind}
                rows.append(row | {"median_seconds": seconds, "of_static": seconds / static})
            print(tabulate(rows, headers="keys", floatfmt=".4f"), flush=True)
            known = {"layers": args.layers, "rounds": args.rounds, "quality": quality}
            document = {"machine": machine(), **known, "rows": rows}
            write_results(args.output, document)
    print(quality)


if __name__ == "__main__":
    main()
