"""Time and memory of calibration, against a forward pass and against the published procedure.

Each row is a process of its own: CPU and wall seconds by phase, peak memory above the model's weights.
`best` compensates nothing unless told to; `RECIPE+qwt` is a recipe with QwT.

usage: python benchmarks/calibration.py [--samples 512] [--threads 2] [--growth]
           [--recipes repq-vit+qwt best best+qwt] [--memory-budget 200MB] [--skip-plain] [--resume]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
from common import kept_results, machine, write_results
from plain.published import ImageTower as PlainTower
from tabulate import tabulate
from torch import Tensor

from qwt_fx import api
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.clip.clip import ImageTower, TextTower
from qwt_fx.config.config import QuantConfig
from qwt_fx.passes import FoldChannelWise, ReparameterizeLayerNorm
from qwt_fx.quant.fake_quant import FakeQuant

BATCH = 32
START, END = 49406, 49407


def model_of(name: str, layers: int | None) -> Any:
    """An open_clip model with seeded random weights, nothing downloaded."""
    config = open_clip.get_model_config(name)
    if layers is not None:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    torch.manual_seed(0)
    return open_clip.CLIP(**config, quick_gelu=True).eval().requires_grad_(False)


def inputs(model: Any, tower: str, count: int) -> list[Tensor]:
    """Seeded noise images, or captions of 5 to 30 random words, in batches."""
    generator = torch.Generator().manual_seed(1)
    if tower == "image":
        size = model.visual.image_size
        every = torch.randn(count, 3, *size, generator=generator)
    else:
        every = torch.zeros(count, model.context_length, dtype=torch.int64)
        every[:, 0] = START
        for row in every:
            words = int(torch.randint(5, 30, (1,), generator=generator))
            row[1 : words + 1] = torch.randint(1, 49000, (words,), generator=generator)
            row[words + 1] = END
    return list(every.split(BATCH))


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Wall and CPU seconds, and the peak's growth, since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu, self.peak = time.perf_counter(), time.process_time(), peak_bytes()

    def read(self) -> dict[str, float]:
        """What passed since."""
        return {
            "wall": time.perf_counter() - self.wall,
            "cpu": time.process_time() - self.cpu,
            "peak_mb": max(peak_bytes() - self.peak, 0) / 1e6,
        }


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    """One forward pass over the samples and one calibration of each tower, in this process."""
    model = model_of(args.model, args.layers)
    found: dict[str, Any] = {"floor": {}, "job": {}, "phases": {}}
    towers = {"image": ImageTower(model), "text": TextTower(model)}
    for tower in args.towers:
        batches = inputs(model, tower, args.samples)
        graph = api.capture(towers[tower], (batches[0][:2],))
        with torch.no_grad():
            graph(batches[0])  # warm-up
            watch = Watch()
            for batch in batches:
                graph(batch)
        found["floor"][tower] = watch.read()
        seconds: dict[str, float] = {}
        watch = Watch()
        recipe, _, compensation = args.recipe.partition("+")
        config = QuantConfig(6, 6, recipe, compensation=compensation or "auto")
        prepared = api.prepare(graph, config)
        api.convert(
            api.calibrate(prepared, batches, seconds=seconds, memory_budget=args.memory_budget)
        )
        found["job"][tower] = watch.read()
        found["phases"][tower] = seconds
    return found


@contextmanager
def clocked_observers() -> Iterator[list[float]]:
    """CPU seconds that observers take, one entry a tensor observed."""
    seconds: list[float] = []
    observe = FakeQuant.observe

    def timed(self: FakeQuant, x: Tensor) -> None:
        begun = time.process_time()
        observe(self, x)
        seconds.append(time.process_time() - begun)

    with mock.patch.object(FakeQuant, "observe", timed):
        yield seconds


def run_search(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of range search and statistics of `repq-vit`, and of the whole job.

    Clocked on their own, as the published procedure's are: the difference of two forward passes is
    as uncertain as what is looked for is long.
    """
    model = model_of(args.model, args.layers)
    batches = inputs(model, "image", args.samples)
    graph = api.capture(ImageTower(model), (batches[0][:2],))
    everything = torch.cat(batches)
    config = QuantConfig(w_bits=6, a_bits=6, recipe="repq-vit", compensation="qwt")
    with torch.no_grad(), clocked_observers() as seconds:
        graph(everything)
        prepared = api.prepare(graph, config)
        observe(prepared, [everything])
        searched = sum(seconds)  # the next passes search weights again: their watch has it
        watch = Watch()
        ReparameterizeLayerNorm()(prepared)
        FoldChannelWise()(prepared)
        moving = watch.read()["cpu"]
    watch = Watch()
    api.convert(api.calibrate(api.prepare(graph, config), [everything]))
    return {"search": searched + moving, "total": watch.read()["cpu"]}


