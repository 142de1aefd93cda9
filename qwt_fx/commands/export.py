"""`qwt-fx export`: an artifact's towers as ONNX, pt2 or AOTInductor files, with what runs them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwt_fx import api
from qwt_fx.artifact.artifact import read_artifact
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import PREPROCESS, OutputDirectory, write_text_atomic
from qwt_fx.backends.exports import PACKS, SUFFIXES, check_format
from qwt_fx.backends.onnx.layout import int8_changes_weights
from qwt_fx.backends.onnx.onnx_runtime import audit
from qwt_fx.clip import clip
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.arguments import add_calibration, add_common, add_model, add_sample_keys
from qwt_fx.commands.inputs import check_flags, load_batches, load_model, require_same_inputs
from qwt_fx.commands.screen import Screen, megabytes
from qwt_fx.commands.verify import Exported, Pairs, noise_batches, verify
from qwt_fx.errors import ConfigError, MissingExtraError
from qwt_fx.version import __version__

TOKENIZER = "tokenizer.txt"
NAME, HELP = "export", "write ONNX, pt2 or AOTInductor files"
EXAMPLE = """\
example:
  qwt-fx export --artifact vit-b-32-w8a8 --format onnx --output vit-b-32-onnx \\
      --verify --train-data 'cc3m-train-{0000..0575}.tar'

