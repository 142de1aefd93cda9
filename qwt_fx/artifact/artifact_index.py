"""`artifact.json`: what an artifact consists of, and the checks that its files are those.

The index carries a digest of its own content, as any other file's damage is found through it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from qwt_fx.artifact.json_values import MAX_BYTES, Json, digest, loads, shown
from qwt_fx.errors import ArtifactError
from qwt_fx.version import __version__

SCHEMA = 1
INDEX = "artifact.json"
SCHEMA_KEY = "qwt_fx_artifact"
GRAPH_KIND, CLIP_KIND = "graph", "clip"
_SUFFIXES = (".graph.json", ".safetensors")
_TOWER = re.compile(r"[a-z][a-z0-9_]{0,40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {
    SCHEMA_KEY: int,
    "kind": str,
    "versions": dict,
    "towers": list,
    "config": dict,
    "extra": dict,
    "files": dict,
    "sha256": str,
}
_CHUNK = 1 << 20


class FileEntry(TypedDict):
    """What the index records of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ArtifactIndex:
    """A checked `artifact.json`; `config` and `extra` still hold `json_values.plain` values."""

    kind: str
    towers: tuple[str, ...]
    config: dict[str, Json]
    extra: dict[str, Json]
    versions: dict[str, str]
    files: dict[str, tuple[int, str]]


def require_tower_name(name: object) -> None:
    """Raises `ArtifactError` for a tower's name that is not a plain file name's first part."""
    if not isinstance(name, str) or not _TOWER.fullmatch(name):
        raise ArtifactError(f"tower name {shown(name)}: wanted lower-case letters, digits and _")


def kind_of(towers: list[str]) -> str:
    """The kind of artifact that these towers make."""
    return GRAPH_KIND if towers == ["model"] else CLIP_KIND


def index_document(
    towers: list[str],
    config: dict[str, Json],
    extra: dict[str, Json],
    files: Mapping[str, FileEntry],
) -> dict[str, Json]:
    """The content of `artifact.json`, its own digest included."""
    document: dict[str, Json] = {
        SCHEMA_KEY: SCHEMA,
        "kind": kind_of(towers),
        "versions": {"qwt_fx": __version__, "torch": str(torch.__version__)},
        "towers": [*towers],
        "config": config,
        "extra": extra,
        "files": {
            name: {"bytes": entry["bytes"], "sha256": entry["sha256"]}
            for name, entry in files.items()
        },
    }
    return document | {"sha256": digest(document)}


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, as the index records them. Raises `OSError`."""
    size, sha256 = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            sha256.update(chunk)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def plain_file(directory: Path, name: str) -> Path:
    """The path of an artifact's file.

    Raises `ArtifactError` for a file that is missing, is not a plain file, or leaves the directory
    through a link.
    """
    path = directory / name
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
        if not inside:
            raise ArtifactError(f"{name}: is a link that leaves {directory}")
        if not path.is_file():
            raise ArtifactError(f"{name}: missing, or not a plain file, in {directory}")
    except (OSError, RuntimeError) as error:  # links that go round, names that are too long
        raise ArtifactError(f"{name}: cannot be read: {error}") from None
    return path


def read_file(directory: Path, name: str) -> bytes:
    """The bytes of an artifact's JSON file. Raises `ArtifactError` naming the file."""
    path = plain_file(directory, name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{name}: cannot be read: {error.strerror}") from None
    return data


def read_index(directory: Path) -> ArtifactIndex:
    """Read and check `artifact.json`.

    Raises `ArtifactError` for a folder that is no artifact, one from the future, and an index that
    is damaged or names files an artifact does not have.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such folder, wanted a qwt-fx artifact")
    if not (directory / INDEX).exists():
        raise ArtifactError(f"{directory} is not a qwt-fx artifact: it has no {INDEX}")
    document = loads(read_file(directory, INDEX), INDEX)
    if not isinstance(document, dict) or SCHEMA_KEY not in document:
        raise ArtifactError(f"{INDEX}: {directory} is not a qwt-fx artifact: no key {SCHEMA_KEY}")
    schema = document[SCHEMA_KEY]
    if type(schema) is not int or schema < 1:
        raise ArtifactError(f"{INDEX}: schema {shown(schema)} is not known")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{INDEX}: schema {schema} is newer than this qwt-fx {__version__} reads ({SCHEMA}): "
            "pip install --upgrade qwt-fx"
        )
    if set(document) != set(_KEYS):
        raise ArtifactError(f"{INDEX}: damaged: wanted the keys {', '.join(sorted(_KEYS))}")
    for key, kind in _KEYS.items():
        if not isinstance(document[key], kind):
            raise ArtifactError(f"{INDEX}: damaged: {key}: wanted a {kind.__name__}")
    content = {key: value for key, value in document.items() if key != "sha256"}
    if digest(content) != document["sha256"]:
        raise ArtifactError(f"{INDEX}: damaged: its content does not have the recorded SHA-256")
    return _parse(document)


def _parse(document: dict[str, Any]) -> ArtifactIndex:
    towers, versions = document["towers"], document["versions"]
    for name in towers:
        try:
            require_tower_name(name)
        except ArtifactError as error:
            raise ArtifactError(f"{INDEX}: {error}") from None
    if not towers or len(set(towers)) != len(towers) or kind_of(towers) != document["kind"]:
        raise ArtifactError(
            f"{INDEX}: the towers {shown(towers)} do not make a {shown(document['kind'])}"
        )
    if not all(isinstance(value, str) for value in versions.values()):
        raise ArtifactError(f"{INDEX}: versions: wanted texts")
    wanted = {f"{name}{suffix}" for name in towers for suffix in _SUFFIXES}
    if different := set(document["files"]) ^ wanted:
        state = "is missing" if min(different) in wanted else "is not a file of this artifact"
        raise ArtifactError(f"{INDEX}: files: {shown(min(different))} {state}")
    files = {}
    for name, entry in document["files"].items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise ArtifactError(f"{INDEX}: files: the entry of {name} is malformed")
        size, sha256 = entry["bytes"], entry["sha256"]
        sound = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
        if type(size) is not int or size < 0 or not sound:
            raise ArtifactError(f"{INDEX}: files: the entry of {name} is malformed")
        files[name] = (size, sha256)
    return ArtifactIndex(
        document["kind"], tuple(towers), document["config"], document["extra"], versions, files
    )


def verify_files(directory: Path, index: ArtifactIndex) -> None:
    """Compare every file with the index.

    Raises `ArtifactError` naming the first file that is missing, differs in size or digest, or
    looks like a part of an artifact and is none of this one. Other files are left alone.
    """
    for name, (size, sha256) in sorted(index.files.items()):
        path = plain_file(directory, name)
        try:
            actual = path.stat().st_size
            if actual != size:
                raise ArtifactError(f"{name}: damaged: {actual} bytes, wanted {size}")
            if file_entry(path)["sha256"] != sha256:
                raise ArtifactError(f"{name}: damaged: its SHA-256 is not the recorded one")
        except OSError as error:
            raise ArtifactError(f"{name}: cannot be read: {error.strerror}") from None
    for path in sorted(directory.iterdir()):
        if path.name.endswith(_SUFFIXES) and path.name not in index.files:
            raise ArtifactError(f"{path.name}: is not a file of this artifact: remove it")
