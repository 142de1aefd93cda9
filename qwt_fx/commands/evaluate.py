"""`qwt-fx eval`: zero-shot accuracy and retrieval of a model, an artifact, or both side by side."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qwt_fx import api
from qwt_fx.artifact.artifact import Artifact, read_artifact
from qwt_fx.artifact.output import PARTIAL_SUFFIX, REPORT, OutputDirectory, write_text_atomic
from qwt_fx.batches import ranks
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.clip import clip
from qwt_fx.clip.clip import ClipModel
from qwt_fx.commands.arguments import add_common, add_eval, add_model, natural, positive
from qwt_fx.commands.inputs import device_of, load_model, open_evaluation, open_retrieval
from qwt_fx.commands.quantize.partial_run import PartialRun
from qwt_fx.commands.quantize.pipeline import TOWERS, Evaluation, metrics_of
from qwt_fx.commands.quantize.run_identity import run_identity
from qwt_fx.commands.results import finish, kept_report, require_data, require_target
from qwt_fx.commands.retrieval import Retrieval, with_retrieval
from qwt_fx.commands.screen import Screen
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER, ClassifierQuantizer
from qwt_fx.evaluate.evaluate import Features
from qwt_fx.inspect.report import build_report, to_json
from qwt_fx.measure.kernel_audit import LayerKernel, refuse_if_float

EXAMPLE = """\
example:
  qwt-fx eval --artifact vit-b-32-w6a6 --model ViT-B-32 --pretrained openai \\
      --imagenet-val imagenet/val --retrieval-data 'coco-val-{000..004}.tar' --report report.json
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
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.artifact is None and args.model is None:
        raise ConfigError("--artifact DIR or --model NAME is needed")
    require_data(args)
    require_target(args, args.report, "--report FILE")
    among = ranks.current()
    refuse_resume(args, among)
    screen = Screen(args.quiet, muted=not among.first)
    identity = run_identity(args)
    target = None if args.report is None else Path(args.report)
    report = among.from_first(lambda: kept_report(args, target, identity, screen))
    if not among.first:
        if report is None:
            _evaluate(args, screen, FeatureStore(), identity)
        return
    if report is None:
        store = FeatureStore()
        if target is not None:
            folder = target.parent / (target.name + PARTIAL_SUFFIX)
            store = FeatureStore.open(folder, identity["settings"], resume=args.resume)
        with store:
            report = _evaluate(args, screen, store, identity)
            if target is not None:
                write_text_atomic(target, to_json(report))
    finish(args, report, screen)


def run_floating(args: argparse.Namespace) -> None:
    """`quantize --choice fp32_eval`: the floating-point model alone; a report, no artifact."""
    args.artifact, args.backend = None, "eager"
    require_data(args)
    require_target(args, args.output, "--output DIR")
    among = ranks.current()
    refuse_resume(args, among)
    screen = Screen(args.quiet, muted=not among.first)
    identity = run_identity(args)
    target = None if args.output is None else Path(args.output) / REPORT
    report = among.from_first(lambda: kept_report(args, target, identity, screen))
    if not among.first:
        if report is None:
            _evaluate(args, screen, FeatureStore(), identity)
        return
    if report is None and args.output is None:
        report = _evaluate(args, screen, FeatureStore(), identity)
    elif report is None:
        with OutputDirectory(Path(args.output), force=args.force, resume=args.resume) as output:
            partial = PartialRun(output.path, identity, resume=args.resume)
            with partial:
                report = _evaluate(args, screen, partial.store, identity)
                write_text_atomic(output.path / REPORT, to_json(report))
    finish(args, report, screen)


def refuse_resume(args: argparse.Namespace, among: ranks.Ranks) -> None:
    """Raise `ConfigError` for `--resume` in a run of several processes."""
    if args.resume and among.world > 1:
        raise ConfigError("--resume: goes on in one process only; start without torchrun")


