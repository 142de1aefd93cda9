"""Bytes on the disk of ViT-B/32 with random weights, both towers, against FP32.

The sizes do not depend on the weights' values. FP32 is every parameter in 4 bytes, buffers left out.
The artifact is everything `qwt_fx.save` writes: weights, embedding tables, scales, graph, digests.

usage: python benchmarks/size.py [--bits 8/8 4/8 4/4] [--samples 8] [--compensation auto] [--threads 2]
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
from qwt_fx.config.config import QuantConfig


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/8", "4/4"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--compensation", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    towers = build()
    for bits in args.bits:
        weight, activation = (int(b) for b in bits.split("/"))
        config = QuantConfig(w_bits=weight, a_bits=activation, compensation=args.compensation)
        total = {"FP32": 0, "artifact": 0}
        for tower, module in towers.items():
            batch = inputs(tower, args.samples, seed=1)
            half = args.samples // 2
            quantized = api.quantize(module, (batch[:2],), [batch[:half], batch[half:]], config)
            with TemporaryDirectory() as folder:
                api.save(quantized, Path(folder) / "a")
                stored = folder_bytes(Path(folder) / "a")
            exact = sum(4 * p.numel() for p in module.parameters())
            total["FP32"] += exact
            total["artifact"] += stored
            rows.append({"W/A": bits, "tower": tower, "FP32": exact, "artifact": stored})
        rows.append({"W/A": bits, "tower": "both", **total})
    for row in rows:
        row["ratio"] = row["FP32"] / row["artifact"]
    write_results("size", vars(args) | {"machine": machine(), "rows": rows})
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
