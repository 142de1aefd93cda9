"""Pack a trained demo CLIP and its data into the package's assets.

    python benchmarks/demo_model/pack.py --trained build/demo-model --output qwt_fx/demo/assets

Writes model.json, weights.safetensors (fp16, occurring token rows only), the calibration shards,
val.zip (class folders of PNG files), classnames.txt and templates.txt. CARD.md is written by
hand from metrics.json.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import render
import torch
from safetensors.torch import load_file, save
from train import tokenize

CALIBRATION_SIZES = (208, 192, 176, 192)
CALIBRATION_SEED = 0
VALIDATION_IMAGES = 1600
VALIDATION_SEED = 0


def pack_weights(trained: Path, output: Path) -> None:
    """Store the checkpoint in fp16 with the embeddings of the token ids that occur, and the ids."""
    state = load_file(trained / "model.safetensors")
    rows = torch.unique(tokenize(render.CAPTION_TEMPLATES))
    state["token_embedding.weight"] = state["token_embedding.weight"][rows].contiguous()
    halves = {name: tensor.half() for name, tensor in state.items()}
    for name, tensor in state.items():
        if not torch.equal(halves[name].float(), tensor):
            raise ValueError(f"{name} is not exact in fp16; train.py rounds the weights it writes")
    output.write_bytes(save({**halves, "token_rows": rows}))


def pack_validation(output: Path) -> None:
    """Write the validation images, one of each class or more, into an uncompressed zip file."""
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(render.validation_files(VALIDATION_IMAGES, VALIDATION_SEED)):
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write one line per entry."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Pack the demo CLIP into the package's assets.")
    parser.add_argument("--trained", type=Path, required=True, help="output of train.py")
    parser.add_argument("--output", type=Path, required=True, help="asset directory to write")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pack_weights(args.trained, args.output / "weights.safetensors")
    (args.output / "model.json").write_bytes((args.trained / "model.json").read_bytes())
    render.write_shards(args.output, CALIBRATION_SIZES, CALIBRATION_SEED)
    pack_validation(args.output / "val.zip")
    write_lines(args.output / "classnames.txt", render.class_names())
    write_lines(args.output / "templates.txt", list(render.EVALUATION_TEMPLATES))


if __name__ == "__main__":
    main()