@dataclass
class _Sides:
    """What is evaluated: one model or two, of which the second is an artifact."""

    floating: ClipModel | None
    artifact: Artifact | None
    loaded: ClipModel | None

    @property
    def model(self) -> ClipModel:
        """The one that gives the transform and the tokenizer."""
        model = self.floating or self.loaded
        if model is None:  # run() checked; fp32_eval needs --model
            raise ConfigError("--model is needed: an open_clip name or a config JSON")
        return model

    def towers(self, lowered: dict[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
        """Towers of each side, ready to run; `lowered` are the artifact's."""
        found: dict[str, dict[str, nn.Module]] = {}
        if self.floating is not None:
            found["fp32"] = {"image": self.floating.image, "text": self.floating.text}
        if lowered:
            found["quantized"] = lowered
        return found

    def lower(
        self, backend: str, quantized: tuple[str, ...]
    ) -> tuple[dict[str, nn.Module], dict[str, list[LayerKernel]]]:
        """The artifact's towers as the backend runs them, and what computes the layers of the
        quantized ones. Raises `PreconditionError` where a backend of integers runs none."""
        if self.artifact is None or self.loaded is None:
            return {}, {}
        lowered = {
            t: api.lower(self.artifact.towers[t], backend).to(self.loaded.device) for t in TOWERS
        }
        kernels = {t: api.kernel_audit(lowered[t]) for t in quantized}
        if backend != "eager":
            refuse_if_float([k for found in kernels.values() for k in found], f"backend {backend}")
        return dict(lowered), kernels


def _device(args: argparse.Namespace) -> str:
    """Where the artifact's towers run. x86 means the CPU, also where a GPU is."""
    return "cpu" if args.backend == "x86" and args.device == "auto" else device_of(args)


def _open_sides(args: argparse.Namespace) -> _Sides:
    artifact = None if args.artifact is None else read_artifact(Path(args.artifact))
    floating = None if args.model is None else load_model(args)
    loaded = None if artifact is None else clip.from_artifact(artifact, device=_device(args))
    return _Sides(floating, artifact, loaded)


def _evaluate(
    args: argparse.Namespace, screen: Screen, store: FeatureStore, identity: dict[str, Any]
) -> dict[str, Any]:
    begun = time.perf_counter()
    sides = _open_sides(args)
    model, artifact = sides.model, sides.artifact
    evaluation = open_evaluation(args, model, screen, store)
    retrieval = open_retrieval(args, model, store)
    towers: tuple[str, ...] = ()
    classifier = FLOATING_CLASSIFIER
    if artifact is not None:
        towers, classifier = _quantized_part(artifact)
    lowered, kernels = sides.lower(args.backend, towers)
    metrics = _metrics(evaluation, retrieval, sides.towers(lowered), towers, classifier, screen)
    elapsed = time.perf_counter() - begun
    return build_report(
        {} if artifact is None else {tower: artifact.towers[tower] for tower in towers},
        None if artifact is None else QuantConfig.from_dict(artifact.config),
        kernels,
        model=model.name,
        pretrained=model.pretrained,
        metrics=metrics,
        seconds={"evaluate": elapsed, "total": elapsed},
        processes={"count": ranks.current().world, "wire_bytes": ranks.current().wire_bytes},
        run=identity,
    )


def _metrics(
    evaluation: Evaluation | None,
    retrieval: Retrieval | None,
    sides: dict[str, dict[str, nn.Module]],
    towers: tuple[str, ...],
    classifier: ClassifierQuantizer,
    screen: Screen,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if evaluation is not None:
        found: dict[str, Features | None] = {"fp32": None, "quantized": None}
        for name, title in (("fp32", "FP32"), ("quantized", "quantized")):
            if name in sides:
                found[name] = evaluation.features(sides[name], screen, title)
        metrics = metrics_of(evaluation, found["fp32"], found["quantized"], towers, classifier)
    if retrieval is not None:
        metrics = with_retrieval(metrics, retrieval.measure(sides, towers, screen))
    return metrics


def _quantized_part(artifact: Artifact) -> tuple[tuple[str, ...], ClassifierQuantizer]:
    """Which towers of an artifact are quantized, and its classifier."""
    named = artifact.extra.get("quantized_towers")
    towers = tuple(t for t in TOWERS if isinstance(named, list) and t in named)
    entry = artifact.extra.get("classifier")
    return towers, FLOATING_CLASSIFIER if entry is None else ClassifierQuantizer.from_dict(entry)
