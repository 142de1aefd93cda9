"""`qwt-fx bench`: latency, throughput and kernels of an artifact's towers in several runtimes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qwt_fx.artifact.artifact import Artifact, read_artifact
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import write_text_atomic
from qwt_fx.backends.runtimes import INTEGER, Prepared, Source, runtime_for
from qwt_fx.clip import clip
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.arguments import add_common, add_model, positive
from qwt_fx.commands.inputs import check_flags, load_model, require_same_inputs
from qwt_fx.commands.screen import Screen, megabytes
from qwt_fx.errors import ConfigError
from qwt_fx.inspect.report import SCHEMA, peak_rss_bytes
from qwt_fx.measure.floating import floating_graph
from qwt_fx.measure.kernel_audit import refuse_if_float
from qwt_fx.measure.machine import memory_of, processor
from qwt_fx.measure.timing import interleaved
from qwt_fx.version import __version__

DEFAULT_RUNTIMES = "fp32-eager,fp32-compile,eager,x86"
YARDSTICK = "fp32-compile"  # what speedups are against
WARM_UP = 3
NAME, HELP = "bench", "latency and kernels of an artifact in several runtimes"
EXAMPLE = """\
example:
  qwt-fx bench --artifact vit-b-32-w8a8 --runtime fp32-compile,x86 --batch-sizes 1,16 --threads 2

An artifact holds no FP32 model. The floating-point runtimes run the model of --model, or without one
the artifact's own graph with its weights dequantized: the same products, and those of the compensation.
"""
HEADERS = (
    "tower", "batch", "runtime", "floats in", "median ms", "p90 ms", "samples/s", f"x {YARDSTICK}",
    "weights MB", "run MB", "integer layers",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to its parser."""
    parser.add_argument("--artifact", metavar="DIR", required=True, help="what quantize wrote")
    add_model(parser)
    parser.add_argument(
        "--runtime", default=DEFAULT_RUNTIMES, metavar="R[,R...]", help=f"default {DEFAULT_RUNTIMES}"
    )  # fmt: skip
    parser.add_argument("--batch-sizes", type=_sizes, default=[1, 16], metavar="1,16")
    parser.add_argument("--tower", choices=(*TOWERS, "both"), default="both")
    parser.add_argument(
        "--rounds", type=positive, default=15, metavar="N", help="timed calls (default 15)"
    )
    parser.add_argument("--report", metavar="FILE", help="write the figures here, as JSON")
    add_common(parser)


def _sizes(text: str) -> list[int]:
    try:
        return [positive(word) for word in text.split(",")]
    except argparse.ArgumentTypeError as error:
        reason = f"{error}; sizes are joined by commas, such as 1,16"
        raise argparse.ArgumentTypeError(reason) from None


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    names = list(dict.fromkeys(args.runtime.split(",")))
    for name in names:
        runtime_for(name)  # an unknown one is found before any work
    if args.device not in ("auto", "cpu"):
        raise ConfigError(f"--device: got {args.device!r}; runtimes choose theirs, leave it out")
    check_flags(args)
    screen = Screen(args.quiet)
    artifact = read_artifact(Path(args.artifact))
    model = clip.from_artifact(artifact)
    args.device, args.precision = "cpu", "fp32"  # what the floating-point runtimes are named for
    floating = None if args.model is None else load_model(args)
    if floating is not None:
        require_same_inputs(model, floating)
    towers = TOWERS if args.tower == "both" else (args.tower,)
    prepared = {tower: _prepare(tower, names, artifact, model, floating) for tower in towers}
    for name in (n for n in names if n in INTEGER):
        kernels = [k for tower in towers for k in prepared[tower][name].kernels]
        refuse_if_float(kernels, f"runtime {name}")
    runs = []
    for tower in towers:
        for batch in args.batch_sizes:
            runs += _measure(tower, batch, model, prepared[tower], args.rounds, screen)
    report = _report(args, names, prepared, runs)
    if args.report is not None:
        write_text_atomic(Path(args.report), json.dumps(report, indent=1, allow_nan=False) + "\n")
    _show(screen, report)


