"""`qwt-fx demo`: the shipped CLIP through the same code as `quantize`, every method in one table."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.fx import GraphModule

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import write_text_atomic
from qwt_fx.clip import clip
from qwt_fx.clip.clip import ClipModel
from qwt_fx.commands.arguments import add_common, natural
from qwt_fx.commands.classification import Evaluation, metrics_of
from qwt_fx.commands.quantize.pipeline import QuantizedClip, capture_towers, quantize_towers
from qwt_fx.commands.quantize.quantize import calibration_entry, save_clip
from qwt_fx.commands.screen import Screen, decibels, megabytes, percent
from qwt_fx.commands.sizes import fp32_bytes
from qwt_fx.config.config import QuantConfig
from qwt_fx.data.classes import resolve
from qwt_fx.data.data import CalibrationData, load_calibration
from qwt_fx.data.imagefolder import open_validation
from qwt_fx.demo.assets import VARIANTS, write_files
from qwt_fx.evaluate.evaluate import Features
from qwt_fx.inspect.report import build_report, to_json

NAME, HELP = "demo", "quantize the shipped CLIP every way; needs no data and no network"
EXAMPLE = """\
example:
  qwt-fx demo
  qwt-fx demo --files demo-files      # then use them with qwt-fx quantize
"""

METHODS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("repq-vit", "RepQ-ViT", {"recipe": "repq-vit"}),
    ("repq-vit-qwt", "RepQ-ViT + QwT", {"recipe": "repq-vit", "compensation": "qwt"}),
    ("repq-vit-log2", "RepQ-ViT, log2 attention", {"recipe": "repq-vit", "attention": "log2"}),
    ("best", "best", {"recipe": "best"}),
)
BITS = (8, 6, 4)
SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("image only", ("image",)),
    ("all modules", ("image", "text")),
)
SAMPLES, BATCH = 512, 128
HEADERS = (
    "method", "towers", "W/A", "top-1 (%)", "agreement (%)", "image SQNR (dB)", "text SQNR (dB)",
    "size (MB)", "seconds",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to its parser."""
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="hard",
        help="hard: rescaled, function unchanged, to be as hard to quantize as real CLIPs "
        "(default); plain: as trained",
    )
    parser.add_argument("--output", default="./qwt-fx-demo", metavar="DIR", help="reports")
    parser.add_argument("--files", metavar="DIR", help="only write the demo's files there")
    parser.add_argument("--seed", type=natural, default=1, help="of the calibration draw")
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.files is not None:
        write_files(Path(args.files), args.variant)
        return
    screen = Screen(args.quiet)
    with tempfile.TemporaryDirectory(prefix="qwt-fx-demo-") as folder:
        files = Path(folder)
        write_files(files, args.variant)
        rows = list(_rows(args, files, screen))
    screen.table(rows, HEADERS)


@dataclass
class _Demo:
    model: ClipModel
    graphs: dict[str, GraphModule]
    data: CalibrationData
    evaluation: Evaluation
    reference: Features
    size: int


def _open(args: argparse.Namespace, files: Path, screen: Screen) -> _Demo:
    model = clip.load(str(files / "model.json"), str(files / "model.safetensors"))
    with screen.phase("read calibration data") as update:
        data = load_calibration(
            str(files / "calib-{000..003}.tar"),
            transform=model.transform,
            tokenizer=model.tokenizer,
            samples=SAMPLES,
            batch_size=BATCH,
            seed=args.seed,
            progress=update,
        )
    folder = open_validation(files / "val", model.transform, BATCH, 0)
    prompts = resolve(folder.classes, files / "classnames.txt", files / "templates.txt")
    evaluation = Evaluation(list(folder), prompts, model.tokenizer(prompts.sentences), model.device)
    graphs = capture_towers(model, {})
    reference = evaluation.features(graphs, screen, "FP32")
    size = fp32_bytes(model, "image") + fp32_bytes(model, "text")
    return _Demo(model, graphs, data, evaluation, reference, size)


def _rows(args: argparse.Namespace, files: Path, screen: Screen) -> Iterator[list[str]]:
    demo = _open(args, files, screen)
    exact = demo.evaluation.classify(demo.reference)
    yield ["FP32", "", "", percent(exact.acc1), "", "", "", megabytes(demo.size), ""]
    for bits in BITS:
        for key, title, options in METHODS:
            config = QuantConfig.from_dict({"w_bits": bits, "a_bits": bits, **options})
            begun = time.perf_counter()
            result = quantize_towers(
                demo.model, demo.graphs, demo.data.batches, config, ("image", "text"), screen
            )
            elapsed = time.perf_counter() - begun
            features = demo.evaluation.quantized(result, demo.reference, screen)
            for setting, towers in SETTINGS:
                report = _report(args, demo, result, features, config, towers, elapsed, screen)
                name = f"{key}-w{bits}a{bits}-{'-'.join(towers)}.json"
                write_text_atomic(Path(args.output) / name, to_json(report))
                yield _row(title, setting, bits, report)


def _report(
    args: argparse.Namespace,
    demo: _Demo,
    both: QuantizedClip,
    features: Features,
    config: QuantConfig,
    towers: tuple[str, ...],
    elapsed: float,
    screen: Screen,
) -> JsonObject:
    """One row's report; an image-only model is the image tower of the same quantization."""
    chosen = {
        tower: both.towers[tower] if tower in towers else demo.graphs[tower]
        for tower in both.towers
    }
    result = QuantizedClip(chosen, towers, both.classifier)
    prompts = features.prompts if "text" in towers else demo.reference.prompts
    quantized = Features(features.image, prompts, features.labels)
    with tempfile.TemporaryDirectory(prefix="qwt-fx-demo-") as folder:
        size = save_clip(Path(folder), demo.model, result, config, screen)
    size["fp32_bytes"] = sum(fp32_bytes(demo.model, tower) for tower in towers)
    return build_report(
        {tower: both.towers[tower] for tower in towers},
        config,
        model="demo",
        pretrained=args.variant,
        seed=args.seed,
        calibration=calibration_entry(demo.data),
        metrics=metrics_of(demo.evaluation, demo.reference, quantized, towers, both.classifier),
        size=size,
        seconds=both.seconds | {"total": elapsed},
    )


def _row(title: str, setting: str, bits: int, report: JsonObject) -> list[str]:
    quantized, size = report["metrics"]["quantized"], report["size"]
    sqnr = quantized["embedding_sqnr_db"]
    return [
        title,
        setting,
        f"{bits}/{bits}",
        percent(quantized["acc1"]),
        percent(quantized["agreement"]),
        decibels(sqnr["image"]),
        decibels(sqnr["text"]),
        megabytes(size["quantized_bytes"]),
        f"{report['seconds']['total']:.1f}",
    ]
