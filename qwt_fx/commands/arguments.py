"""The flags of the program, in the groups of the contract: MODEL, CALIBRATION, QUANT, EVAL."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress

from qwt_fx.batches.value_store import parse_size
from qwt_fx.clip.preprocessing import INTERPOLATIONS, RESIZE_MODES
from qwt_fx.config import config as quant
from qwt_fx.config import layer_bits
from qwt_fx.data.data import DATASET_TYPES
from qwt_fx.errors import ConfigError

CHOICES = {"fp32_eval": "none", "image_only": "image", "all_quant": "both"}
TOWER_SETS = {"none": (), "image": ("image",), "text": ("text",), "both": ("image", "text")}
DEFAULT_SAMPLES = 512
MAX_THREADS = 1024


def whole(text: str) -> int:
    """A whole number."""
    with suppress(ValueError):
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number")


def number(text: str) -> float:
    """A number that is finite."""
    with suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at least 1")
    return value


def threads(text: str) -> int:
    """A number of threads that a system can start."""
    value = positive(text)
    if value > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at most {MAX_THREADS}")
    return value


def natural(text: str) -> int:
    """A whole number of at least 0."""
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at least 0")
    return value


def size(text: str) -> int:
    """Bytes."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None


def bits(text: str) -> int:
    """A bit width: 2..8, or 16 / 32 for not quantized."""
    value = whole(text)
    if (
        not layer_bits.MIN_BITS <= value <= layer_bits.MAX_BITS
        and value not in layer_bits.FLOAT_BITS
    ):
        raise argparse.ArgumentTypeError(f"got {value}, wanted 2..8 (16 or 32 = not quantized)")
    return value


def compensation(text: str) -> str:
    """A kind of compensation, or auto."""
    try:
        quant.check_compensation(text)
    except ConfigError as error:
        message = str(error).removeprefix("compensation: ")  # argparse names the flag
        raise argparse.ArgumentTypeError(message) from None
    return text


def override(text: str) -> tuple[str, str]:
    """`GLOB=wNaM`, with d or s behind it for dynamic or static activations, or `GLOB=skip`."""
    glob, equals, value = text.rpartition("=")
    if not equals or not glob:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted GLOB=w8a8 or GLOB=skip")
    try:
        layer_bits.parse_override(glob, value)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return glob, value


def remedy(text: str) -> tuple[str, object]:
    """`NAME=VALUE` of one of the recipe's remedies."""
    name, equals, value = text.partition("=")
    known = (*quant.REMEDIES, "token_masks")
    if not equals or name not in known:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted NAME=VALUE with NAME one of {', '.join(known)}"
        )
    parsed = _plain_value(value)
    try:
        quant.QuantConfig.from_dict({name: parsed})
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, parsed


def _plain_value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def add_model(parser: argparse.ArgumentParser) -> None:
    """The MODEL flags."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME|FILE.json", help="open_clip name or config JSON")
    group.add_argument(
        "--pretrained",
        metavar="TAG|FILE",
        help="open_clip tag, checkpoint file, or folder of shards",
    )
    group.add_argument(
        "--allow-torchscript",
        action="store_true",
        help="run the code in a TorchScript checkpoint that cannot be read without it",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--image-{name}", nargs=3, type=number, metavar=("R", "G", "B"),
            help="of pixels in [0, 1], instead of the model's own",
        )  # fmt: skip
    group.add_argument("--resize-mode", choices=RESIZE_MODES, help="instead of the model's own")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="instead of the model's own")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda[:N] (default auto)")
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the parts that stay in floating point (default fp32)",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The CALIBRATION flags."""
    group = parser.add_argument_group("calibration")
    group.add_argument("--train-data", metavar="SPEC", help="shards, brace ranges, :: joined")
    group.add_argument("--dataset-type", choices=DATASET_TYPES, default=DATASET_TYPES[0])
    group.add_argument(
        "--calib-samples", type=positive, metavar="N", help=f"default {DEFAULT_SAMPLES}"
    )
    group.add_argument("--iter", type=positive, metavar="K", help="= --calib-samples K*B")
    group.add_argument("--batch-size", type=positive, default=128, metavar="B")
    group.add_argument("--workers", type=natural, default=0, metavar="N")
    group.add_argument("--seed", type=natural, default=1)


