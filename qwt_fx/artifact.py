"""The artifact: a directory of JSON and safetensors; nothing in it is unpickled or evaluated.

`artifact.json` holds the schema, versions, the resolved configuration and the SHA-256 of every
other file; each tower is `NAME.graph.json` and `NAME.safetensors`. Weight codes of fewer than 8
bits are packed; the graph's document says which.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx.errors import ArtifactError, OutputError
from qwt_fx.graph import graph_info
from qwt_fx.graph_json import graph_from_json, graph_to_json, tensors_of
from qwt_fx.output import OutputDirectory
from qwt_fx.packing import pack, unpack
from qwt_fx.quantizers import weight_code_bits
from qwt_fx.version import __version__

SCHEMA = 1
_INDEX = "artifact.json"
_TOWER = re.compile(r"[a-z][a-z0-9_]{0,40}")
_MAX_JSON = 256 * 1024 * 1024
_MAX_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds: graphs by tower name, configuration, the CLIP side, versions."""

    towers: dict[str, GraphModule]
    config: dict[str, Any]
    extra: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class ArtifactSizes:
    """Bytes of each tower's `.safetensors`."""

    towers: dict[str, int]


def write_artifact(
    directory: Path,
    towers: Mapping[str, GraphModule],
    *,
    config: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> ArtifactSizes:
    """Write an artifact into a directory the caller made (see `OutputDirectory`).

    Raises `ArtifactError` for a graph that cannot be stored, `OutputError` when writing fails.
    """
    files: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for name, gm in towers.items():
        if not _TOWER.fullmatch(name):
            raise ArtifactError(f"tower name {name!r}: wanted lower-case letters, digits and _")
        if reason := graph_info(gm).unstorable:
            raise ArtifactError(f"cannot save: {reason}")
        document, data = _encode(gm)
        files[f"{name}.graph.json"] = _json(document)
        files[f"{name}.safetensors"] = data
        sizes[name] = len(data)
    index = {
        "qwt_fx_artifact": SCHEMA,
        "versions": {"qwt_fx": __version__, "torch": torch.__version__},
        "towers": list(towers),
        "config": dict(config),
        "extra": dict(extra),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    try:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        (directory / _INDEX).write_bytes(_json(index))
    except OSError as error:
        raise OutputError(f"cannot write the artifact in {directory}: {error.strerror}") from None
    return ArtifactSizes(sizes)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def _encode(gm: GraphModule) -> tuple[dict[str, Any], bytes]:
    """The graph's document, with what was packed and tied, and the stored tensors."""
    document = graph_to_json(gm)
    bits = weight_code_bits(gm)
    stored: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], str] = {}
    for path, value in tensors_of(gm).items():
        value = value.detach().cpu()
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in seen:
            tied[path] = seen[key]
            continue
        seen[key] = path
        if path in bits and bits[path] < 8:
            packed[path] = {"bits": bits[path], "shape": list(value.shape)}
            stored[path] = pack(value, bits[path])
        else:
            stored[path] = value.contiguous().clone()
    document["packed"], document["tied"] = packed, tied
    return document, save_tensors(stored)


def read_artifact(directory: Path) -> Artifact:
    """Read an artifact. Raises `ArtifactError` naming the file for anything damaged or unknown."""
    index = _read_index(directory)
    files = {name: _read_file(directory, name, entry) for name, entry in index["files"].items()}
    towers = {}
    for name in index["towers"]:
        towers[name] = _decode(
            f"{name}.graph.json",
            files[f"{name}.graph.json"],
            f"{name}.safetensors",
            files[f"{name}.safetensors"],
        )
    return Artifact(towers, index["config"], index["extra"], index["versions"])


