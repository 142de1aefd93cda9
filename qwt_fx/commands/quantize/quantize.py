"""`qwt-fx quantize`: calibrate, quantize, evaluate and save a CLIP."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from qwt_fx.artifact.artifact import read_artifact, write_artifact
from qwt_fx.artifact.output import REPORT, OutputDirectory, write_text_atomic
from qwt_fx.batches import ranks
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.clip.clip import ClipModel, to_extra
from qwt_fx.commands import evaluate as evaluate_command
from qwt_fx.commands.arguments import (
    add_calibration,
    add_common,
    add_eval,
    add_model,
    add_quant,
    quant_config,
    size,
    towers_of,
)
from qwt_fx.commands.inputs import deal_batches, load_model, open_evaluation, open_retrieval
from qwt_fx.commands.quantize.partial_run import ACTIVATIONS, PartialRun
from qwt_fx.commands.quantize.pipeline import (
    QuantizedClip,
    calibration_sqnr,
    capture_towers,
    metrics_of,
    quantize_towers,
)
from qwt_fx.commands.quantize.run_identity import run_identity
from qwt_fx.commands.quantize.tower_checkpoints import TowerCheckpoints
from qwt_fx.commands.results import finish, kept_report
from qwt_fx.commands.retrieval import with_retrieval
from qwt_fx.commands.screen import Screen
from qwt_fx.config.config import QuantConfig
from qwt_fx.data.classes import ClassPrompts
from qwt_fx.data.data import CalibrationData
from qwt_fx.errors import CheckFailed, ConfigError
from qwt_fx.inspect.report import build_report, to_json
from qwt_fx.quant.quantizers import compensation_bytes

EXAMPLE = """\
example:
  qwt-fx quantize --model ViT-B-32 --pretrained openai \\
      --train-data 'cc3m-train-{0000..0575}.tar' --imagenet-val imagenet/val \\
      --choice all_quant --wq_params 6 --aq_params 6 --qwerty --output vit-b-32-w6a6
"""


def add_parser(commands: Any) -> None:
    """Add the command to the program."""
    parser = commands.add_parser(
        "quantize",
        help="quantize a CLIP and evaluate it",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in (add_model, add_calibration, add_quant, add_eval):
        add(parser)
    parser.add_argument_group("memory").add_argument(
        "--memory-budget",
        type=size,
        metavar="SIZE",
        help="of activations held in memory, such as 2GB: those beyond it and the calibration's "
        "inputs go to files in DIR.partial (default: no limit, no files)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="artifact folder")
    output.add_argument("--force", action="store_true", help="replace a folder of another kind")
    output.add_argument(
        "--resume", action="store_true", help="go on with what is in DIR.partial, same settings"
    )
    output.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="exit with code 3 when top-1 drops by more percentage points",
    )
    add_common(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    towers = towers_of(args)
    if not towers:
        evaluate_command.run_floating(args)
        return
    if args.output is None:
        raise ConfigError("--output DIR is needed")
    if args.max_drop is not None and args.imagenet_val is None:
        raise ConfigError("--max-drop needs --imagenet-val")
    config = quant_config(args)
    among = ranks.current()
    evaluate_command.refuse_resume(args, among)
    screen = Screen(args.quiet, muted=not among.first)
    identity = run_identity(args)
    report = among.from_first(lambda: _kept(args, config, identity, screen))
    if not among.first:
        if report is None:
            _quantize(args, config, towers, screen, None, None)
        return
    if report is None:
        target = Path(args.output)
        with OutputDirectory(target, force=args.force, resume=args.resume) as output:
            partial = PartialRun(output.path, identity, resume=args.resume)
            with partial:
                report = _quantize(args, config, towers, screen, output.path, partial)
                report["run"] = identity
                write_text_atomic(output.path / REPORT, to_json(report))
    finish(args, report, screen)
    _check_drop(args.max_drop, report)


def _kept(
    args: argparse.Namespace, config: QuantConfig, identity: dict[str, Any], screen: Screen
) -> dict[str, Any] | None:
    """With `--skip-existing`: the report of this very run, its artifact being whole."""
    folder = Path(args.output)
    report = kept_report(args, folder / REPORT, identity, screen)
    if report is not None and config.compat != "original":
        read_artifact(folder)
    return report


def _quantize(
    args: argparse.Namespace,
    config: QuantConfig,
    towers: tuple[str, ...],
    screen: Screen,
    folder: Path | None,
    partial: PartialRun | None,
) -> dict[str, Any]:
    """The report; without a folder, on all ranks but the first, an empty one."""
    begun = time.perf_counter()
    model = load_model(args)
    store = FeatureStore() if partial is None else partial.store
    evaluation = open_evaluation(args, model, screen, store)
    retrieval = open_retrieval(args, model, store)
    seconds: dict[str, float] = {}
    graphs = capture_towers(model, seconds)
    if partial is not None and partial.known is not None:
        screen.note("--resume: calibrated already; going on with the evaluation")
        result, known = partial.load(towers, model.device), partial.known
    else:
        prompts = None if evaluation is None else evaluation.prompts
        checkpoints = TowerCheckpoints() if partial is None else partial.towers
        result, known = _calibrate(
            args, config, towers, screen, folder, model, graphs, prompts, checkpoints
        )
        if partial is not None and config.compat != "original":  # which is not saved
            partial.keep(known)
    started = time.perf_counter()
    metrics: dict[str, Any] = {}
    if evaluation is not None:
        reference = evaluation.features(graphs, screen, "FP32")
        quantized = evaluation.quantized(result, reference, screen)
        metrics = metrics_of(evaluation, reference, quantized, towers, result.classifier)
    if retrieval is not None:
        chosen = {t: (result.towers if t in towers else graphs)[t] for t in graphs}
        sides = {"fp32": graphs, "quantized": chosen}
        metrics = with_retrieval(metrics, retrieval.measure(sides, towers, screen))
    if folder is None:
        return {}
    if metrics:
        seconds["evaluate"] = time.perf_counter() - started
    else:
        metrics = {"quantized": {"embedding_sqnr_db": known["calibration_sqnr_db"]}}
    seconds["total"] = time.perf_counter() - begun
    return build_report(
        {tower: result.towers[tower] for tower in towers},
        config,
        model=model.name,
        pretrained=model.pretrained,
        seed=args.seed,
        calibration=known["calibration"],
        metrics=metrics,
        size=known["size"],
        seconds=known["seconds"] | seconds,
        processes={"count": ranks.current().world, "wire_bytes": ranks.current().wire_bytes},
    )


def _calibrate(
    args: argparse.Namespace,
    config: QuantConfig,
    towers: tuple[str, ...],
    screen: Screen,
    folder: Path | None,
    model: ClipModel,
    graphs: dict[str, GraphModule],
    prompts: ClassPrompts | None,
    checkpoints: TowerCheckpoints,
) -> tuple[QuantizedClip, dict[str, Any]]:
    """The quantized towers, saved in `folder` if any, and the report's entries about their making."""
    # The original reads one batch more when it quantizes both towers.
    extra = 1 if config.compat == "original" and len(towers) == 2 else 0
    # Each process has files of its own; those of the first lie where the run lies.
    files = None if folder is None else folder / ACTIVATIONS
    with ValueStore(args.memory_budget, files) as store:
        kept = None if args.memory_budget is None else store
        share, data = deal_batches(args, model, screen, extra, prompts, kept)
        result = quantize_towers(model, graphs, share, config, towers, screen, checkpoints, store)
        sqnr = None
        if args.imagenet_val is None and args.retrieval_data is None:
            sqnr = calibration_sqnr(graphs, result, share, model.device)
    if folder is None or data is None:
        return result, {}
    size = save_clip(folder, model, result, config, screen)
    return result, {
        "calibration": calibration_entry(data),
        "size": size,
        "seconds": result.seconds,
        "calibration_sqnr_db": sqnr,
    }


