"""What several processes send each other: counted in a run, and by docs/distributed.md's model.

Each row is one `torchrun ... -m qwt_fx quantize --recipe best --qwt` of a random CLIP on this machine.
`--on-paper` prints the model's figures for real CLIPs instead.

usage: python benchmarks/distributed.py [--ranks 2] [--sizes small larger] [--on-paper]
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, write_results
from PIL import Image
from safetensors.torch import save_file
from tabulate import tabulate

BINS, CHUNK, HELD_OUT, PER_INPUT = 2049, 4096, 0.2, 4


@dataclass(frozen=True)
class Tower:
    """Width, MLP width, blocks, tokens a sample, inputs of the patches: what decides the bytes."""

    width: int
    mlp: int
    blocks: int
    tokens: int
    patch: int = 0

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a block's linears."""
        d, m = self.width, self.mlp
        return [(d, 3 * d), (d, d), (d, m), (m, d)]


def parts(rows: float) -> int:
    """Chunks of the rows that fit, and of those that judge."""
    return math.ceil((1 - HELD_OUT) * rows / CHUNK) + math.ceil(HELD_OUT * rows / CHUNK)


def sums(inputs: int, outputs: int, rows: float, batches: int) -> float:
    """Bytes of one batch's sums for one layer."""
    if inputs > outputs:
        rows = min(rows, math.ceil(max(PER_INPUT * inputs, CHUNK) / batches))
    one = (inputs**2 + inputs * outputs) * 4 + (inputs + outputs) * 8 + 16
    return parts(rows) * one


def to_first(tower: Tower, samples: int, batches: int, *, qwt: bool) -> dict[str, float]:
    """Bytes that a batch of another rank sends to the first one, by kind."""
    rows, d = samples * tower.tokens, tower.width
    grams = tower.blocks * sum(sums(i, o, rows, batches) for i, o in tower.layers)
    if tower.patch:
        grams += sums(tower.patch, d, rows, batches)
    channels = sum(i for i, _ in tower.layers)
    fits = 2 * ((d + 1) ** 2 + (d + 1) * d) * 8 if qwt else 0
    return {
        "histograms": tower.blocks * channels * (BINS * 4 + 24),
        "sums": grams,
        "compensation": tower.blocks * fits,
    }


def from_first(tower: Tower, *, qwt: bool) -> float:
    """Bytes of new weights and scales that the first rank sends to each other one."""
    each = sum((i * o + o) * 4 + 2 * o * 4 + 2 * i * 8 for i, o in tower.layers)
    patch = tower.patch * tower.width * 4
    return tower.blocks * (each + (tower.width**2 * 8 if qwt else 0)) + patch


def predicted(
    towers: list[Tower],
    pixels: int,
    context: int,
    samples: int,
    batch: int,
    ranks: int,
    *,
    qwt: bool,
) -> dict[str, float]:
    """Bytes on the wire of a whole calibration, by kind."""
    batches = math.ceil(samples / batch)
    sizes = [min(batch, samples - n * batch) for n in range(batches)]
    remote = [size for n, size in enumerate(sizes) if n % ranks]
    found = {"samples": sum(s * (pixels * 4 + context * 8) for s in remote)}
    for tower in towers:
        for size in remote:
            for kind, value in to_first(tower, size, batches, qwt=qwt).items():
                found[kind] = found.get(kind, 0) + value
    found["weights"] = (ranks - 1) * sum(from_first(t, qwt=qwt) for t in towers)
    return found


# (image height, width; patch; width; blocks) and (context; width; blocks); heads of 8
SIZES: dict[str, Any] = {
    "small": {"image": (16, 24, 8, 32, 2), "text": (12, 24, 2), "samples": 24, "batch": 8},
    "larger": {"image": (32, 32, 4, 64, 4), "text": (32, 64, 3), "samples": 192, "batch": 64},
}


