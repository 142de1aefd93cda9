"""What `reparameterize` is worth to torchao's PT2E: SQNR of a random tower with and without it.

usage: python benchmarks/pt2e.py [--bits 8 6 4] [--layers 4] [--width 32]

The norms' channels differ as exp(N(0, 1)) (tests/toys.py); two calibration batches, other inputs judge.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.pt2e.quantizer import QwTQuantizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from toys import Tower, randomize, tokens


def sqnr(wanted: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def with_pt2e(gm: GraphModule, quantizer: QwTQuantizer, batches: list[Tensor]) -> GraphModule:
    prepared = prepare_pt2e(copy.deepcopy(gm), quantizer)
    for x in batches:
        prepared(x)
    return convert_pt2e(prepared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args()
    model = randomize(Tower(args.layers, args.width))
    batches = [tokens(16, 9, args.width, seed=seed) for seed in (1, 2)]
    unseen = tokens(64, 9, args.width, seed=3)
    captured = qwt_fx.capture(model, (batches[0],))
    rows = []
    with torch.no_grad():
        wanted = model(unseen)
        for bits in args.bits:
            row: list[object] = [f"{bits}/{bits}"]
            config = QuantConfig(w_bits=bits, a_bits=bits, recipe="repq-vit")
            floating = qwt_fx.reparameterize(captured, batches, config)
            for gm in (captured, floating):
                for ranges in ("minmax", "histogram"):
                    quantizer = QwTQuantizer(config, ranges=ranges)
                    row.append(sqnr(wanted, with_pt2e(gm, quantizer, batches)(unseen)))
            for recipe in ("repq-vit", "best"):
                q = qwt_fx.quantize(captured, (batches[0],), batches, config.replace(recipe=recipe))
                row.append(sqnr(wanted, q(unseen)))
            rows.append(row)
    headers = ("W/A", "PT2E minmax", "histogram", "reparameterized minmax", "histogram")
    print(tabulate(rows, (*headers, "repq-vit", "best"), tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