def run_plain(args: argparse.Namespace) -> dict[str, Any]:
    """The published procedure, plainly, on the image tower."""
    model = model_of(args.model, args.layers)
    tower = PlainTower(model.visual, 6)
    batches = inputs(model, "image", args.samples)
    watch = Watch()
    tower.quantize(torch.cat(batches), args.samples)
    return {"search": tower.clock.search, "total": watch.read()["cpu"]}


RUNS = {"ours": run_ours, "search": run_search, "plain": run_plain}


def child(run: str, args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """The figures of one run in a process of its own."""
    values = vars(args) | changes
    words = [sys.executable, str(Path(__file__)), "--run", run]
    for name in ("model", "samples", "layers", "threads", "recipe", "memory_budget"):
        if values[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(values[name])]
    words += ["--towers", *values["towers"]]
    print(" ".join(words[2:]), file=sys.stderr, flush=True)
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def against_floor(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """One row: the whole job of both towers as a multiple of a forward pass of both."""
    found = child("ours", args, **changes)
    floor = sum(v["wall"] for v in found["floor"].values())
    job = sum(v["wall"] for v in found["job"].values())
    values = vars(args) | changes
    return {
        "model": values["model"],
        "layers": values["layers"] or "as is",
        "recipe": values["recipe"],
        "samples": values["samples"],
        "forward (s)": floor,
        "job (s)": job,
        "job / forward": job / floor,
        "CPU (s)": sum(v["cpu"] for v in found["job"].values()),
        "peak above weights (MB)": max(v["peak_mb"] for v in found["job"].values()),
        **{f"{t} {p} (s)": s for t, phases in found["phases"].items() for p, s in phases.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", choices=tuple(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", default="best", help=argparse.SUPPRESS)
    parser.add_argument("--memory-budget", metavar="SIZE", help="of activations, such as 200MB")
    parser.add_argument("--recipes", nargs="*", default=["repq-vit+qwt", "best", "best+qwt"])
    parser.add_argument("--towers", nargs="+", default=["image", "text"])
    parser.add_argument("--growth", action="store_true", help="over samples, depth and width too")
    parser.add_argument("--skip-plain", action="store_true")
    parser.add_argument("--plain-samples", type=int, default=128)
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that results/NAME.json has"
    )
    parser.add_argument("--name", default="calibration", help="results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run is not None:
        print(json.dumps(RUNS[args.run](args)))
        return
    document: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "run"}
    kept = kept_results(args.name, resume=args.resume)
    document |= {"machine": machine(), "rows": kept.get("rows", [])}
    changes: list[dict[str, Any]] = [{"recipe": r} for r in args.recipes]
    if args.growth:
        changes += [{"samples": n, "recipe": "best"} for n in (64, 128, 256) if n < args.samples]
        changes += [{"layers": n, "samples": 64, "recipe": "best"} for n in (3, 6)]
        changes += [{"model": "ViT-L-14", "layers": 3, "samples": 64, "recipe": "best"}]
    for change in changes:
        document["rows"].append(against_floor(args, **change))
        write_results(args.name, document)
    print(tabulate(document["rows"], headers="keys", floatfmt=".2f"))
    if not args.skip_plain:
        one = {"threads": 1, "samples": args.plain_samples}
        plain, ours = child("plain", args, **one), child("search", args, **one)
        compared = [
            {
                "CPU seconds, 1 thread": what,
                "published, plainly": plain[key],
                "repq-vit": ours[key],
                "ratio": plain[key] / ours[key],
            }
            for what, key in (("range search, statistics", "search"), ("whole job", "total"))
        ]
        document["published"] = compared
        write_results(args.name, document)
        print(tabulate(compared, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
