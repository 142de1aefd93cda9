"""Image tower of ViT-B/32 with random weights on one GPU: int8 products against bf16, in one run.

Every row is compiled with mode="max-autotune" (CUDA graphs included). Medians of --repeats runs after
warm-up; parity is SQNR against the q/dq graph in float32.

usage: python benchmarks/cuda_latency.py [--batch-sizes 1 16 256] [--repeats 30]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from common import machine, write_results
from tabulate import tabulate
from torch import Tensor, nn

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends import backend_for
from qwt_fx.clip.clip import ImageTower
from qwt_fx.measure.kernel_audit import refuse_if_float
from qwt_fx.measure.measure import sqnr_db

WARM_UP = 5
VARIANTS = {
    f"int8, {gemm}, {precision}": {"gemm": gemm, "precision": precision}
    for gemm in ("triton", "int_mm")
    for precision in ("fp16", "bf16")
}


def tower(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(512, vision, text, quick_gelu=True)
    return ImageTower(model).eval().requires_grad_(False)


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed)).cuda()


def median_ms(function: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> float:
    """Milliseconds of one call, from events on the GPU's own clock."""
    for _ in range(WARM_UP):
        function(x)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(x)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, mode="max-autotune", dynamic=False, fullgraph=True)  # type: ignore[no-any-return]


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = tower(args.seed)
    batch = images(args.calib_samples, args.seed + 1).cpu()
    config = QuantConfig(w_bits=8, a_bits=8, recipe=args.recipe)
    quantized = qwt_fx.quantize(model, (batch[:2],), [batch], config).cuda()
    model = model.cuda()
    candidates: dict[str, nn.Module] = {"bf16": tower(args.seed).to("cuda", torch.bfloat16)}
    for name, options in VARIANTS.items():
        backend = backend_for("cuda", **options)
        candidates[name] = backend.lower(quantized)
        refuse_if_float(backend.audit(candidates[name]), name)
    rows: list[dict[str, Any]] = []
    for count in args.batch_sizes:
        x = images(count, args.seed + 2)
        exact, eager = model(x), quantized(x)
        baseline = None
        for name, candidate in candidates.items():
            function = compiled(candidate)
            got = function(x).float()
            ms = median_ms(function, x, args.repeats)
            baseline = ms if baseline is None else baseline  # the first candidate is bf16
            parity = sqnr_db(exact if name == "bf16" else eager, got)
            rows.append(
                {
                    "batch": count, "candidate": name, "ms": ms, "images/s": 1e3 * count / ms,
                    "times bf16": baseline / ms, "SQNR (dB)": parity,
                }
            )  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--calib-samples", type=int, default=32)
    parser.add_argument("--recipe", default="best", choices=["best", "repq-vit"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="cuda_latency", help="results/NAME.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("cuda_latency: needs a CUDA device, and this machine has none", file=sys.stderr)
        return 2
    rows = measure(args)
    card = {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    write_results(args.name, vars(args) | {"machine": machine() | card, "rows": rows})
    print(card["card"])
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
