"""What the benchmarks share: the demo CLIP with as many validation images as wanted."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.fx import GraphModule

from qwt_fx.clip import clip
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.classification import Evaluation
from qwt_fx.commands.quantize.pipeline import capture_towers, quantize_towers
from qwt_fx.commands.screen import Screen
from qwt_fx.config.config import QuantConfig
from qwt_fx.data.classes import resolve
from qwt_fx.data.data import CalibrationData, load_calibration
from qwt_fx.data.imagefolder import open_validation
from qwt_fx.demo.assets import unpack_weights, write_files
from qwt_fx.evaluate.classifier import FLOATING_CLASSIFIER
from qwt_fx.evaluate.evaluate import Features, ZeroShot, compare
from qwt_fx.measure.machine import processor

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
SCREEN = Screen(quiet=True)
SAMPLES, BATCH = 512, 128
SETTINGS = {"image only": ("image",), "all modules": TOWERS}


@dataclass
class Demo:
    """The demo CLIP, captured, with FP32 embeddings of a validation set."""

    model: ClipModel
    graphs: dict[str, GraphModule]
    evaluation: Evaluation
    reference: Features
    files: Path

    def calibration(self, samples: int, batch: int, seed: int) -> CalibrationData:
        """Calibration pairs drawn from the shipped shards."""
        return load_calibration(
            str(self.files / "calib-{000..003}.tar"),
            transform=self.model.transform,
            tokenizer=self.model.tokenizer,
            samples=samples,
            batch_size=batch,
            seed=seed,
        )


def write_second_model(folder: Path, variant: str) -> None:
    """Put the second CLIP in the place of the demo's model; the data stay."""
    packed = ROOT / "second_model"
    config = json.loads((packed / "model.json").read_text())
    state = unpack_weights((packed / "weights.safetensors").read_bytes(), config, variant)
    save_file(state, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(config))


def open_demo(work: Path, variant: str, images: int, *, second: bool = False) -> Demo:
    """Write the files of the demo to `work`, render `images` validation images, embed them in FP32.

    `second` takes the CLIP of another seed, width and depth instead of the shipped one.
    """
    files = work / f"{variant}-{second}"
    write_files(files, variant)
    if second:
        write_second_model(files, variant)
    rendered = work / f"val-{images}"
    if not rendered.is_dir():
        script = ROOT / "demo_model" / "train.py"
        words = ["--render-val", str(images), "--seed", "1", "--output", str(rendered)]
        subprocess.run([sys.executable, str(script), *words], check=True)
    model = clip.load(str(files / "model.json"), str(files / "model.safetensors"))
    folder = open_validation(rendered, model.transform, 256, 0)
    prompts = resolve(folder.classes, files / "classnames.txt", files / "templates.txt")
    evaluation = Evaluation(list(folder), prompts, model.tokenizer(prompts.sentences), model.device)
    graphs = capture_towers(model, {})
    return Demo(model, graphs, evaluation, evaluation.features(graphs, SCREEN, "FP32"), files)


def both_settings(
    demo: Demo, config: QuantConfig, seed: int
) -> dict[str, tuple[dict[str, Any], ZeroShot]]:
    """Figures of one quantization of both towers, and each image's outcome, for both settings."""
    extra = BATCH if config.compat == "original" else 0  # the original reads one batch more
    data = demo.calibration(SAMPLES + extra, BATCH, seed)
    result = quantize_towers(demo.model, demo.graphs, data.batches, config, TOWERS, SCREEN)
    features = demo.evaluation.quantized(result, demo.reference, SCREEN)
    exact = demo.evaluation.classify(demo.reference)
    found = {}
    for setting, towers in SETTINGS.items():
        prompts = features.prompts if "text" in towers else demo.reference.prompts
        classifier = result.classifier if towers == ("image",) else FLOATING_CLASSIFIER
        chosen = Features(features.image, prompts, features.labels)
        outcome = demo.evaluation.classify(chosen, classifier)
        found[setting] = (figures(demo, chosen, exact, outcome, towers), outcome)
    return found


def figures(
    demo: Demo, features: Features, exact: ZeroShot, outcome: ZeroShot, towers: Sequence[str]
) -> dict[str, Any]:
    """Accuracy of a quantized model, its drop, and what `compare` finds."""
    return {
        "acc1": outcome.acc1,
        "drop": exact.acc1 - outcome.acc1,
        **compare(demo.reference, features, exact, outcome, towers),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "cpu": processor(),
        "python": platform.python_version(),
    }


def kept_results(name: str, *, resume: bool) -> dict[str, Any]:
    """What `results/NAME.json` holds, to go on from; {} without `resume` or without that file."""
    path = RESULTS / f"{name}.json"
    if not resume or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_results(name: str, document: dict[str, Any]) -> None:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
