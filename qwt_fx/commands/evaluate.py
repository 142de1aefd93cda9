"""`qwt-fx eval`: zero-shot accuracy and retrieval of a model, an artifact, or both side by side."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from torch import nn

from qwt_fx import api
from qwt_fx.artifact.artifact import Artifact, read_artifact
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import PARTIAL_SUFFIX, REPORT, write_text_atomic
from qwt_fx.batches import ranks
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.clip import clip
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.arguments import (
    add_common,
    add_eval,
    add_model,
    add_sample_keys,
    natural,
    positive,
)
from qwt_fx.commands.classification import Evaluation, metrics_of
from qwt_fx.commands.inputs import (
    check_flags,
    device_of,
    load_model,
    open_evaluation,
    open_retrieval,
    require_same_inputs,
    show_preprocessing,
)
from qwt_fx.commands.results import (
    in_output_directory,
    kept_report,
    require_data,
    require_target,
    say_if_nothing_to_resume,
    with_report,
)
from qwt_fx.commands.retrieval import Retrieval, with_retrieval
from qwt_fx.commands.screen import Screen
from qwt_fx.commands.sizes import artifact_size, fp32_bytes
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer
from qwt_fx.inspect.report import build_report, to_json
from qwt_fx.measure.kernel_audit import LayerKernel, refuse_if_float

NAME, HELP = "eval", "evaluate a model, an artifact, or both"
EXAMPLE = """\
example:
  qwt-fx eval --artifact vit-b-32-w6a6 --model ViT-B-32 --pretrained openai \\
      --imagenet-val imagenet/val --retrieval-data 'coco-val-{000..004}.tar' --report report.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to its parser."""
    parser.add_argument("--artifact", metavar="DIR", help="what quantize wrote")
    add_model(parser)
    add_eval(parser)
    add_sample_keys(parser)
    parser.add_argument("--backend", default="eager", help="eager (default), x86 or cuda")
    parser.add_argument("--report", metavar="FILE", help="write report.json here")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the batches that an interrupted run left in FILE.partial of --report",
    )
    parser.add_argument("--batch-size", type=positive, default=128, metavar="B")
    parser.add_argument("--workers", type=natural, default=0, metavar="N")
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.artifact is None and args.model is None:
        raise ConfigError("--artifact DIR or --model NAME is needed")
    check_flags(args)
    require_data(args)
    require_target(args, args.report, "--report FILE")
    target = None if args.report is None else Path(args.report)

    def make(identity: JsonObject, screen: Screen) -> JsonObject:
        if target is None or not ranks.current().first:
            return _evaluate(args, screen, FeatureStore(), identity)
        folder = target.parent / (target.name + PARTIAL_SUFFIX)
        say_if_nothing_to_resume(args.resume, folder, screen)
        with FeatureStore.open(folder, identity["settings"], resume=args.resume) as store:
            report = _evaluate(args, screen, store, identity)
            write_text_atomic(target, to_json(report))
        return report

    with_report(args, partial(kept_report, args, target), make)


def run_floating(args: argparse.Namespace) -> None:
    """`quantize --choice fp32_eval`: the floating-point model alone; a report, no artifact."""
    args.artifact, args.backend = None, "eager"
    check_flags(args, "model")
    require_data(args)
    require_target(args, args.output, "--output DIR")
    target = None if args.output is None else Path(args.output) / REPORT

    def make(identity: JsonObject, screen: Screen) -> JsonObject:
        if target is None or not ranks.current().first:
            return _evaluate(args, screen, FeatureStore(), identity)
        return in_output_directory(
            args, identity, screen, lambda run, _: _evaluate(args, screen, run.store, identity)
        )

    with_report(args, partial(kept_report, args, target), make)


def _evaluate(
    args: argparse.Namespace, screen: Screen, store: FeatureStore, identity: JsonObject
) -> JsonObject:
    begun = time.perf_counter()
    artifact = None if args.artifact is None else read_artifact(Path(args.artifact))
    floating = None if args.model is None else load_model(args)
    loaded = None
    if artifact is not None:
        # x86 means the CPU, also where a GPU is.
        on_cpu = args.backend == "x86" and args.device == "auto"
        loaded = clip.from_artifact(artifact, device="cpu" if on_cpu else device_of(args))
    if floating is not None and loaded is not None:
        require_same_inputs(loaded, floating)
    model = floating or loaded  # gives the transform and the tokenizer
    if model is None:  # run() checked; fp32_eval needs --model
        raise ConfigError("--artifact DIR or --model NAME is needed")
    show_preprocessing(model, screen)
    evaluation = open_evaluation(args, model, screen, store)
    retrieval = open_retrieval(args, model, store)
    sides = {} if floating is None else {"fp32": floating.towers}
    towers: tuple[str, ...] = ()
    classifier = FLOATING_CLASSIFIER
    kernels: dict[str, list[LayerKernel]] = {}
    if artifact is not None and loaded is not None:
        towers, classifier = _quantized_part(artifact)
        lowered = {t: api.lower(artifact.towers[t], args.backend).to(loaded.device) for t in TOWERS}
        sides["quantized"] = dict(lowered)
        kernels = {t: api.kernel_audit(lowered[t]) for t in towers}
        if args.backend == "cuda" and loaded.device == "cpu":
            screen.note("--backend cuda on the CPU: the same integers, slowly")
        if args.backend != "eager":
            every = [kernel for audit in kernels.values() for kernel in audit]
            refuse_if_float(every, f"backend {args.backend}")
    metrics = _metrics(evaluation, retrieval, sides, towers, classifier, screen)
    elapsed = time.perf_counter() - begun
    return build_report(
        {} if artifact is None else {tower: artifact.towers[tower] for tower in towers},
        None if artifact is None else QuantConfig.from_dict(artifact.config),
        kernels,
        model=model.name,
        pretrained=model.pretrained,
        metrics=metrics,
        size=_size(args, artifact, towers, floating),
        seconds={"evaluate": elapsed, "total": elapsed},
        processes={"count": ranks.current().world, "wire_bytes": ranks.current().wire_bytes},
        run=identity,
    )


def _size(
    args: argparse.Namespace,
    artifact: Artifact | None,
    towers: tuple[str, ...],
    floating: ClipModel | None,
) -> JsonObject:
    if artifact is not None:
        return artifact_size(Path(args.artifact), artifact, towers, floating)
    return {
        "fp32_bytes": None if floating is None else sum(fp32_bytes(floating, t) for t in TOWERS)
    }


def _metrics(
    evaluation: Evaluation | None,
    retrieval: Retrieval | None,
    sides: dict[str, dict[str, nn.Module]],
    towers: tuple[str, ...],
    classifier: ClassifierQuantizer,
    screen: Screen,
) -> JsonObject:
    metrics: JsonObject = {}
    if evaluation is not None:
        exact, rounded = (
            evaluation.features(sides[name], screen, title) if name in sides else None
            for name, title in (("fp32", "FP32"), ("quantized", "quantized"))
        )
        metrics = metrics_of(evaluation, exact, rounded, towers, classifier)
    if retrieval is not None:
        metrics = with_retrieval(metrics, retrieval.measure(sides, towers, screen))
    return metrics


def _quantized_part(artifact: Artifact) -> tuple[tuple[str, ...], ClassifierQuantizer]:
    """Which towers of an artifact are quantized, and its classifier."""
    named = artifact.extra.get("quantized_towers")
    towers = tuple(t for t in TOWERS if isinstance(named, list) and t in named)
    entry = artifact.extra.get("classifier")
    return towers, FLOATING_CLASSIFIER if entry is None else ClassifierQuantizer.from_dict(entry)