def add_sample_keys(parser: argparse.ArgumentParser) -> None:
    """The flags that say what a sample of --train-data and --retrieval-data is."""
    group = parser.add_argument_group("extensions of samples in shards, or columns of a csv file")
    group.add_argument(
        "--image-key",
        metavar="EXT[;EXT]",
        help="of images, the first that is there (default jpg;jpeg;png;webp; csv: filepath)",
    )
    group.add_argument(
        "--caption-key",
        metavar="EXT[;EXT]",
        help="of captions, json:KEY for a key of a JSON file (default txt;json:caption; csv: title). An "
        "extension is all that follows the first dot of a name, as in webdataset",
    )


def add_quant(parser: argparse.ArgumentParser) -> None:
    """The QUANT flags."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--choice", choices=tuple(CHOICES), help="default all_quant")
    group.add_argument("--towers", choices=tuple(TOWER_SETS))
    group.add_argument("--wq_params", "--w-bits", dest="w_bits", type=bits, default=8, metavar="N")
    group.add_argument("--aq_params", "--a-bits", dest="a_bits", type=bits, default=8, metavar="N")
    group.add_argument("--recipe", choices=quant.RECIPES, default="best")
    group.add_argument("--compat", choices=quant.COMPATS, default="none")
    group.add_argument(
        "--compensation",
        type=compensation,
        default="auto",
        metavar="KIND",
        help="auto (the recipe's own, default), none, qwt, affine, lowrank:R or int8",
    )
    group.add_argument(
        "--qwerty",
        "--qwt",
        dest="compensation",
        action="store_const",
        const="qwt",
        help="= --compensation qwt",
    )
    group.add_argument("--attention", choices=quant.ATTENTIONS, default="none")
    group.add_argument(
        "--activations", choices=quant.ACTIVATIONS, default="static",
        help="ranges of linears' inputs: from calibration (default), or of each token when it runs",
    )  # fmt: skip
    group.add_argument(
        "--override", action="append", type=override, metavar="GLOB=w8a8[d|s]|skip", default=[]
    )
    group.add_argument(
        "--exceptions",
        type=number,
        default=0.0,
        metavar="SHARE",
        help="8 bits for the most sensitive layers until weights are this share larger (default 0)",
    )
    group.add_argument(
        "--remedy",
        action="append",
        type=remedy,
        metavar="NAME=VALUE",
        default=[],
        help=f"set one remedy of the recipe: {', '.join(quant.REMEDIES)}, token_masks",
    )
    group.add_argument("--config", metavar="FILE.toml", help="any of these flags; flags win")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The EVAL flags."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--imagenet-val", metavar="DIR", help="class folders with images")
    group.add_argument("--classnames", metavar="FILE", help="one per line, sorted-folder order")
    group.add_argument("--templates", metavar="FILE", help="one per line, with {}")
    group.add_argument(
        "--class-map",
        metavar="FILE|index",
        help="class of each folder: lines FOLDER INDEX or JSON; index: the folders' names are it",
    )
    group.add_argument(
        "--retrieval-data", metavar="SPEC", help="shards of images with one caption a line"
    )
    group.add_argument(
        "--dataset-name", metavar="NAME", help="of the data, in --clip-benchmark-json"
    )
    group.add_argument(
        "--clip-benchmark-json",
        metavar="FILE",
        help="results as CLIP_benchmark writes them; {dataset}, {model}, {pretrained}, {task} in "
        "the name are filled in",
    )
    group.add_argument(
        "--skip-existing", action="store_true", help="keep a report of the same settings and data"
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of every command."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--threads", type=threads, metavar="N", help="CPU threads")


def towers_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The towers `--choice` or `--towers` names. Raises `ConfigError` when the two differ."""
    from_choice = None if args.choice is None else CHOICES[args.choice]
    if from_choice is not None and args.towers is not None and from_choice != args.towers:
        raise ConfigError(
            f"--choice {args.choice} means --towers {from_choice}, but --towers is {args.towers}; "
            "give one of them"
        )
    return TOWER_SETS[args.towers or from_choice or "both"]


def samples_of(args: argparse.Namespace) -> int:
    """Calibration samples. Raises `ConfigError` when `--iter` and `--calib-samples` differ."""
    by_batches = None if args.iter is None else args.iter * args.batch_size
    if by_batches is not None and args.calib_samples not in (None, by_batches):
        raise ConfigError(
            f"--iter {args.iter} x --batch-size {args.batch_size} = {by_batches} samples, but "
            f"--calib-samples is {args.calib_samples}; give one of them"
        )
    return by_batches or args.calib_samples or DEFAULT_SAMPLES


def quant_config(args: argparse.Namespace) -> quant.QuantConfig:
    """The validated `QuantConfig` of the flags."""
    plain = {name: getattr(args, name) for name in quant.FIELDS}
    return quant.QuantConfig(**plain, overrides=dict(args.override), **dict(args.remedy))
