"""`qwt-fx eval`: zero-shot accuracy of a model, an artifact, or both side by side."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torch import nn

from qwt_fx import api, clip
from qwt_fx.artifact import Artifact, read_artifact
from qwt_fx.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer
from qwt_fx.clip import ClipModel
from qwt_fx.commands.arguments import add_common, add_eval, add_model, natural, positive
from qwt_fx.commands.inputs import device_of, load_model, open_evaluation
from qwt_fx.commands.pipeline import TOWERS, metrics_of
from qwt_fx.commands.screen import ACCURACY_HEADERS, Screen, accuracy_rows
from qwt_fx.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.kernel_audit import LayerKernel, refuse_if_float
from qwt_fx.output import OutputDirectory, write_text_atomic
from qwt_fx.report import build_report, to_json

EXAMPLE = """\
example:
  qwt-fx eval --artifact vit-b-32-w6a6 --model ViT-B-32 --pretrained openai \\
      --imagenet-val imagenet/val --report report.json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the program."""
    parser = commands.add_parser(
        "eval",
        help="evaluate a model, an artifact, or both",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artifact", metavar="DIR", help="what quantize wrote")
    add_model(parser)
    add_eval(parser)
    parser.add_argument("--backend", default="eager", help="eager (default), x86")
    parser.add_argument("--report", metavar="FILE", help="write report.json here")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="B")
    parser.add_argument("--workers", type=natural, default=0, metavar="N")
    add_common(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.artifact is None and args.model is None:
        raise ConfigError("--artifact DIR or --model NAME is needed")
    report = _evaluate(args)
    if args.report is not None:
        write_text_atomic(Path(args.report), to_json(report))
    Screen(args.quiet).table(accuracy_rows(report), ACCURACY_HEADERS)


def run_floating(args: argparse.Namespace) -> None:
    """`quantize --choice fp32_eval`: the floating-point model alone; a report, no artifact."""
    args.artifact, args.backend, args.report = None, "eager", None
    if args.output is None:
        report = _evaluate(args)
    else:
        with OutputDirectory(Path(args.output), force=args.force) as output:
            report = _evaluate(args)
            write_text_atomic(output.path / "report.json", to_json(report))
    Screen(args.quiet).table(accuracy_rows(report), ACCURACY_HEADERS)


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    screen = Screen(args.quiet)
    artifact = None if args.artifact is None else read_artifact(Path(args.artifact))
    floating = None if args.model is None else load_model(args)
    loaded = None if artifact is None else clip.from_artifact(artifact, device=_device(args))
    model = floating or loaded
    if model is None:  # run() checked; fp32_eval needs --model
        raise ConfigError("--model is needed: an open_clip name or a config JSON")
    evaluation = open_evaluation(args, model, screen)
    if evaluation is None:
        raise ConfigError("--imagenet-val DIR is needed: class folders with images")
    reference = quantized = None
    towers: tuple[str, ...] = ()
    classifier = FLOATING_CLASSIFIER
    graphs: dict[str, Any] = {}
    kernels: dict[str, list[LayerKernel]] = {}
    if floating is not None:
        reference = evaluation.features(_towers(floating), screen, "FP32")
    if artifact is not None and loaded is not None:
        towers, classifier = _quantized_part(artifact)
        graphs = {tower: artifact.towers[tower] for tower in towers}
        lowered, kernels = _lower(artifact, towers, args.backend, loaded.device)
        quantized = evaluation.features(lowered, screen, "quantized")
    metrics = metrics_of(evaluation, reference, quantized, towers, classifier)
    elapsed = time.perf_counter() - begun
    config = None if artifact is None else QuantConfig.from_dict(artifact.config)
    return build_report(
        graphs,
        config,
        kernels,
        model=model.name,
        pretrained=model.pretrained,
        metrics=metrics,
        seconds={"evaluate": elapsed, "total": elapsed},
    )


def _device(args: argparse.Namespace) -> str:
    """Where the artifact's towers run. x86 means the CPU, also where a GPU is."""
    return "cpu" if args.backend == "x86" and args.device == "auto" else device_of(args)


def _lower(
    artifact: Artifact, quantized: tuple[str, ...], backend: str, device: str
) -> tuple[dict[str, nn.Module], dict[str, list[LayerKernel]]]:
    """Both towers as the backend runs them, and what computes each layer of the quantized ones.

    Raises `PreconditionError` where a backend of integer kernels runs nothing in them.
    """
    lowered = {t: api.lower(artifact.towers[t], backend).to(device) for t in TOWERS}
    kernels = {t: api.kernel_audit(lowered[t]) for t in quantized}
    if backend != "eager":
        refuse_if_float([k for found in kernels.values() for k in found], f"--backend {backend}")
    return dict(lowered), kernels


def _towers(model: ClipModel) -> dict[str, nn.Module]:
    return {"image": model.image, "text": model.text}


def _quantized_part(artifact: Artifact) -> tuple[tuple[str, ...], ClassifierQuantizer]:
    """Which towers of an artifact are quantized, and its classifier."""
    named = artifact.extra.get("quantized_towers")
    towers = tuple(t for t in TOWERS if isinstance(named, list) and t in named)
    entry = artifact.extra.get("classifier")
    return towers, FLOATING_CLASSIFIER if entry is None else ClassifierQuantizer.from_dict(entry)
