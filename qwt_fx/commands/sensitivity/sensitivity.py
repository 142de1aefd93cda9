"""`qwt-fx sensitivity`: what each layer costs at each bit width, and the best bits under a budget."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from qwt_fx.artifact.output import write_text_atomic
from qwt_fx.commands.arguments import (
    add_calibration,
    add_common,
    add_model,
    add_quant,
    add_sample_keys,
    number,
    positive,
    quant_config,
    towers_of,
)
from qwt_fx.commands.inputs import check_flags, load_batches, load_model
from qwt_fx.commands.quantize.pipeline import capture_towers
from qwt_fx.commands.quantize.run_identity import run_identity
from qwt_fx.commands.results import say_if_nothing_to_resume
from qwt_fx.commands.screen import Screen
from qwt_fx.commands.sensitivity.bit_search import BitSearch, SearchState, Trial, candidates
from qwt_fx.commands.sensitivity.bit_search_output import (
    found_config,
    report_text,
    show_losses,
    show_trials,
)
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import CheckFailed, ConfigError
from qwt_fx.measure.bit_losses import WEIGHT, BitLoss
from qwt_fx.measure.mixed_precision import (
    Choice,
    by_operand,
    choose_bits,
    frontier,
)

STATISTICS = 32
JUDGES = 256
NAME, HELP = "sensitivity", "measure each layer at each bit width; find the best bits"
EXAMPLE = """\
examples:
  qwt-fx sensitivity --model ViT-B-32 --pretrained openai \\
      --train-data 'cc3m-train-{0000..0575}.tar' --max-size '4 bits' --output mixed.toml
  qwt-fx quantize --config mixed.toml --model ViT-B-32 --pretrained openai \\
      --train-data 'cc3m-train-{0000..0575}.tar' --output vit-b-32-mixed
"""
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*(bits?|B|kB|MB|GB|)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def size(text: str) -> tuple[float, bool]:
    """`"2500000"`, `"2.5 MB"` -> (bytes, False); `"4 bits"` -> (4, True)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match.group(1)) <= 0.0:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted bytes, '2.5 MB' or '4 bits'")
    unit = match.group(2).lower()
    if unit.startswith("bit"):
        return float(match.group(1)), True
    return float(match.group(1)) * _UNITS[unit], False


def widths(text: str) -> list[int]:
    """`"4,6,8"` as bit widths in 2..8."""
    words = [word.strip() for word in text.split(",")]
    if not all(word in "2345678" and len(word) == 1 for word in words):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted widths in 2..8 joined by commas such as 4,6,8"
        )
    return [int(word) for word in words]


