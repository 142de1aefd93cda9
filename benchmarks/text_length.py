"""Time of a text tower on captions cut to the longest of the batch, against whole contexts.

The same graph on the same captions, both sides in turn in one run: the demo's tower and one of
ViT-B/32's size with random weights, in floating point and quantized (q/dq, eager). The outputs are
compared as well.

    python benchmarks/text_length.py [--threads 2] [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import open_clip
import torch
from common import machine, write_results
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.clip.towers import TextTower
from qwt_fx.config.config import QuantConfig
from qwt_fx.demo.assets import demo_config, demo_state_dict
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.text.text_length import trim


def demo_tower() -> tuple[TextTower, int, int]:
    """The demo's text tower, its vocabulary and its context."""
    config = demo_config()
    model = open_clip.CLIP(**config)
    model.load_state_dict(demo_state_dict("hard"))
    text = config["text_cfg"]
    return TextTower(model.eval()), text["vocab_size"], text["context_length"]


def large_tower() -> tuple[TextTower, int, int]:
    """The text tower of ViT-B/32 with random weights."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    torch.manual_seed(0)
    return TextTower(open_clip.CLIP(512, vision, text, quick_gelu=True).eval()), 49408, 77


TOWERS = {"demo": demo_tower, "ViT-B/32, random": large_tower}


def captions(batch: int, length: int, vocabulary: int, context: int, seed: int = 0) -> Tensor:
    """Captions (batch, context) of `length` ids, start and end included."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(batch, context, dtype=torch.int64)
    words = torch.randint(1, vocabulary - 2, (batch, length), generator=generator)
    ids[:, :length] = words
    ids[:, 0], ids[:, length - 1] = vocabulary - 2, vocabulary - 1
    return ids


@torch.no_grad()
def compare(gm: GraphModule, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Median milliseconds of both sides, run in turn; the cut is part of its side's time."""
    sides = {"whole": lambda: gm(ids), "trimmed": lambda: gm(trim(gm, ids))}
    for side in sides.values():
        side()
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            times[name].append(1e3 * (time.perf_counter() - begun))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "context": ids.shape[1], "trimmed to": trim(gm, ids).shape[1], "whole (ms)": median["whole"],
        "trimmed (ms)": median["trimmed"], "faster": median["whole"] / median["trimmed"],
        "SQNR (dB)": sqnr_db(gm(ids), gm(trim(gm, ids))),
    }  # fmt: skip


def main() -> None:
    """Print the table and write results/text_length.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.towers:
        tower, vocabulary, context = TOWERS[name]()
        graph = api.capture(tower, (captions(2, context, vocabulary, context),))
        lengths = [context // 4, context // 2, context]
        batches = [captions(4, n, vocabulary, context, seed=n) for n in lengths]
        # The quickest recipe to calibrate: how ranges are found does not change what is timed.
        config = QuantConfig(8, 8, recipe="repq-vit")
        quantized = api.lower(api.quantize(graph, (batches[0],), batches, config), "eager")
        for kind, gm in (("FP32", graph), ("W8A8 q/dq", quantized)):
            for batch in args.batch_sizes:
                ids = captions(batch, args.tokens, vocabulary, context, seed=1)
                row = {"tower": name, "graph": kind, "batch": batch}
                rows.append(row | compare(gm, ids, args.repeats))
                print(rows[-1], flush=True)
    document = vars(args) | {"machine": machine(), "rows": rows}
    write_results("text_length", document)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
