"""The files of a small CLIP on the disk, for tests of the program: weights, images, captions."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from small_clip import small_config, small_model, write_config

WORDS = "red green blue large small round old new dog cat house tree".split()


def write_small_clip(folder: Path, pairs: int = 24) -> list[str]:
    """A small CLIP and a csv file of pairs; returns the MODEL and CALIBRATION words."""
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config()
    save_file(dict(small_model().state_dict()), folder / "model.safetensors")
    rng = random.Random(0)
    noise = np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for index in range(pairs):
        path = folder / f"{index}.png"
        Image.fromarray(noise.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path}\ta {' '.join(rng.sample(WORDS, 3))}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return [
        "--model", write_config(folder / "model.json", config),
        "--pretrained", str(folder / "model.safetensors"),
        "--train-data", str(folder / "pairs.csv"), "--dataset-type", "csv",
        "--calib-samples", str(pairs), "--batch-size", "12",
    ]  # fmt: skip
