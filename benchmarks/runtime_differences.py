"""How far runtimes lie apart on one quantized model: what is not a fault but rounding.

A quantizer maps a value next to the boundary of two codes to either, by the last bit of a float32 sum,
and sums are added in another order by each runtime, each batch size and each number of threads. One such
flip is a whole step of that quantizer, and what it changes downstream meets boundaries again.

Measured on the demo's CLIP, both towers, on its validation images and the class prompts: a sample alone
against in a batch (eager, 64 samples), and eager against x86, ONNX Runtime and OpenVINO, beside the
error of the quantization itself: against FP32, and against the same stored weights with activations in
floating point. SQNR of the whole set, of the median and worst sample; top-1 is the nearest prompt.

usage: python benchmarks/runtime_differences.py [--variant hard] [--bits 8/8 6/6 4/8 4/4] [--images 200]
           [--prompts 400] [--recipes repq-vit best] [--samples 128]
           [--output runtime_differences] [--resume]
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import BATCH, kept_results, machine, write_results
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.backends.onnx.onnx_runtime import onnx_runtime_session
from qwt_fx.backends.onnx.openvino_runtime import openvino_model
from qwt_fx.clip import clip
from qwt_fx.clip.clip import TOWERS
from qwt_fx.config.config import QuantConfig
from qwt_fx.data.classes import resolve
from qwt_fx.data.data import load_calibration
from qwt_fx.data.imagefolder import open_validation
from qwt_fx.demo.assets import write_files
from qwt_fx.evaluate.metrics import agreement, normalized
from qwt_fx.measure.floating import floating_graph
from qwt_fx.measure.measure import sqnr_db

Run = Callable[[Tensor], Tensor]
REFERENCE, ALONE = "eager", "one alone"
MOST_ALONE = 64  # samples
EXTRAS = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


@dataclass
class Demo:
    """Towers, what they embed, and calibration pairs."""

    graphs: dict[str, GraphModule]
    inputs: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]


def sides(
    quantized: GraphModule, floating: GraphModule, example: Tensor, folder: Path
) -> dict[str, Run]:
    """What embeds a batch, by name: the reference first."""
    runs: dict[str, Run] = {
        REFERENCE: quantized,
        "x86": api.lower(quantized, "x86"),
    }
    packs = {"onnxruntime": ("auto", onnx_runtime_session), "openvino": ("int8", openvino_model)}
    for name, (pack, opened) in packs.items():
        if importlib.util.find_spec(EXTRAS[name]) is not None:
            path = folder / f"{name}.onnx"
            api.export(quantized, path, (example,), pack=pack)
            runs[name] = opened(path, threads=torch.get_num_threads())
    runs["activations in floating point"] = floating_graph(quantized)
    runs["FP32"] = floating
    return runs


def sample_db(reference: Tensor, other: Tensor) -> Tensor:
    """SQNR of each sample (n,) in dB; features (n, e). 150 dB at most: equal ones are infinite."""
    signal = reference.double().square().sum(1)
    noise = (reference - other).double().square().sum(1)
    return (10.0 * torch.log10(signal / noise)).clamp(max=150.0)


def open_demo(files: Path, args: argparse.Namespace) -> Demo:
    """The demo's CLIP, captured, with its shipped validation images and prompts."""
    write_files(files, args.variant)
    model = clip.load(str(files / "model.json"), str(files / "model.safetensors"))
    validation = open_validation(files / "val", model.transform, 256, 0)
    names = (files / "classnames.txt", files / "templates.txt")
    sentences = resolve(validation.classes, *names).sentences
    images = torch.cat([images for images, _ in validation])
    calibration = load_calibration(
        str(files / "calib-{000..003}.tar"), transform=model.transform, tokenizer=model.tokenizer,
        samples=args.samples, batch_size=BATCH, seed=1,
    )  # fmt: skip
    inputs = {
        "image": images[:: max(1, len(images) // args.images)],
        "text": model.tokenizer(sentences[:: max(1, len(sentences) // args.prompts)]),
    }
    graphs = {tower: api.capture(model.towers[tower], (model.example(tower),)) for tower in TOWERS}
    return Demo(graphs, inputs, list(calibration.batches))


@torch.no_grad()
def measure(demo: Demo, config: QuantConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a tower and side."""
    inputs = demo.inputs
    features: dict[str, dict[str, Tensor]] = {}
    for index, tower in enumerate(TOWERS):
        batches = [(batch[index],) for batch in demo.batches]
        quantized = api.quantize(demo.graphs[tower], batches[0], batches, config)
        with tempfile.TemporaryDirectory() as folder:
            runs = sides(quantized, demo.graphs[tower], inputs[tower][:2], Path(folder))
            features[tower] = {
                name: torch.cat([run(x) for x in inputs[tower].split(args.batch)])
                for name, run in runs.items()
            }
        first = inputs[tower][:MOST_ALONE].split(1)
        features[tower][ALONE] = torch.cat([quantized(sample) for sample in first])
    rows = []
    for name in features["image"]:
        sizes = {tower: len(features[tower][name]) for tower in TOWERS}
        same = agreement(*(
            (normalized(features["image"][n][: sizes["image"]]) @
             normalized(features["text"][n][: sizes["text"]]).T).argmax(1)
            for n in (REFERENCE, name)
        ))  # fmt: skip
        for tower in TOWERS if name != REFERENCE else ():
            exact, other = (features[tower][n][: sizes[tower]] for n in (REFERENCE, name))
            one = sample_db(exact, other)
            rows.append({
                "tower": tower, "against eager": name, "samples": len(one),
                "all_db": min(150.0, sqnr_db(exact, other)),
                "median_db": float(one.median()), "worst_db": float(one.min()),
                "top1_agreement": same,
            })  # fmt: skip
    return rows


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="hard")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--samples", type=int, default=128, help="calibration pairs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bits", nargs="+", default=["8/8", "6/6", "4/8", "4/4"])
    parser.add_argument("--recipes", nargs="+", default=["repq-vit", "best"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep rows that the results hold")
    parser.add_argument("--output", default="runtime_differences", help="results/OUTPUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = kept_results(args.output, resume=args.resume).get("rows", [])
    known = {(row["recipe"], row["bits"]) for row in rows}
    document = vars(args) | {"machine": machine(), "rows": rows}
    document["installed"] = {n: importlib.util.find_spec(n) is not None for n in EXTRAS}
    with tempfile.TemporaryDirectory() as work:
        demo = open_demo(Path(work), args)
        for recipe in args.recipes:
            for bits in args.bits:
                if (recipe, bits) in known:
                    continue
                w_bits, a_bits = map(int, bits.split("/"))
                config = QuantConfig(w_bits=w_bits, a_bits=a_bits, recipe=recipe)
                found = measure(demo, config, args)
                rows += [{"recipe": recipe, "bits": bits} | row for row in found]
                write_results(args.output, document)  # what is done stays, should the rest not be
                print(tabulate(rows[-len(found) :], headers="keys", floatfmt=".3f"), flush=True)


if __name__ == "__main__":
    main()
