"""The `qwt-fx` program: parsing, exit codes, signals.

Exit codes: 0 done; 1 a bug; 2 bad arguments, bad input or a missing extra; 3 a requested check
failed; 130 / 143 on SIGINT / SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from qwt_fx.commands import demo, evaluate, inspect, quantize
from qwt_fx.commands.config_file import config_arguments
from qwt_fx.errors import CheckFailed, QwtError
from qwt_fx.version import __version__

EXIT_BUG, EXIT_INPUT, EXIT_CHECK, EXIT_INTERRUPT, EXIT_TERMINATED = 1, 2, 3, 130, 143


class _Terminated(BaseException):
    """SIGTERM: unwinds like an interrupt, so that nothing half-written is left."""


def build_parser() -> argparse.ArgumentParser:
    """The program's parser with one sub-parser a command."""
    parser = argparse.ArgumentParser(
        prog="qwt-fx",
        description="Quantize CLIP models: RepQ-ViT and QwT as torch.fx passes.",
        epilog="example: qwt-fx demo",
    )
    parser.add_argument("--version", action="version", version=f"qwt-fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, quantize, evaluate, inspect):
        module.add_parser(commands)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(words)
    if getattr(args, "config", None) is not None:
        # The file's settings go first, so that the flags on the line win.
        settings = config_arguments(args.parser, Path(args.config))
        begin = words.index(args.command) + 1
        args = parser.parse_args(words[:begin] + settings + words[begin:])
    return args


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    logging.basicConfig(format="qwt-fx: %(message)s", level=logging.WARNING)
    logging.getLogger("qwt_fx").setLevel(logging.INFO)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        args = _parse(words)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        args.run(args)
    except QwtError as error:
        if debug:
            raise
        sys.stderr.write(f"qwt-fx: error: {error}\n")
        return EXIT_CHECK if isinstance(error, CheckFailed) else EXIT_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPT
    except _Terminated:
        return EXIT_TERMINATED
    except BrokenPipeError:  # the reader of our output went away: nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0
