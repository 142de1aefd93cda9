"""What `quantize` and `eval` do with a report: keep an earlier one, show it, pass it on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwt_fx.commands.quantize.run_identity import existing_report
from qwt_fx.commands.screen import ACCURACY_HEADERS, Screen, accuracy_rows
from qwt_fx.errors import ConfigError
from qwt_fx.evaluate.clip_benchmark import RETRIEVAL, ZERO_SHOT, check_template, write_documents


def require_data(args: argparse.Namespace) -> None:
    """Raise `ConfigError` where nothing is to be evaluated, or the template of names is wrong."""
    if args.imagenet_val is None and args.retrieval_data is None:
        raise ConfigError(
            "--imagenet-val DIR (class folders with images) or --retrieval-data SPEC (shards of "
            "image-caption pairs) is needed"
        )
    if args.clip_benchmark_json is not None:
        check_template(args.clip_benchmark_json)


def require_target(args: argparse.Namespace, target: str | None, flag: str) -> None:
    """Raise `ConfigError` for `--resume` or `--skip-existing` where nothing is written."""
    for name in ("resume", "skip_existing"):
        if getattr(args, name) and target is None:
            raise ConfigError(f"--{name.replace('_', '-')} needs {flag}")


def kept_report(
    args: argparse.Namespace, path: Path | None, identity: dict[str, Any], screen: Screen
) -> dict[str, Any] | None:
    """With `--skip-existing`: the report at `path` when it is of this very run; said aloud."""
    if not args.skip_existing or path is None or not path.exists():
        return None
    report = existing_report(path, identity)
    if report is None:
        screen.note(f"--skip-existing: {path} is of other settings or data: evaluating anew")
    else:
        screen.note(f"--skip-existing: {path} is of the same settings and data: kept")
    return report


def finish(args: argparse.Namespace, report: dict[str, Any], screen: Screen) -> None:
    """Show the table; write the files of `--clip-benchmark-json`."""
    if args.clip_benchmark_json is not None:
        write_documents(args.clip_benchmark_json, report, _datasets(args))
    screen.table(accuracy_rows(report), ACCURACY_HEADERS)


def _datasets(args: argparse.Namespace) -> dict[str, str]:
    """A name for the data of each task: `--dataset-name`, else the last part of the path."""
    folder = "" if args.imagenet_val is None else Path(args.imagenet_val).resolve().name
    spec = "" if args.retrieval_data is None else args.retrieval_data
    shards = spec.rpartition("/")[2].partition(".tar")[0]
    return {
        ZERO_SHOT: args.dataset_name or folder,
        RETRIEVAL: args.dataset_name or shards,
    }
