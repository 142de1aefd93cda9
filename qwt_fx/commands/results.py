"""What `quantize` and `eval` do with a report: keep an earlier one or make it, show it, pass it on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from qwt_fx.artifact.artifact_index import INDEX
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import REPORT, OutputDirectory, write_text_atomic
from qwt_fx.batches import ranks
from qwt_fx.commands.quantize.partial_run import PartialRun
from qwt_fx.commands.quantize.run_identity import existing_report, read_report, run_identity
from qwt_fx.commands.screen import ACCURACY_HEADERS, Screen, accuracy_rows
from qwt_fx.errors import ConfigError
from qwt_fx.evaluate.clip_benchmark import RETRIEVAL, ZERO_SHOT, check_template, write_documents
from qwt_fx.inspect.report import to_json

DATA_FLAGS = (
    "--imagenet-val DIR (class folders with images) or --retrieval-data SPEC (shards of image-caption "
    "pairs)"
)


def require_data(args: argparse.Namespace) -> None:
    """Raise `ConfigError` where nothing is to be evaluated, or the template of names is wrong."""
    if args.imagenet_val is None and args.retrieval_data is None:
        raise ConfigError(f"{DATA_FLAGS} is needed")
    if args.clip_benchmark_json is not None:
        check_template(args.clip_benchmark_json)


def require_target(args: argparse.Namespace, target: str | None, flag: str) -> None:
    """Raise `ConfigError` for `--resume` or `--skip-existing` where nothing is written."""
    for name in ("resume", "skip_existing"):
        if getattr(args, name) and target is None:
            raise ConfigError(f"--{name.replace('_', '-')} needs {flag}")


def with_report(
    args: argparse.Namespace,
    kept: Callable[[JsonObject, Screen], JsonObject | None],
    make: Callable[[JsonObject, Screen], JsonObject],
) -> JsonObject | None:
    """The report of this run, shown: an earlier one where `kept` returns it, else what `make` returns.

    Both get the run's identity. On all ranks but the first, `make` does that rank's part, and the
    result is `None`. Raises `ConfigError` for `--resume` in a run of several processes.
    """
    among = ranks.current()
    if args.resume and among.world > 1:
        raise ConfigError("--resume: goes on in one process only; start without torchrun")
    screen = Screen(args.quiet, muted=not among.first)
    identity = run_identity(args)
    report: JsonObject | None = among.from_first(lambda: kept(identity, screen))
    if report is None:
        report = make(identity, screen)
    if not among.first:
        return None
    if args.clip_benchmark_json is not None:
        write_documents(args.clip_benchmark_json, report, _datasets(args))
    screen.table(accuracy_rows(report), ACCURACY_HEADERS)
    if args.imagenet_val is None and args.retrieval_data is None:
        screen.note(f"accuracy was not measured: give {DATA_FLAGS} to quantize or eval")
    return report


def in_output_directory(
    args: argparse.Namespace,
    identity: JsonObject,
    screen: Screen,
    make: Callable[[PartialRun, Path], JsonObject],
) -> JsonObject:
    """The report of `make`, called with the working folder of `--output`, which then holds it, too."""
    directory = OutputDirectory(Path(args.output), force=args.force, resume=args.resume)
    say_if_nothing_to_resume(args.resume, directory.path, screen)
    with directory as output:
        say_what_is_replaced(output.target, identity, screen)
        partial = PartialRun(output.path, identity, resume=args.resume)
        with partial:
            report = make(partial, output.path)
            write_text_atomic(output.path / REPORT, to_json(report))
    return report


def say_if_nothing_to_resume(resume: bool, folder: Path, screen: Screen) -> None:
    """With `--resume`: a note where an earlier run left nothing in its working folder."""
    if resume and not any(not p.name.startswith(".") for p in folder.glob("*")):
        screen.note(f"--resume: {folder} holds nothing to go on with: starting anew")


def say_what_is_replaced(target: Path, identity: JsonObject, screen: Screen) -> None:
    """A note on the artifact that makes way when this run is complete, and what it was made with."""
    if not (target / INDEX).is_file():
        return
    try:
        report = read_report(target / REPORT) or {}
        there, here = report["run"]["settings"], identity["settings"]
        differing = [key for key in there if there[key] != here.get(key)]
    except (KeyError, TypeError):
        screen.note(f"--output {target}: replaces the artifact there when this run is complete")
        return
    made = ", ".join(f"{key} {there[key]}" for key in differing if key != "data")
    what = f"made with {made}" if made else "of other data" if differing else "of the same settings"
    screen.note(
        f"--output {target}: replaces the artifact there, {what}, when this run is complete"
    )


def kept_report(
    args: argparse.Namespace, path: Path | None, identity: JsonObject, screen: Screen
) -> JsonObject | None:
    """With `--skip-existing`: the report at `path` when it is of this very run; said aloud."""
    if not args.skip_existing or path is None or not path.exists():
        return None
    report = existing_report(path, identity)
    if report is None:
        screen.note(f"--skip-existing: {path} is of other settings or data: evaluating anew")
    else:
        screen.note(f"--skip-existing: {path} is of the same settings and data: kept")
    return report


def _datasets(args: argparse.Namespace) -> dict[str, str]:
    """A name for the data of each task: `--dataset-name`, else the last part of the path."""
    folder = "" if args.imagenet_val is None else Path(args.imagenet_val).resolve().name
    spec = "" if args.retrieval_data is None else args.retrieval_data
    shards = spec.rpartition("/")[2].partition(".tar")[0]
    return {
        ZERO_SHOT: args.dataset_name or folder,
        RETRIEVAL: args.dataset_name or shards,
    }