def _read_index(directory: Path) -> dict[str, Any]:
    index = _parse(_INDEX, _bytes(directory / _INDEX, _INDEX))
    if not isinstance(index, dict) or "qwt_fx_artifact" not in index:
        raise ArtifactError(f"{directory / _INDEX}: not a qwt-fx artifact")
    schema = index["qwt_fx_artifact"]
    if not isinstance(schema, int) or schema < 1:
        raise ArtifactError(f"{_INDEX}: schema {schema!r} is not known")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{_INDEX}: schema {schema} is newer than this qwt-fx reads ({SCHEMA}): "
            "pip install --upgrade qwt-fx"
        )
    kinds = {"versions": dict, "towers": list, "config": dict, "extra": dict, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(index.get(key), kind):
            raise ArtifactError(f"{_INDEX}: {key} is missing or malformed")
    names = index["towers"]
    if not names or not all(isinstance(n, str) and _TOWER.fullmatch(n) for n in names):
        raise ArtifactError(f"{_INDEX}: towers is malformed")
    wanted = {f"{n}{end}" for n in names for end in (".graph.json", ".safetensors")}
    if set(index["files"]) != wanted or len(set(names)) != len(names):
        raise ArtifactError(f"{_INDEX}: files: wanted exactly {sorted(wanted)}")
    return index


def _bytes(path: Path, name: str) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{name}: missing, or not a plain file, in {path.parent}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{name}: cannot be read: {error.strerror}") from None


def _read_file(directory: Path, name: str, entry: Any) -> bytes:
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        raise ArtifactError(f"{_INDEX}: the entry of {name} is malformed")
    data = _bytes(directory / name, name)
    if len(data) != entry["bytes"]:
        raise ArtifactError(f"{name}: damaged: {len(data)} bytes, wanted {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ArtifactError(f"{name}: damaged: its SHA-256 is not the recorded one")
    return data


def _parse(name: str, data: bytes) -> Any:
    if len(data) > _MAX_JSON:
        raise ArtifactError(f"{name}: {len(data)} bytes of JSON, wanted at most {_MAX_JSON}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name}: not valid JSON: {str(error)[:120]}") from None


def _decode(graph_name: str, graph: bytes, tensor_name: str, data: bytes) -> GraphModule:
    document = _parse(graph_name, graph)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{tensor_name}: damaged: {str(error)[:120]}") from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{graph_name}: wanted a JSON object")
    packed, tied = document.pop("packed", None), document.pop("tied", None)
    if not isinstance(packed, dict) or not isinstance(tied, dict):
        raise ArtifactError(f"{graph_name}: packed or tied is missing")
    for path, entry in packed.items():
        tensors[path] = _unpack(graph_name, path, entry, tensors)
    for path, source in tied.items():
        if path in tensors or not isinstance(source, str) or source not in tensors:
            raise ArtifactError(f"{graph_name}: tied: {path[:80]} is malformed")
        tensors[path] = tensors[source]
    try:
        return graph_from_json(document, tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{graph_name}: {error}") from None


def _unpack(name: str, path: str, entry: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    well_formed = (
        isinstance(entry, dict)
        and set(entry) == {"bits", "shape"}
        and isinstance(entry["bits"], int)
        and 1 <= entry["bits"] <= 7
        and isinstance(entry["shape"], list)
        and all(isinstance(n, int) and 0 <= n < _MAX_ELEMENTS for n in entry["shape"])
        and path in tensors
    )
    if not well_formed:
        raise ArtifactError(f"{name}: packed: {path[:80]} is malformed")
    return unpack(tensors[path], entry["bits"], entry["shape"])


def save_graph(gm: GraphModule, path: Path, *, force: bool = False) -> None:
    """Save one converted graph as an artifact, atomically (`qwt_fx.save`)."""
    if reason := graph_info(gm).unstorable:
        raise ArtifactError(f"cannot save: {reason}")
    with OutputDirectory(path, force=force) as output:
        write_artifact(output.path, {"model": gm}, config=graph_info(gm).config, extra={})


def load_graph(path: Path) -> GraphModule:
    """Load a graph saved by `save_graph` (`qwt_fx.load`)."""
    artifact = read_artifact(path)
    if set(artifact.towers) != {"model"}:
        raise ArtifactError(f"{path} holds a CLIP's towers: use qwt_fx.clip.load")
    return artifact.towers["model"]
