"""The demo's files with a model of fewer blocks: for tests of the program, not of its accuracy."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file

from qwt_fx.demo.assets import write_files

LAYERS = 2  # of each tower; the demo's have 8 and 6


def write_shallow_demo(folder: Path) -> None:
    """As `write_files(folder, "hard")`, but only the first blocks of each tower are in the model."""
    write_files(folder, "hard")
    config = json.loads((folder / "model.json").read_text())
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = LAYERS
    (folder / "model.json").write_text(json.dumps(config))
    deeper = re.compile(r"\bresblocks\.(\d+)\.")
    weights = {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if not (block := deeper.search(name)) or int(block[1]) < LAYERS
    }
    save_file(weights, folder / "model.safetensors")