--verify runs the artifact and the exported files on calibration pairs (on seeded noise without
--train-data), prints cosine, SQNR and top-1 agreement, and exits with code 3 where an export differs
from the artifact by more than rounding can: it has to lie 10 dB below what quantization costs on these
pairs, within 6 dB of what another order of sums does (our x86 backend), or at 40 dB. What quantization
costs is measured against --model, because an artifact holds no FP32 model; without it, against the
artifact with activations in floating point. Files for OpenVINO (--pack int8) run there, too, where it is
installed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to its parser."""
    parser.add_argument("--artifact", metavar="DIR", required=True, help="what quantize wrote")
    parser.add_argument("--format", choices=tuple(SUFFIXES), required=True)
    parser.add_argument("--tower", choices=(*TOWERS, "both"), default="both")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the files")
    parser.add_argument("--force", action="store_true", help="replace a folder of another kind")
    parser.add_argument(
        "--pack",
        choices=PACKS,
        default="auto",
        help="ONNX weights: auto (default), int8 (zero point 0, for OpenVINO) or int4 (small, "
        "multiplied in floating point by ONNX Runtime)",
    )
    parser.add_argument("--verify", action="store_true", help="compare with the artifact")
    add_model(parser)
    add_calibration(parser)
    add_sample_keys(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_format(args.format, args.pack)
    if not args.verify and (args.train_data is not None or args.model is not None):
        raise ConfigError("--train-data and --model are for --verify: give it, or leave them out")
    check_flags(args)
    screen = Screen(args.quiet)
    artifact = read_artifact(Path(args.artifact))
    model = clip.from_artifact(artifact)
    towers = TOWERS if args.tower == "both" else (args.tower,)
    # An export is quick to repeat: what failed leaves nothing.
    with OutputDirectory(Path(args.output), force=args.force, keep_partial=False) as output:
        for tower in towers:
            with screen.phase(f"{tower} tower: export"):
                api.export(
                    artifact.towers[tower],
                    output.path / f"{tower}{SUFFIXES[args.format]}",
                    model.example(tower, 2),
                    format=args.format,
                    pack=args.pack,
                    input_names=(tower,),
                    output_names=(f"{tower}_features",),
                )
        files = sorted(path.name for path in output.path.iterdir() if not path.name.startswith("."))
        document = preprocess_document(model) | {
            "classifier": artifact.extra.get("classifier"), "files": [*files, TOKENIZER]
        }  # fmt: skip
        write_text_atomic(output.path / PREPROCESS, json.dumps(document, indent=1) + "\n")
        write_text_atomic(output.path / TOKENIZER, tokenizer_note(model))
        rows = [_row(output.path, tower, args.format, screen) for tower in towers]
    folder = Path(args.output)
    screen.table(rows, ("tower", "file", "MB", "integer layers"))
    graphs = [artifact.towers[tower] for tower in towers]
    if args.format == "onnx" and args.pack == "auto" and any(map(int8_changes_weights, graphs)):
        screen.note(
            "8-bit weights are uint8, exact on every CPU; --pack int8 is faster in ONNX Runtime "
            "where the CPUs have VNNI"
        )
    if args.verify:
        _verify(args, model, towers, folder, screen)


def _row(folder: Path, tower: str, format: str, screen: Screen) -> list[str]:
    """What was written, and how many layers the runtime computes from integers."""
    name = f"{tower}{SUFFIXES[format]}"
    size = sum(path.stat().st_size for path in folder.glob(f"{name}*"))
    integer = "in floating point"
    if format == "onnx":
        try:
            kernels = audit(folder / name)
        except MissingExtraError as error:
            screen.note(str(error))
            return [tower, name, megabytes(size), "-"]
        integer = f"{sum(k.integer for k in kernels)} of {len(kernels)}"
    return [tower, name, megabytes(size), integer]


def preprocess_document(model: ClipModel) -> JsonObject:
    """Everything an image goes through before `image`, and what embeddings are multiplied by."""
    height, width = model.image_size
    known = model.preprocess
    return {
        "qwt_fx": __version__,
        "model": model.name,
        "image": {
            "input": "image",
            "layout": "n, 3, height, width; float32; RGB",
            "height": height,
            "width": width,
            "resize_mode": known["resize_mode"],
            "interpolation": known["interpolation"],
            "fill_color": known["fill_color"],
            "color": "RGB of 8 bits before resizing: alpha dropped, grey repeated, 16 bits >> 8",
            "exif_rotation": "ignored",
            "scale": 1.0 / 255.0,
            "mean": list(known["mean"]),
            "std": list(known["std"]),
            "steps": "convert to RGB, resize (antialiased), crop the centre, times scale, minus mean, "
            "over std",
        },
        "text": {
            "input": "text",
            "layout": "n, length; int64; length <= context_length",
            "context_length": model.context_length,
        },
        "outputs": {"image": "image_features", "text": "text_features", "normalized": False},
        "logit_scale": model.logit_scale,
    }


def tokenizer_note(model: ClipModel) -> str:
    """How texts become token ids."""
    config = model.tokenizer_config
    source = config["source"]
    known = (
        "CLIP's own byte-pair encoding (bpe_simple_vocab_16e6.txt.gz of OpenAI's CLIP): lower case,\n"
        "start token 49406, end token 49407, padded with 0. From Python: open_clip.SimpleTokenizer,\n"
        "or transformers.CLIPTokenizerFast of openai/clip-vit-base-patch32 (pad with 0)."
        if source is None
        else f"the tokenizer of {source} (transformers.AutoTokenizer), cleaned as open_clip's\n"
        f"HFTokenizer does with {json.dumps(config['kwargs'])}."
    )
    return (
        f"The text tower of {model.name} reads token ids (n, length) int64, at most "
        f"{model.context_length} a text.\nThey are made by {known}\n"
    )


def _verify(
    args: argparse.Namespace,
    model: ClipModel,
    towers: tuple[str, ...],
    folder: Path,
    screen: Screen,
) -> None:
    if args.train_data is None:
        batches: Pairs = noise_batches(model)
        screen.note(
            f"--verify without --train-data: the inputs are {len(batches[0][0])} pairs of seeded "
            "noise, not real ones"
        )
    else:
        batches = load_batches(args, model, screen, 0, None).batches
    floating = None
    if args.model is None:
        screen.note("an artifact holds no FP32 model: give --model to compare with it")
    else:
        args.device = "cpu"
        floating = load_model(args)
        require_same_inputs(model, floating)
    files = {tower: folder / f"{tower}{SUFFIXES[args.format]}" for tower in towers}
    exported = Exported(files, args.format, args.pack)
    verify(model, floating, exported, batches, screen, args.threads)
