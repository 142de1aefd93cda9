"""The `qwt-fx` program: parsing, exit codes, signals.

Exit codes: 0 done; 1 a bug; 2 bad arguments, bad input or a missing extra; 3 a requested check
failed; 130 / 143 on SIGINT / SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from pathlib import Path
from types import FrameType

import torch

from qwt_fx.batches import ranks
from qwt_fx.commands import bench, demo, evaluate, export
from qwt_fx.commands.config_file import config_arguments
from qwt_fx.commands.inputs import device_of
from qwt_fx.commands.inspect import inspect
from qwt_fx.commands.quantize import quantize
from qwt_fx.commands.sensitivity import sensitivity
from qwt_fx.errors import CheckFailed, ConfigError, QwtError, first_line
from qwt_fx.version import __version__

_LONGEST_NAME = 200
EXIT_BUG, EXIT_INPUT, EXIT_CHECK, EXIT_INTERRUPT, EXIT_TERMINATED = 1, 2, 3, 130, 143
_CODES = {signal.SIGINT: EXIT_INTERRUPT, signal.SIGTERM: EXIT_TERMINATED}
DISTRIBUTED = ("quantize", "eval")  # what torchrun may start as several processes


class _Stopped(BaseException):
    """SIGINT or SIGTERM: unwinds the program, so that nothing half-written is left."""


def build_parser() -> argparse.ArgumentParser:
    """The program's parser with one sub-parser a command."""
    parser = argparse.ArgumentParser(
        prog="qwt-fx",
        description="Quantize CLIP models: RepQ-ViT and QwT as torch.fx passes.",
        epilog="example: qwt-fx demo",
    )
    parser.add_argument("--version", action="version", version=f"qwt-fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, quantize, evaluate, export, bench, inspect, sensitivity):
        command = commands.add_parser(
            module.NAME, help=module.HELP, description=module.__doc__, epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    parser = build_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:  # the command's own usage, not the program's
        args.parser.error(_unrecognized(args.parser, words, unknown))
    if getattr(args, "config", None) is not None:
        # The file's settings go first, so that the flags on the line win.
        settings = config_arguments(args.parser, Path(args.config))
        begin = words.index(args.command) + 1
        args = parser.parse_args(words[:begin] + settings + words[begin:])
    _refuse_dashes(args)
    return args


def _unrecognized(
    parser: argparse.ArgumentParser, words: Sequence[str], unknown: Sequence[str]
) -> str:
    """The message for words that a command does not take: what was meant, where that can be told."""
    message = f"unrecognized arguments: {' '.join(unknown)}"
    flags = {option: a for a in parser._actions for option in a.option_strings}
    first = unknown[0]
    if first.startswith("-"):
        name = first.partition("=")[0]
        close = difflib.get_close_matches(name, flags, n=2, cutoff=0.7)
        return message + (f"; did you mean {' or '.join(close)}?" if close else "")
    at = words.index(first)
    flag = next((word for word in reversed(words[:at]) if word in flags), None)
    if flag is None:
        return message
    values = [*words[words.index(flag) + 1 : at], *unknown]
    joined = next((s for s in (",", ";", "::") if s in str(flags[flag].metavar)), None)
    if flags[flag].metavar == "SPEC":
        joined = "::"
    if joined is None:
        return f"{message}; {flag} takes one value, in quotes where it has spaces"
    given = joined.join(word.strip(joined) for word in values if not word.startswith("-"))
    quoted = f"'{given}'" if joined == ";" else given
    return f"{message}; several values are joined by {joined!r}: {flag} {quoted}"


def _refuse_dashes(args: argparse.Namespace) -> None:
    """argparse drops a value of "--" and leaves an empty list in its place."""
    for name, value in vars(args).items():
        repeated = isinstance(value, list) and args.parser.get_default(name) == []
        if (value == [] and not repeated) or (repeated and [] in value):
            args.parser.error(f"argument --{name.replace('_', '-')}: got '--', wanted a value")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="qwt-fx: %(message)s", level=logging.WARNING)
    logging.getLogger("qwt_fx").setLevel(
        logging.INFO if ranks.launched_first() else logging.ERROR  # one process speaks
    )
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        raise _Stopped

    previous = {number: signal.signal(number, stop) for number in _CODES}
    try:
        code = _run(words)
        return _stopped(received[0]) if received else code
    except BaseException:
        # A library may have turned the interruption into an error of its own.
        if received:
            return _stopped(received[0])
        ranks.current().may_report()  # this is why the others will lose touch
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stopped(number: int) -> int:
    """The exit code of a signal. A launcher ends all processes when one ends: that is said once."""
    among = ranks.current()
    if among.world > 1:
        _say(
            f"rank {among.rank} of {among.world} was stopped by {signal.Signals(number).name}: "
            "another rank has ended, or the run was stopped; no output was written"
        )
    return _CODES[signal.Signals(number)]


def _run(words: list[str]) -> int:
    try:
        with nullcontext() if ranks.launched_first() else redirect_stderr(io.StringIO()):
            args = _parse(words)  # a wrong flag is wrong for every process: one says so
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if ranks.launched():
            if args.command not in DISTRIBUTED:
                raise ConfigError(f"{args.command} runs in one process: start it without torchrun")
            ranks.join(device_of(args))
        args.run(args)
        ranks.leave()
    except BrokenPipeError:  # the reader of our output went away: nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except QwtError as error:
        if "--debug" in words:
            raise
        _say(str(error))
        return EXIT_CHECK if isinstance(error, CheckFailed) else EXIT_INPUT
    except torch.OutOfMemoryError as error:
        if "--debug" in words:
            raise
        remedy = "use a smaller --batch-size or --device cpu"
        _say(f"out of memory on the device: {first_line(error)}; {remedy}")
        return EXIT_INPUT
    except OSError as error:
        # A file named by the user that the system refuses: too long a name, a disk that fails.
        if error.filename is None or "--debug" in words:
            raise
        _say(f"{_shown(error.filename)}: {error.strerror}")
        return EXIT_INPUT
    return 0


def _say(reason: str) -> None:
    """Why the run ends; of several processes, the first to know says it."""
    among = ranks.current()
    if among.may_report() if among.world > 1 else ranks.launched_first():
        # Where a full disk takes the log too, the exit code still tells.
        with suppress(OSError):
            sys.stderr.write(f"qwt-fx: error: {reason}\n")


def _shown(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