def calibration_entry(data: CalibrationData) -> dict[str, Any]:
    """The `calibration` entry of report.json."""
    return {
        "samples": data.samples,
        "batches": len(data.batches),
        "skipped_samples": data.skipped_samples,
        "shards": data.shards,
        "shards_touched": data.shards_touched,
        "bytes_read": data.bytes_read,
    }


def save_clip(
    folder: Path, model: ClipModel, result: QuantizedClip, config: QuantConfig, screen: Screen
) -> dict[str, Any]:
    """Write the artifact into a folder and return the `size` entry of report.json.

    A model of `compat="original"` is not saved, and the reason is said aloud.
    """
    size: dict[str, Any] = {
        "fp32_bytes": sum(fp32_bytes(model, tower) for tower in result.quantized),
        "quantized_bytes": None,
        "compensation_bytes": sum(
            compensation_bytes(result.towers[tower]) for tower in result.quantized
        ),
    }
    if config.compat == "original":
        screen.note(
            "compat='original' keeps zero points that no integer type can store: the report is "
            "written, the model is not saved; use --compat none for an artifact"
        )
        return size
    extra = to_extra(model) | {
        "quantized_towers": list(result.quantized),
        "classifier": result.classifier.to_dict() if result.quantized == ("image",) else None,
    }
    sizes = write_artifact(folder, result.towers, config=config.to_dict(), extra=extra)
    size["quantized_bytes"] = sum(sizes.towers[tower] for tower in result.quantized)
    return size


def fp32_bytes(model: ClipModel, tower: str) -> int:
    """Bytes of a tower's parameters and persistent buffers in float32."""
    state = getattr(model, tower).state_dict()
    return sum(value.numel() * 4 for value in state.values())


def _check_drop(limit: float | None, report: dict[str, Any]) -> None:
    if limit is None:
        return
    metrics = report["metrics"]
    drop = 100.0 * (metrics["fp32"]["acc1"] - metrics["quantized"]["acc1"])
    if drop > limit:
        raise CheckFailed(f"top-1 drops by {drop:.2f} points, more than --max-drop {limit:g}")
