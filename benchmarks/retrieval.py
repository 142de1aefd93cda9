"""Retrieval on the demo CLIP: FP32, RepQ-ViT, RepQ-ViT + QwT, best; both directions, cross-precision.

The pairs are the shipped validation images, one of each of the 1,600 classes, whose digits occur in
no calibration or training image; each has one caption a template of the evaluation ("a {}.",
"a photo of a {}."). No two images share a caption, so "its own image" is all that matches one.

usage: python benchmarks/retrieval.py [--bits 4 8] [--seed 1]
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SCREEN, machine, write_results
from tabulate import tabulate

from qwt_fx.clip import clip
from qwt_fx.commands.quantize.pipeline import capture_towers, quantize_towers
from qwt_fx.config.config import QuantConfig
from qwt_fx.data.data import load_calibration
from qwt_fx.data.retrieval_data import RetrievalReader
from qwt_fx.demo.assets import write_files
from qwt_fx.evaluate.retrieval import CROSS_SIDES, RECALLS
from qwt_fx.evaluate.retrieval_metrics import PairFeatures, pair_features, retrieval_metrics

METHODS: dict[str, dict[str, Any]] = {
    "RepQ-ViT": {"recipe": "repq-vit"},
    "RepQ-ViT + QwT": {"recipe": "repq-vit", "compensation": "qwt"},
    "best": {"recipe": "best"},
}
TOWERS = ("image", "text")


def write_pairs(files: Path) -> str:
    """The demo's validation folder as a shard of images with all their captions."""
    names = (files / "classnames.txt").read_text().splitlines()
    templates = (files / "templates.txt").read_text().splitlines()
    shard = files / "pairs.tar"
    with tarfile.open(shard, "w") as tar:
        for folder in sorted((files / "val").iterdir()):
            for path in sorted(folder.iterdir()):
                captions = [template.format(names[int(folder.name)]) for template in templates]
                text = "\n".join(captions).encode()
                for suffix, content in (("png", path.read_bytes()), ("txt", text)):
                    info = tarfile.TarInfo(f"{folder.name}-{path.stem}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(shard)


def rows_of(method: str, bits: int, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a side: both quantized, quantized queries, FP32 queries."""
    sides = {"quantized, quantized": metrics["quantized"]}
    sides["quantized, FP32"], sides["FP32, quantized"] = (
        metrics["cross_precision"][side] for side in CROSS_SIDES
    )
    return [row(method, f"{bits}/{bits}", side, found) for side, found in sides.items()]


def row(method: str, bits: str, side: str, found: dict[str, Any]) -> dict[str, Any]:
    short = {"image_retrieval_recall": "text to image", "text_retrieval_recall": "image to text"}
    figures = {}
    for key in RECALLS:
        name, k = key.split("@")
        figures[f"{short[name]} @{k} (%)"] = 100 * found[key]
    for tower in TOWERS:
        value = found.get(f"{tower}_self_recall@1")
        figures[f"{tower} finds itself (%)"] = None if value is None else 100 * value
    return {"method": method, "W/A": bits, "queries, gallery": side, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variant", default="hard")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        write_files(files, args.variant)
        spec = write_pairs(files)
        model = clip.load(str(files / "model.json"), str(files / "model.safetensors"))
        calibration = load_calibration(
            str(files / "calib-{000..003}.tar"),
            transform=model.transform,
            tokenizer=model.tokenizer,
            samples=512,
            batch_size=128,
            seed=args.seed,
        )
        graphs = capture_towers(model, {})

        def embed(name: str, towers: Any) -> PairFeatures:
            reader = RetrievalReader(spec, model.transform, model.tokenizer, 128)
            return pair_features(reader, {name: towers})

        exact = embed("fp32", graphs)
        rows = [row("FP32", "", "FP32, FP32", retrieval_metrics(exact, ())["fp32"])]
        document = vars(args) | {"machine": machine(), "data": exact.counts(), "rows": rows}
        for bits in args.bits:
            for method, options in METHODS.items():
                begun = time.perf_counter()
                config = QuantConfig.from_dict({"w_bits": bits, "a_bits": bits, **options})
                made = quantize_towers(model, graphs, calibration.batches, config, TOWERS, SCREEN)
                found = embed("quantized", made.towers)
                both = PairFeatures(
                    exact.image | found.image, exact.text | found.text, exact.owner, exact.first, 0
                )
                metrics = retrieval_metrics(both, TOWERS)
                rows += rows_of(method, bits, metrics)
                took = time.perf_counter() - begun
                print(f"{method} {bits}/{bits}: {took:.0f} s", file=sys.stderr)
                write_results(f"retrieval_{args.variant}", document)  # what is done stays
    print(json.dumps(document["data"]))
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    print(f"wrote {RESULTS}/retrieval_{args.variant}.json")


if __name__ == "__main__":
    main()