def model_config(size: dict[str, Any]) -> dict[str, Any]:
    """An open_clip configuration."""
    height, width, patch, d, blocks = size["image"]
    context, text, text_blocks = size["text"]
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": [height, width], "layers": blocks, "width": d, "head_width": 8,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": context, "vocab_size": 49408, "width": text, "heads": text // 8,
            "layers": text_blocks,
        },
    }  # fmt: skip


def write_files(folder: Path, size: dict[str, Any]) -> None:
    """A random CLIP and a csv of noise images with captions as long as the context."""
    import open_clip

    config = model_config(size)
    (folder / "model.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "model.safetensors")
    height, width = size["image"][:2]
    lines = ["filepath\ttitle"]
    words = " ".join(["word"] * size["text"][0])
    for n in range(size["samples"]):
        values = np.random.default_rng(n).integers(0, 255, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        (folder / f"{n}.png").write_bytes(buffer.getvalue())
        lines.append(f"{folder / f'{n}.png'}\t{words}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")


def measured(size: dict[str, Any], ranks: int) -> int:
    """Bytes that a run counts itself."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, size)
        words = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={ranks}", "-m", "qwt_fx", "quantize", "--quiet", "--qwt"),
            *("--model", str(folder / "model.json")),
            *("--pretrained", str(folder / "model.safetensors")),
            *("--train-data", str(folder / "pairs.csv"), "--dataset-type", "csv"),
            *("--calib-samples", str(size["samples"]), "--batch-size", str(size["batch"])),
            *("--device", "cpu", "--output", str(folder / "out")),
        ]
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        report = json.loads((folder / "out" / "report.json").read_text())
        return int(report["processes"]["wire_bytes"])


def towers_of(size: dict[str, Any]) -> list[Tower]:
    """The two towers of a size."""
    height, width, patch, d, blocks = size["image"]
    context, text, text_blocks = size["text"]
    tokens = (height // patch) * (width // patch) + 1
    return [
        Tower(d, 4 * d, blocks, tokens, 3 * patch * patch),
        Tower(text, 4 * text, text_blocks, context - 1),  # the start token is a constant
    ]


# towers, ranks, samples, batch
PAPER = {
    "ViT-B/32, 2 ranks": ([Tower(768, 3072, 12, 50, 3072), Tower(512, 2048, 12, 20)], 2, 512, 128),
    "ViT-L/14, 4 ranks": ([Tower(1024, 4096, 24, 257, 588), Tower(768, 3072, 12, 20)], 4, 512, 64),
    "ViT-bigG/14, 8 ranks": (
        [Tower(1664, 8192, 48, 257, 588), Tower(1280, 5120, 32, 20)], 8, 512, 64,
    ),
}  # fmt: skip


def on_paper() -> list[dict[str, Any]]:
    """The model's figures for real CLIPs, `best` without compensation, in GB."""
    rows = []
    for name, (towers, ranks, samples, batch) in PAPER.items():
        found = predicted(towers, 3 * 224 * 224, 77, samples, batch, ranks, qwt=False)
        gigabytes = {kind: value / 1e9 for kind, value in found.items()}
        rows.append({"what": name} | gigabytes | {"total": sum(gigabytes.values())})
    return rows


def main() -> None:
    """Run, compare, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--on-paper", action="store_true")
    args = parser.parse_args()
    rows = on_paper()
    if not args.on_paper:
        document = {"machine": machine(), "ranks": args.ranks, "on_paper": rows}
        rows = []
        for name in args.sizes:
            size = SIZES[name]
            height, width = size["image"][:2]
            found = predicted(
                towers_of(size), 3 * height * width, size["text"][0], size["samples"], size["batch"],
                args.ranks, qwt=True,
            )  # fmt: skip
            total, counted = sum(found.values()), measured(size, args.ranks)
            rows.append(
                {"what": name, "model": total, "counted": counted, "ratio": counted / total}
            )
        document["wire_bytes"] = rows
        write_results("distributed", document)
    print(tabulate(rows, headers="keys", floatfmt=".3f"))


if __name__ == "__main__":
    main()