def points(text: str) -> float:
    """Percentage points in [0, 100)."""
    value = number(text)
    if not 0.0 <= value < 100.0:
        raise argparse.ArgumentTypeError(f"got {text}, wanted percentage points in [0, 100)")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to its parser."""
    for add in (add_model, add_calibration, add_sample_keys, add_quant):
        add(parser)
    group = parser.add_argument_group("search")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--max-size",
        type=size,
        metavar="SIZE",
        help="bytes ('2.5 MB') of the quantized towers' files, or the weights of uniform 'N bits'",
    )
    budget.add_argument(
        "--max-drop",
        type=points,
        metavar="POINTS",
        help="at most this percentage of calibration images may change their nearest caption",
    )
    group.add_argument(
        "--candidates", type=widths, default=[4, 6, 8], metavar="4,6,8", help="bit widths to try"
    )
    group.add_argument(
        "--max-act-bits", type=positive, default=8, metavar="N", help="of activations (default 8)"
    )
    group.add_argument(
        "--statistics-samples",
        type=positive,
        default=STATISTICS,
        metavar="N",
        help=f"the first pairs, which measure the layers (default {STATISTICS}); the others of "
        f"--calib-samples (default here {STATISTICS + JUDGES}) judge whole models",
    )
    group.add_argument("--output", metavar="FILE.toml", help="configuration for quantize --config")
    group.add_argument("--report", metavar="FILE", help="write every figure here, as JSON")
    group.add_argument(
        "--resume", action="store_true", help="go on with what FILE.toml.partial holds"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_flags(args, "model", "train_data")
    config, screen = quant_config(args), Screen(args.quiet)
    _check(args, config)
    if args.calib_samples is None and args.iter is None:
        args.calib_samples = args.statistics_samples + JUDGES
    search = _open(args, config, screen)
    losses = search.measure()
    choice, trials = _search(args, search, losses)
    show_losses(screen, losses, choice)
    show_trials(screen, trials)
    if args.report is not None:
        write_text_atomic(Path(args.report), report_text(args, search, losses, choice, trials))
    if choice is not None:
        text = found_config(search, losses, choice, trials[-1][1])
        write_text_atomic(Path(args.output), text)
        screen.note(f"wrote {args.output}: edit it, then qwt-fx quantize --config {args.output}")
    search.state.remove()


def _check(args: argparse.Namespace, config: QuantConfig) -> None:
    """Raise `ConfigError` for flags that do not go together."""
    searching = args.max_size is not None or args.max_drop is not None
    if searching and args.output is None:
        raise ConfigError("--output FILE.toml is needed with --max-size and --max-drop")
    if args.output is not None and not searching:
        raise ConfigError("--output needs --max-size or --max-drop: what is searched for")
    if args.resume and args.output is None:
        raise ConfigError("--resume needs --output: it goes on with FILE.toml.partial")
    if not towers_of(args):
        raise ConfigError("--choice fp32_eval: wanted a tower to quantize")
    if config.exceptions > 0.0 or config.compat == "original":
        raise ConfigError(
            "--exceptions and --compat original: sensitivity finds the bits of layers itself, for "
            "models that can be saved; leave them out"
        )


def _open(args: argparse.Namespace, config: QuantConfig, screen: Screen) -> BitSearch:
    inputs = [width for width in args.candidates if width <= args.max_act_bits]
    searched = candidates(config, args.candidates, inputs)
    if not inputs and searched[WEIGHT]:
        raise ConfigError(
            f"--max-act-bits {args.max_act_bits}: no candidate of {_listed(args.candidates)} is that "
            "narrow; add one, or give more"
        )
    if sum(len(w) > 1 for w in searched.values()) == 0:
        raise ConfigError(
            f"--candidates {_listed(args.candidates)}: one width leaves nothing to choose, "
            "wanted two or more such as 4,8"
        )
    path = None if args.output is None else Path(f"{args.output}.partial")
    if path is not None:
        say_if_nothing_to_resume(args.resume, path, screen)
    settings = run_identity(args)["settings"]
    # The budget decides what is done with the losses, not the losses.
    settings = {k: v for k, v in settings.items() if k not in ("max_size", "max_drop", "report")}
    state = SearchState(path, settings, resume=args.resume)
    model = load_model(args)
    data = load_batches(args, model, screen, 0, None)
    images, texts = (torch.cat([b[i] for b in data.batches]).to(model.device) for i in (0, 1))
    first = args.statistics_samples
    if len(images) <= first:
        raise ConfigError(
            f"{len(images)} calibration pairs, {first} of which measure the layers "
            "(--statistics-samples): none is left to judge; give fewer of these, or more --calib-samples"
        )
    return BitSearch(
        capture_towers(model, {}),
        towers_of(args),
        config,
        searched,
        (images[:first], texts[:first]),
        (images[first:], texts[first:]),
        state,
        screen,
    )


def _listed(widths: Sequence[int]) -> str:
    return ",".join(map(str, widths))


def _search(
    args: argparse.Namespace, search: BitSearch, losses: list[BitLoss]
) -> tuple[Choice | None, list[tuple[str, Trial]]]:
    """The choice within the budget, and what was tried, the choice last."""
    if args.max_size is not None:
        value, uniform = args.max_size
        whole = value * _weights(losses) / 8 if uniform else value - search.other_bytes()
        choice = choose_bits(losses, whole + 1e-6)
        lowest = _uniform(losses)
        trials = [("narrowest everywhere", search.try_out(lowest))]
        return choice, [*trials, ("chosen", search.try_out(choice))]
    if args.max_drop is not None:
        return _within_drop(args.max_drop, search, losses)
    return None, []


def _within_drop(
    limit: float, search: BitSearch, losses: list[BitLoss]
) -> tuple[Choice, list[tuple[str, Trial]]]:
    """The smallest choice of the frontier that keeps to the limit, by bisection."""
    choices = frontier(losses)
    tried = [("widest", search.try_out(choices[-1]))]
    if _drop(tried[0][1]) > limit:
        raise CheckFailed(
            f"even the widest candidates change {_drop(tried[0][1]):.2f} % of the nearest captions, "
            f"more than --max-drop {limit:g}"
        )
    low, high = -1, len(choices) - 1  # low is too small, high is good
    while high - low > 1:
        middle = (low + high) // 2
        trial = search.try_out(choices[middle])
        tried.append((f"step {middle} of {len(choices) - 1}", trial))
        low, high = (low, middle) if _drop(trial) <= limit else (middle, high)
    return choices[high], [*tried, ("chosen", search.try_out(choices[high]))]


def _drop(trial: Trial) -> float:
    return 100.0 * (1.0 - trial.agreement)


def _weights(losses: Sequence[BitLoss]) -> int:
    """Number of weights searched."""
    return sum(rows[0].elements for rows in by_operand(losses).values())


def _uniform(losses: Sequence[BitLoss]) -> Choice:
    """The narrowest width of every operand, activations too."""
    return {operand: rows[0].bits for operand, rows in by_operand(losses).items()}
