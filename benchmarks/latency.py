"""Latency of ViT-B/32 with random weights: FP32 compile, x86, ONNX Runtime's own quantize_static.

All sides of a tower and batch size run in one process, in interleaved rounds. ONNX Runtime is left
out, and named so in the results, where it is not installed. A text tower whose graph takes any
length is also timed on captions of 12 tokens.

usage: python benchmarks/latency.py [--threads 2] [--towers image text] [--batch-sizes 1 16]
    [--rounds 15] [--bits 8/8] [--samples 8] [--output latency]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from common import machine, write_results
from tabulate import tabulate
from torch import Tensor, nn

from qwt_fx import api
from qwt_fx.backends.compiled import compile_graph
from qwt_fx.clip import ImageTower, TextTower
from qwt_fx.config import QuantConfig
from qwt_fx.graph import graph_info
from qwt_fx.machine import processor
from qwt_fx.measure import sqnr_db
from qwt_fx.timing import interleaved

START, END, CONTEXT, SHORT = 49406, 49407, 77, 12
YARDSTICK = "fp32-compile"
Run = Callable[[Tensor], Any]


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


def quantize(tower: str, module: nn.Module, bits: str, samples: int) -> Any:
    """The tower in integers, `best` with its default compensation."""
    weight, activation = (int(b) for b in bits.split("/"))
    batch = inputs(tower, samples, seed=1)
    config = QuantConfig(w_bits=weight, a_bits=activation)
    return api.quantize(
        module, (batch[:2],), [batch[: samples // 2], batch[samples // 2 :]], config
    )


def quantize_static(tower: str, module: nn.Module, folder: Path, threads: int) -> Run:
    """ONNX Runtime's own static quantization of the FP32 model: QDQ, per channel."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat
    from onnxruntime.quantization import quantize_static as run_quantization

    example = inputs(tower, 2)
    floating, quantized = folder / f"{tower}.onnx", folder / f"{tower}-int8.onnx"
    torch.onnx.export(
        module, (example,), str(floating), input_names=["x"], dynamo=True, external_data=False,
        dynamic_shapes=({0: torch.export.Dim("n")},),
    )  # fmt: skip

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([inputs(tower, 1, seed=s) for s in range(4)])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    run_quantization(
        str(floating), str(quantized), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(quantized), options, ["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def sides(tower: str, module: nn.Module, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is timed, by name, and what is known of it."""
    begun = time.perf_counter()
    quantized = quantize(tower, module, args.bits, args.samples)
    lowered = api.lower(quantized, "x86")
    kernels = api.kernel_audit(lowered)
    example = inputs(tower, 2)
    with torch.no_grad():
        parity = sqnr_db(quantized(example), lowered(example))
    runs: dict[str, Run] = {YARDSTICK: compile_graph(module), "x86": compile_graph(lowered)}
    if not args.no_onnxruntime and importlib.util.find_spec("onnxruntime") is not None:
        runs["onnxruntime quantize_static"] = quantize_static(tower, module, folder, args.threads)
    return {
        "runs": runs,
        "any_length": graph_info(quantized).end_of_text is not None,
        "sqnr_db_against_eager": parity,
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
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--no-onnxruntime", action="store_true")
    parser.add_argument("--output", default="latency", help="results/OUTPUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    towers, rows, known = build(), [], {}
    with TemporaryDirectory() as folder:
        for tower in args.towers:
            found = sides(tower, towers[tower], args, Path(folder))
            runs = found.pop("runs")
            known[tower] = found
            for batch in args.batch_sizes:
                rows += measure(tower, batch, CONTEXT, runs, args.rounds)
                if tower == "text" and found["any_length"]:
                    short = {k: v for k, v in runs.items() if "onnxruntime" not in k}
                    rows += measure(tower, batch, SHORT, short, args.rounds)
    document = {
        "machine": machine() | {"cpu": processor()},
        "bits": args.bits,
        "rounds": args.rounds,
        "onnxruntime": importlib.util.find_spec("onnxruntime") is not None,
        "towers": known,
        "rows": rows,
    }
    write_results(args.output, document)
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
