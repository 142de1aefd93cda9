"""`qwt-fx quantize`: calibrate, quantize, evaluate and save a CLIP."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from qwt_fx.artifact import write_artifact
from qwt_fx.clip import ClipModel, to_extra
from qwt_fx.commands import evaluate as evaluate_command
from qwt_fx.commands.arguments import (
    add_calibration,
    add_common,
    add_eval,
    add_model,
    add_quant,
    quant_config,
    towers_of,
)
from qwt_fx.commands.inputs import load_batches, load_model, open_evaluation
from qwt_fx.commands.pipeline import (
    QuantizedClip,
    calibration_sqnr,
    capture_towers,
    metrics_of,
    quantize_towers,
)
from qwt_fx.commands.screen import ACCURACY_HEADERS, Screen, accuracy_rows
from qwt_fx.config import QuantConfig
from qwt_fx.data import CalibrationData
from qwt_fx.errors import CheckFailed, ConfigError
from qwt_fx.output import OutputDirectory, write_text_atomic
from qwt_fx.quantizers import compensation_bytes
from qwt_fx.report import build_report, to_json

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
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="artifact folder")
    output.add_argument("--force", action="store_true", help="replace a folder of another kind")
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
    screen = Screen(args.quiet)
    with OutputDirectory(Path(args.output), force=args.force) as output:
        report = _quantize(args, config, towers, screen, output.path)
    screen.table(accuracy_rows(report), ACCURACY_HEADERS)
    _check_drop(args.max_drop, report)


def _quantize(
    args: argparse.Namespace,
    config: QuantConfig,
    towers: tuple[str, ...],
    screen: Screen,
    folder: Path,
) -> dict[str, Any]:
    begun = time.perf_counter()
    model = load_model(args)
    evaluation = open_evaluation(args, model, screen)
    # The original reads one batch more when it quantizes both towers (QwT quirk 19).
    extra = 1 if config.compat == "original" and len(towers) == 2 else 0
    prompts = None if evaluation is None else evaluation.prompts
    data = load_batches(args, model, screen, extra, prompts)
    seconds: dict[str, float] = {}
    graphs = capture_towers(model, seconds)
    result = quantize_towers(model, graphs, data.batches, config, towers, screen)
    for phase, value in result.seconds.items():
        seconds[phase] = seconds.get(phase, 0.0) + value
    started = time.perf_counter()
    if evaluation is not None:
        reference = evaluation.features(graphs, screen, "FP32")
        quantized = evaluation.quantized(result, reference, screen)
        metrics = metrics_of(evaluation, reference, quantized, towers, result.classifier)
        seconds["evaluate"] = time.perf_counter() - started
    else:
        sqnr = calibration_sqnr(graphs, result, data.batches, model.device)
        metrics = {"quantized": {"embedding_sqnr_db": sqnr}}
    size = save_clip(folder, model, result, config, screen)
    seconds["total"] = time.perf_counter() - begun
    report = build_report(
        {tower: result.towers[tower] for tower in towers},
        config,
        model=model.name,
        pretrained=model.pretrained,
        seed=args.seed,
        calibration=calibration_entry(data),
        metrics=metrics,
        size=size,
        seconds=seconds,
    )
    write_text_atomic(folder / "report.json", to_json(report))
    return report


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
