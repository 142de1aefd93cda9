"""Embedding SQNR of ViT-B/32 at real size with random weights, where no trained ones can be had.

(a) severe channel variation, as tests/golden/README.md describes: RepQ-ViT undoes it.
(b) besides, an outlier that it does not undo: at text position 0 and the class token 1 % of the channels
are multiplied by 50 behind every ln_1, and no weight makes up for it.

How far a model itself amplifies errors is shown in floating point: white noise, as many dB below what
each block adds to the stream (`--noise`), behind every block.

usage: python benchmarks/real_size.py [--samples 128] [--layers 12] [--bits 6/6 4/4]
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import open_clip
import torch
from common import kept_results, machine, write_results
from open_clip.transformer import ResidualAttentionBlock
from tabulate import tabulate
from torch import Tensor, nn

from qwt_fx import api
from qwt_fx.clip.clip import ImageTower, TextTower
from qwt_fx.config.config import QuantConfig
from qwt_fx.measure.measure import sqnr_db

PUBLISHED = {"recipe": "repq-vit", "compat": "original"}
ROWS: dict[str, dict[str, Any]] = {
    "original + QwT": {**PUBLISHED, "compensation": "qwt"},
    "best": {},
    "best, only activations": {"w_bits": 32},
    "best, only weights": {"a_bits": 32},
}
START, END = 49406, 49407


class OutlierToken(nn.Module):
    """A norm behind which some channels of position 0 are far too large."""

    def __init__(self, norm: nn.LayerNorm, length: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = norm
        width = len(norm.weight)
        factor = torch.ones(length, width)
        chosen = torch.randperm(width, generator=generator)[: max(1, round(0.01 * width))]
        factor[0, chosen] = 50.0
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.factor


def vary_channels(norm: nn.LayerNorm, linear: Tensor, generator: torch.Generator) -> None:
    """Channel scales exp(N(0, 1)), 1 % of them x20, undone in the columns of the linear."""
    width = len(norm.weight)
    scale = torch.exp(torch.randn(width, generator=generator))
    scale[torch.randperm(width, generator=generator)[: max(1, round(0.01 * width))]] *= 20.0
    norm.weight.mul_(scale)
    norm.bias.mul_(scale)
    linear.div_(scale)


@torch.no_grad()
def build(layers: int, outlier: bool, seed: int) -> dict[str, nn.Module]:
    """Both towers of a ViT-B/32 with random weights, made hard."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vision = {"image_size": 224, "layers": layers, "width": 768, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": layers}
    model = open_clip.CLIP(512, vision, text, quick_gelu=True).eval()
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "resblocks" in name and value.dim() == 2:
            value.copy_(noise * 0.7 / math.sqrt(value.shape[1]))
        elif name.endswith("bias"):
            value.copy_(noise * (0.2 if "ln_" in name else 0.1))
    for blocks, length in (
        (model.visual.transformer.resblocks, 50),
        (model.transformer.resblocks, 77),
    ):
        for block in blocks:
            vary_channels(block.ln_1, block.attn.in_proj_weight, generator)
            vary_channels(block.ln_2, block.mlp.c_fc.weight, generator)
            if outlier:
                block.ln_1 = OutlierToken(block.ln_1, length, generator)
    return {"image": ImageTower(model), "text": TextTower(model)}


@torch.no_grad()
def with_noise(model: nn.Module, test: Tensor, level: float) -> Tensor:
    """The output in floating point with noise `level` dB below what each block adds, behind it."""
    generator = torch.Generator().manual_seed(0)

    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        size = (output - inputs[0]).square().mean(dim=-1, keepdim=True).sqrt()
        noise = torch.randn(output.shape, generator=generator)
        return output + noise * size * 10.0 ** (-level / 20.0)

    blocks = [m for m in model.modules() if isinstance(m, ResidualAttentionBlock)]
    hooks = [block.register_forward_hook(add) for block in blocks]
    noisy: Tensor = model(test)
    for hook in hooks:
        hook.remove()
    return noisy


def inputs(tower: str, count: int, generator: torch.Generator) -> Tensor:
    """Seeded noise images, or captions of 5 to 30 random words."""
    if tower == "image":
        return torch.randn(count, 3, 224, 224, generator=generator)
    ids = torch.zeros(count, 77, dtype=torch.int64)
    ids[:, 0] = START
    for row in ids:
        words = int(torch.randint(5, 30, (1,), generator=generator))
        row[1 : words + 1] = torch.randint(1, 49000, (words,), generator=generator)
        row[words + 1] = END
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--bits", nargs="+", default=["6/6", "4/4"])
    parser.add_argument("--towers", nargs="+", default=["image", "text"])
    parser.add_argument("--models", nargs="+", default=["a", "b"], choices=("a", "b"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--noise", type=float, nargs="*", default=[30.0], help="dB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="real_size", help="results/NAME.json")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that results/NAME.json has"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = kept_results(args.name, resume=args.resume).get("rows", [])
    for tower in args.towers:
        for outlier in (letter == "b" for letter in args.models):
            generator = torch.Generator().manual_seed(args.seed + 1)
            model = build(args.layers, outlier, args.seed)[tower]
            batches = [
                inputs(tower, args.batch_size, generator)
                for _ in range(args.samples // args.batch_size)
            ]
            test = inputs(tower, 64, generator)
            graph = api.capture(model, (test[:2],))
            with torch.no_grad():
                exact = graph(test)
            for level in args.noise:
                key = {
                    "tower": tower, "model": "(b)" if outlier else "(a)", "W/A": "float",
                    "row": f"noise, {level:g} dB", "layers": args.layers, "seed": args.seed,
                }  # fmt: skip
                if not any(key.items() <= row.items() for row in rows):
                    value = sqnr_db(exact, with_noise(model, test, level))
                    rows.append(key | {"SQNR (dB)": value})
                    write_results(args.name, vars(args) | {"machine": machine(), "rows": rows})
                    print(rows[-1], flush=True)
            for bits in args.bits:
                w_bits, a_bits = (int(b) for b in bits.split("/"))
                for name in args.rows:
                    key = {
                        "tower": tower, "model": "(b)" if outlier else "(a)", "W/A": bits,
                        "row": name, "layers": args.layers, "samples": args.samples,
                        "seed": args.seed,
                    }  # fmt: skip
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    options = {"w_bits": w_bits, "a_bits": a_bits, **ROWS[name]}
                    begun = time.perf_counter()
                    prepared = api.prepare(graph, QuantConfig.from_dict(options))
                    api.calibrate(prepared, [(b,) for b in batches])
                    seconds = time.perf_counter() - begun
                    with torch.no_grad():
                        value = sqnr_db(exact, prepared(test))
                    rows.append(key | {"SQNR (dB)": value, "seconds": seconds})
                    write_results(args.name, vars(args) | {"machine": machine(), "rows": rows})
                    print(rows[-1], flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
