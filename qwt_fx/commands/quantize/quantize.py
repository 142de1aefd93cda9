"""`qwt-fx quantize`: calibrate, quantize, evaluate and save a CLIP."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from torch.fx import GraphModule

from qwt_fx.artifact.artifact import read_artifact, write_artifact
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import REPORT
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
    add_sample_keys,
    number,
    quant_config,
    size,
    towers_of,
)
from qwt_fx.commands.classification import metrics_of
from qwt_fx.commands.inputs import (
    check_flags,
    deal_batches,
    load_model,
    open_evaluation,
    open_retrieval,
    show_preprocessing,
)
from qwt_fx.commands.quantize.partial_run import ACTIVATIONS, PartialRun
from qwt_fx.commands.quantize.pipeline import (
    QuantizedClip,
    calibration_sqnr,
    capture_towers,
    quantize_towers,
    require_storable,
)
from qwt_fx.commands.quantize.tower_checkpoints import TowerCheckpoints
from qwt_fx.commands.results import in_output_directory, kept_report, with_report
from qwt_fx.commands.retrieval import with_retrieval
from qwt_fx.commands.screen import Screen
from qwt_fx.commands.sizes import fp32_bytes
from qwt_fx.config.config import QuantConfig
from qwt_fx.data.classes import ClassPrompts
from qwt_fx.data.data import CalibrationData
from qwt_fx.errors import CheckFailed, ConfigError
from qwt_fx.inspect.report import CALIBRATION, build_report
from qwt_fx.quant.quantizers import compensation_bytes

NAME, HELP = "quantize", "quantize a CLIP and evaluate it"
EXAMPLE = """\
example:
  qwt-fx quantize --model ViT-B-32 --pretrained openai \\
      --train-data 'cc3m-train-{0000..0575}.tar' --imagenet-val imagenet/val \\
      --choice all_quant --wq_params 6 --aq_params 6 --qwerty --output vit-b-32-w6a6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to its parser."""
    for add in (add_model, add_calibration, add_sample_keys, add_quant, add_eval):
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
        type=number,
        metavar="POINTS",
        help="exit with code 3 when top-1 drops by more percentage points",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    towers = towers_of(args)
    if not towers:
        evaluate_command.run_floating(args)
        return
    check_flags(args, "model", "train_data", "output")
    if args.max_drop is not None and args.imagenet_val is None:
        raise ConfigError("--max-drop needs --imagenet-val")
    config = quant_config(args)

    def make(identity: JsonObject, screen: Screen) -> JsonObject:
        if not ranks.current().first:
            return _quantize(args, config, towers, screen, identity)
        return in_output_directory(
            args, identity, screen, partial(_quantize, args, config, towers, screen, identity)
        )

    report = with_report(args, partial(_kept, args, config), make)
    if report is not None:
        _check_drop(args.max_drop, report)


def _kept(
    args: argparse.Namespace, config: QuantConfig, identity: JsonObject, screen: Screen
) -> JsonObject | None:
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
    identity: JsonObject,
    partial_run: PartialRun | None = None,
    folder: Path | None = None,
) -> JsonObject:
    """The report; without a folder, on all ranks but the first, an empty one."""
    begun = time.perf_counter()
    model = load_model(args)
    show_preprocessing(model, screen)
    store = FeatureStore() if partial_run is None else partial_run.store
    evaluation = open_evaluation(args, model, screen, store)
    retrieval = open_retrieval(args, model, store)
    seconds: dict[str, float] = {}
    graphs = capture_towers(model, seconds)
    if config.compat != "original":  # which is not saved
        require_storable(graphs)
    if partial_run is not None and partial_run.known is not None:
        screen.note("--resume: calibrated already; going on with the evaluation")
        result, known = partial_run.load(towers, model.device), partial_run.known
    else:
        prompts = None if evaluation is None else evaluation.prompts
        checkpoints = TowerCheckpoints() if partial_run is None else partial_run.towers
        result, known = _calibrate(
            args, config, towers, screen, folder, model, graphs, prompts, checkpoints
        )
        if partial_run is not None and config.compat != "original":  # which is not saved
            partial_run.keep(known)
    started = time.perf_counter()
    metrics: JsonObject = {}
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
        run=identity,
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
) -> tuple[QuantizedClip, JsonObject]:
    """The quantized towers, saved in `folder` if any, and the report's entries about their making."""
    # The original reads one batch more when it quantizes both towers.
    extra = 1 if config.compat == "original" and len(towers) == 2 else 0
    # Each process has files of its own; those of the first lie where the run lies.
    files = None if folder is None else folder / ACTIVATIONS
    with ValueStore(args.memory_budget, files) as store:
        kept = None if args.memory_budget is None else store
        batches, data = deal_batches(
            args, model, screen, extra, prompts, kept, captioned="text" in towers
        )
        result = quantize_towers(model, graphs, batches, config, towers, screen, checkpoints, store)
        sqnr = None
        if args.imagenet_val is None and args.retrieval_data is None:
            sqnr = calibration_sqnr(graphs, result, batches, model.device)
    if folder is None or data is None:
        return result, {}
    size = save_clip(folder, model, result, config, screen)
    return result, {
        "calibration": calibration_entry(data),
        "size": size,
        "seconds": result.seconds,
        "calibration_sqnr_db": sqnr,
    }


def calibration_entry(data: CalibrationData) -> JsonObject:
    """The `calibration` entry of report.json."""
    return {key: getattr(data, key) for key in CALIBRATION} | {"batches": len(data.batches)}


def save_clip(
    folder: Path, model: ClipModel, result: QuantizedClip, config: QuantConfig, screen: Screen
) -> JsonObject:
    """Write the artifact into a folder and return the `size` entry of report.json.

    A model of `compat="original"` is not saved, and the reason is said aloud.
    """
    size: JsonObject = {
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


def _check_drop(limit: float | None, report: JsonObject) -> None:
    if limit is None:
        return
    metrics = report["metrics"]
    drop = 100.0 * (metrics["fp32"]["acc1"] - metrics["quantized"]["acc1"])
    if drop > limit:
        raise CheckFailed(f"top-1 drops by {drop:.2f} points, more than --max-drop {limit:g}")