def _prepare(
    tower: str,
    names: list[str],
    artifact: Artifact,
    model: ClipModel,
    floating: ClipModel | None,
) -> dict[str, Prepared]:
    quantized = artifact.towers[tower]
    yardstick = floating_graph(quantized) if floating is None else floating.towers[tower]
    source = Source(tower, quantized, yardstick, model.example(tower))
    return {name: runtime_for(name)(source) for name in names}


def _measure(
    tower: str,
    batch: int,
    model: ClipModel,
    prepared: dict[str, Prepared],
    rounds: int,
    screen: Screen,
) -> list[JsonObject]:
    """One row a runtime, at one batch size."""
    example = model.example(tower, batch)
    with screen.phase(f"{tower}, batch {batch}: compile") as update:
        for done, one in enumerate(prepared.values()):
            one.run(example)
            update(done + 1, len(prepared))
    calls = {name: (lambda one=one: one.run(example)) for name, one in prepared.items()}
    latencies = interleaved(calls, rounds, WARM_UP)
    yardstick = latencies.get(YARDSTICK)
    return [
        {
            "tower": tower,
            "batch": batch,
            "runtime": name,
            "floats": prepared[name].floats,
            "median_seconds": latency.median,
            "p90_seconds": latency.p90,
            "samples_per_second": batch / latency.median,
            "speedup": None if yardstick is None else yardstick.median / latency.median,
            "run_bytes": memory_of(calls[name]),
            "weight_bytes": prepared[name].weight_bytes,
        }
        for name, latency in latencies.items()
    ]


def _report(
    args: argparse.Namespace,
    names: list[str],
    prepared: dict[str, dict[str, Prepared]],
    runs: list[JsonObject],
) -> JsonObject:
    return {
        "schema": SCHEMA,
        "qwt_fx": __version__,
        "torch": torch.__version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "warm_up": WARM_UP,
        "artifact": args.artifact,
        "floating_point": args.model or "the artifact's graph, weights dequantized",
        "speedup_against": YARDSTICK if YARDSTICK in names else None,
        "runs": runs,
        "layers": [
            {
                "tower": tower,
                "runtime": name,
                "name": kernel.name,
                "integer_kernel": kernel.integer,
                "kernel": kernel.kernel,
                "reason": kernel.reason,
            }
            for tower, runtimes in prepared.items()
            for name, one in runtimes.items()
            for kernel in one.kernels
        ],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _show(screen: Screen, report: JsonObject) -> None:
    counts: dict[tuple[str, str], list[bool]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for layer in report["layers"]:
        key = (layer["runtime"], layer["reason"] or layer["kernel"])
        counts.setdefault((layer["tower"], layer["runtime"]), []).append(layer["integer_kernel"])
        if layer["runtime"] in INTEGER:
            reasons.setdefault(key, []).append(layer["name"])
    rows = []
    for one in report["runs"]:
        integer = counts[one["tower"], one["runtime"]]
        speedup = one["speedup"]
        rows.append([
            one["tower"], one["batch"], one["runtime"], one["floats"],
            f"{1e3 * one['median_seconds']:.2f}", f"{1e3 * one['p90_seconds']:.2f}",
            f"{one['samples_per_second']:.1f}",
            "-" if speedup is None else f"{speedup:.2f}", megabytes(one["weight_bytes"]),
            megabytes(one["run_bytes"]), f"{sum(integer)} of {len(integer)}",
        ])  # fmt: skip
    screen.table(rows, HEADERS)
    for (runtime, what), layers in reasons.items():
        screen.note(f"{runtime}: {len(layers)} layers: {what}")
    cpu = report["processor"]
    screen.note(
        f"{report['threads']} threads of {cpu['name']}, medians of {report['rounds']} interleaved "
        f"calls after {report['warm_up']}"
    )
