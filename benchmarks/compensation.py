"""Every kind of compensation on the demo CLIP: accuracy against extra multiplications and bytes.

usage: python benchmarks/compensation.py [--images 10000] [--seed 1] [--bits 8 4]

Both towers are quantized, with the recipe's own target (`best`: the floating-point path; `repq-vit`: the
block alone). QwT with the other target is added to layers that were calibrated without it.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import SCREEN, Demo, machine, open_demo, write_results
from tabulate import tabulate
from torch.fx import GraphModule, Node

from qwt_fx import api
from qwt_fx.artifact.graph_document import parse_document
from qwt_fx.artifact.graph_json import graph_to_json
from qwt_fx.artifact.graph_tensors import file_tensors
from qwt_fx.clip.clip import TOWERS
from qwt_fx.commands.quantize.pipeline import QuantizedClip
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.settings import settings_of
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER
from qwt_fx.evaluate.evaluate import compare
from qwt_fx.evaluate.metrics import mcnemar
from qwt_fx.graph.aten import CONVOLUTIONS, LINEAR, SDPA
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import compute_nodes, find_node
from qwt_fx.passes import InsertCompensation

RECIPES = ("best", "repq-vit")
OTHER = {"local": "fp", "fp": "local"}
ROWS = ("none", "qwt", "qwt, other target", "lowrank:32", "lowrank:8", "int8", "affine")


def macs(gm: GraphModule) -> int:
    """Multiply-accumulates of linears, convolutions and products of one sample."""
    total = 0
    for node in compute_nodes(gm):
        a, b = (_sizes(n) for n in node.args[:2])
        if node.target is LINEAR:
            total += math.prod(a) * b[0]
        elif node.target in CONVOLUTIONS:
            total += math.prod(_sizes(node)[2:]) * math.prod(b)
        elif node.target is SDPA:
            total += 2 * math.prod(a) * b[-2]
        else:
            total += math.prod(a) * b[-1]
    return total


def _sizes(node: Any) -> list[int]:
    """The recorded shape for a batch of one: the number of samples is the only symbol."""
    assert isinstance(node, Node)
    return [1 if isinstance(s, torch.SymInt) else s for s in node.meta["val"].shape]


def extra_macs(gm: GraphModule, reference: GraphModule) -> int:
    """Multiply-accumulates that the compensations add to one sample."""
    info = graph_info(gm)
    total = 0
    for block in graph_info(reference).blocks:
        tokens = math.prod(_sizes(find_node(reference, block.output))[:-1])
        total += tokens * int(info.compensations.get(block.name, {}).get("macs", 0))
    return total


def stored_bytes(gm: GraphModule) -> int:
    """Bytes of the tensors as an artifact stores them."""
    tensors = parse_document(graph_to_json(gm)).tensors
    return sum(t.nbytes for t in file_tensors(gm, tensors).values())


def measure(demo: Demo, recipe: str, bits: int, seed: int) -> list[dict[str, Any]]:
    """One row per compensation."""
    config = QuantConfig(bits, bits, recipe=recipe, compensation="none")
    recipes = settings_of(config.replace(compensation="qwt"))
    fitting = recipes.compensation
    assert fitting is not None  # asked for
    data = demo.calibration(512, 128, seed)
    inputs = {t: [(b[i],) for b in data.batches] for i, t in enumerate(TOWERS)}
    calibrated = {t: api.calibrate(api.prepare(demo.graphs[t], config), inputs[t]) for t in TOWERS}
    exact = demo.evaluation.classify(demo.reference)
    macs_before = sum(macs(demo.graphs[t]) for t in TOWERS)
    rows: list[dict[str, Any]] = []
    bytes_before, correct = 0, None
    for name in ROWS:
        kind, _, other = name.partition(", ")
        target = OTHER[fitting.target] if other else fitting.target
        begun = time.perf_counter()
        towers = {}
        for tower in TOWERS:
            if recipes.layers is not None and kind != "none" and not other:
                asked = config.replace(compensation=kind)
                gm = api.calibrate(api.prepare(demo.graphs[tower], asked), inputs[tower])
                towers[tower] = api.convert(gm)
                continue
            gm = copy.deepcopy(calibrated[tower])
            if kind != "none":
                InsertCompensation(
                    demo.graphs[tower],
                    inputs[tower],
                    **vars(replace(fitting, kind=kind, target=target)),
                )(gm)
            towers[tower] = api.convert(gm)
        seconds = time.perf_counter() - begun
        result = QuantizedClip(towers, TOWERS, FLOATING_CLASSIFIER)
        features = demo.evaluation.quantized(result, demo.reference, SCREEN)
        outcome = demo.evaluation.classify(features, FLOATING_CLASSIFIER)
        figures = compare(demo.reference, features, exact, outcome, TOWERS)
        size = sum(stored_bytes(gm) for gm in towers.values())
        added = sum(extra_macs(towers[t], demo.graphs[t]) for t in TOWERS)
        records = [r for t in TOWERS for r in graph_info(towers[t]).compensations.values()]
        kept = [r["r2_held_out"] for r in records if r["applied"]]
        if kind == "none":
            bytes_before, correct = size, outcome.correct1
        assert correct is not None  # "none" is the first row
        rows.append(
            {
                "W/A": f"{bits}/{bits}",
                "recipe": recipe,
                "compensation": name,
                "target": None if kind == "none" else target,
                "top-1 (%)": 100 * outcome.acc1,
                "p against none": mcnemar(correct, outcome.correct1)[2],
                "agreement (%)": 100 * figures["agreement"],
                "image SQNR (dB)": figures["embedding_sqnr_db"]["image"],
                "text SQNR (dB)": figures["embedding_sqnr_db"]["text"],
                "extra MACs (%)": 100 * added / macs_before,
                "extra bytes (%)": 100 * (size - bytes_before) / bytes_before,
                "blocks": f"{len(kept)}/{sum(len(graph_info(g).blocks) for g in towers.values())}",
                "held-out R2": sum(kept) / len(kept) if kept else None,
                "seconds": seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--variant", default="hard")
    parser.add_argument("--work", type=Path, help="keep the rendered images there")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = {k: v for k, v in vars(args).items() if k != "work"}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        demo = open_demo(args.work or Path(folder), args.variant, args.images)
        fp32 = demo.evaluation.classify(demo.reference).acc1
        for bits in args.bits:
            for recipe in RECIPES:
                rows += measure(demo, recipe, bits, args.seed)
                print(tabulate(rows, headers="keys", floatfmt=".2f"), flush=True)
    write_results("compensation", given | {"fp32_acc1": fp32, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
