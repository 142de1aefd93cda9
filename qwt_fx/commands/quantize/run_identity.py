"""What an evaluation is of: the flags and data that decide its numbers, in a digest and in full.

Two runs of the same identity give the same report, so that a finished one may be kept
(`--skip-existing`) and an interrupted one continued (`--resume`). Data are told apart by names,
sizes and times of change, an artifact by its index, which holds the digest of each of its files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qwt_fx.artifact.artifact_index import INDEX
from qwt_fx.commands.inputs import device_of
from qwt_fx.data.shards import expand
from qwt_fx.data.stream_shard import is_remote
from qwt_fx.inspect.report import SCHEMA
from qwt_fx.version import __version__

# What does not change a number, or is told elsewhere.
_LEFT_OUT = frozenset(
    "run parser command output report force resume skip_existing clip_benchmark_json dataset_name "
    "quiet debug threads workers config max_drop device memory_budget".split()
)
_FILES = ("model", "pretrained", "classnames", "templates", "class_map")


def run_identity(args: argparse.Namespace) -> dict[str, Any]:
    """The `run` entry of report.json: {"digest": text, "settings": {name: JSON value}}."""
    settings = {name: value for name, value in vars(args).items() if name not in _LEFT_OUT}
    settings |= {
        "device": device_of(args),
        "qwt_fx": __version__,
        "torch": torch.__version__,
        "data": _data(args),
    }
    plain = json.loads(json.dumps(settings, sort_keys=True))
    text = json.dumps(plain, sort_keys=True).encode()
    return {"digest": hashlib.sha256(text).hexdigest(), "settings": plain}


def existing_report(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The report at `path` when it is one of this very run, else `None`."""
    report = read_report(path)
    try:
        same = report is not None and report["run"]["digest"] == run["digest"]
        return report if same and report is not None and report["schema"] == SCHEMA else None
    except (KeyError, TypeError):
        return None


def read_report(path: Path) -> dict[str, Any] | None:
    """A report of any run; `None` where there is none that can be read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def _data(args: argparse.Namespace) -> dict[str, str]:
    """A digest of every file and folder that a flag names."""
    digests = {}
    for flag in _FILES:
        value = getattr(args, flag, None)
        path = None if value is None else str(value).removeprefix("local-dir:")
        if path is not None and os.path.isdir(path):
            digests[flag] = _digest(_below(path))
        elif path is not None and path.endswith(".index.json") and os.path.isfile(path):
            digests[flag] = _digest(_below(os.path.dirname(path) or "."))
        elif path is not None and os.path.isfile(path):
            digests[flag] = _digest([path])
    if (artifact := getattr(args, "artifact", None)) is not None:
        index = Path(artifact) / INDEX
        if index.is_file():
            digests["artifact"] = hashlib.sha256(index.read_bytes()).hexdigest()
    if (folder := getattr(args, "imagenet_val", None)) is not None:
        digests["imagenet_val"] = _digest(_below(folder))
    if (pairs := getattr(args, "retrieval_data", None)) is not None:
        digests["retrieval_data"] = _digest(expand(pairs))
    if (data := getattr(args, "train_data", None)) is not None:
        digests["train_data"] = _digest(_calibration_files(data, args.dataset_type))
    return digests


def _calibration_files(spec: str, kind: str) -> Iterable[str]:
    if kind == "csv":
        return [spec]
    return {"webdataset": expand, "imagefolder": _below}[kind](spec)


def _below(folder: str) -> Iterable[str]:
    """Every file under a folder, sorted."""
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def _digest(paths: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        entry: tuple[Any, ...] = (path,)
        if not is_remote(path) and os.path.exists(path):
            status = os.stat(path)
            entry = (path, status.st_size, status.st_mtime_ns)
        digest.update(repr(entry).encode())
    return digest.hexdigest()
