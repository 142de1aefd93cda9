"""What quantized attention costs: SQNR of both towers' embeddings without and with each choice of codes.

Judged on pairs that no calibration has seen. Prints a table, writes JSON:

    python benchmarks/attention.py --output benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from common import Demo, machine, open_demo
from tabulate import tabulate

from qwt_fx import QuantConfig, api
from qwt_fx.config.config import ATTENTIONS
from qwt_fx.measure.measure import sqnr_db

SAMPLES, BATCH, IMAGES = 512, 128, 3200
UNSEEN = 12_345  # the seed of the pairs that judge


def sqnr(demo: Demo, tower: str, bits: str, attention: str, seed: int) -> float:
    """SQNR in dB of one tower's embeddings."""
    w_bits, a_bits = (int(b) for b in bits.split("/"))
    index = 0 if tower == "image" else 1
    drawn = demo.calibration(SAMPLES, BATCH, seed)
    judges = demo.calibration(2 * BATCH, BATCH, UNSEEN)
    config = QuantConfig(w_bits=w_bits, a_bits=a_bits, attention=attention)
    prepared = api.prepare(demo.graphs[tower], config)
    api.calibrate(prepared, [(batch[index],) for batch in drawn.batches])
    with torch.no_grad():
        exact, ours = (
            torch.cat([graph(batch[index]) for batch in judges.batches])
            for graph in (demo.graphs[tower], prepared)
        )
    return sqnr_db(exact, ours)


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/4"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        demo = open_demo(Path(work), "hard", IMAGES)
        for bits in args.bits:
            for attention in ATTENTIONS:
                row: dict[str, object] = {"W/A": bits, "attention": attention}
                for tower in demo.graphs:
                    found = [sqnr(demo, tower, bits, attention, s) for s in range(args.seeds)]
                    row[f"{tower} (dB)"] = round(statistics.mean(found), 1)
                rows.append(row)
                print(row, flush=True)
    print(tabulate(rows, headers="keys"))
    if args.output:
        what = {"samples": SAMPLES, "seeds": args.seeds, "machine": machine(), "rows": rows}
        args.output.write_text(json.dumps(what, indent=1) + "\n")


if __name__ == "__main__":
    main()
