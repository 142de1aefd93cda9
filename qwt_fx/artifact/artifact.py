"""The artifact: a directory of JSON and safetensors; nothing in it is unpickled or evaluated.

`artifact.json` holds the schema, versions, the resolved configuration, and size and SHA-256 of
every other file; each tower is `NAME.graph.json` and `NAME.safetensors`. Weight codes of fewer
than 8 bits are packed; the graph's document says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx.artifact.artifact_index import (
    GRAPH_KIND,
    INDEX,
    ArtifactIndex,
    FileEntry,
    file_entry,
    index_document,
    plain_file,
    read_file,
    read_index,
    require_tower_name,
    verify_files,
)
from qwt_fx.artifact.graph_document import Document, parse_document
from qwt_fx.artifact.graph_json import build, describe
from qwt_fx.artifact.graph_tensors import Stored, file_tensors, restore
from qwt_fx.artifact.json_values import Json, dumps, loads, plain_dict, restored, shown
from qwt_fx.artifact.output import OutputDirectory
from qwt_fx.errors import ArtifactError, OutputError
from qwt_fx.graph.graph_info import graph_info, has_graph_info
from qwt_fx.graph.nodes import get_attr

_MODEL = "model"


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
    config: Mapping[str, object],
    extra: Mapping[str, object],
) -> ArtifactSizes:
    """Write an artifact into a directory the caller made (see `OutputDirectory`).

    Every graph is rebuilt from its document before the first byte is written, so what is stored
    can be loaded. A single tower named "model" is an artifact of the kind "graph" (`qwt_fx.load`),
    anything else one of the kind "clip" (`qwt_fx.clip.load`).

    Raises `ArtifactError` for a graph or value that cannot be stored, `OutputError` when writing
    fails.
    """
    return _write(directory, towers, _checked_documents(towers), config, extra)


_Documents = dict[str, tuple[dict[str, Json], Document]]
"""Of each tower: its document as JSON values, and the same parsed."""


def _checked_documents(towers: Mapping[str, GraphModule]) -> _Documents:
    """Raises `ArtifactError` for a graph that could not be loaded again."""
    if not towers:
        raise ArtifactError("an artifact needs at least one tower")
    documents = {}
    for name, gm in towers.items():
        require_tower_name(name)
        if has_graph_info(gm) and (reason := graph_info(gm).unstorable) is not None:
            raise ArtifactError(f"cannot save: {reason}")
        try:
            values, document = describe(gm)
            build(document, {path: get_attr(gm, path).detach() for path in document.tensors})
        except ArtifactError as error:
            raise ArtifactError(f"cannot save the graph {name!r}: {error}") from None
        documents[name] = values, document
    return documents


def _write(
    directory: Path,
    towers: Mapping[str, GraphModule],
    documents: _Documents,
    config: Mapping[str, object],
    extra: Mapping[str, object],
) -> ArtifactSizes:
    stored_config, stored_extra = plain_dict(config, "config"), plain_dict(extra, "extra")
    files: dict[str, FileEntry] = {}
    path = directory
    try:
        for name, (values, document) in documents.items():
            path = directory / f"{name}.safetensors"
            save_file(file_tensors(towers[name], document.tensors), path)
            files[path.name] = file_entry(path)
            path = directory / f"{name}.graph.json"
            path.write_bytes(dumps(values))
            files[path.name] = file_entry(path)
        # The index comes last: a folder without it is no artifact.
        path = directory / INDEX
        path.write_bytes(dumps(index_document(list(towers), stored_config, stored_extra, files)))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}") from None
    return ArtifactSizes({name: files[f"{name}.safetensors"]["bytes"] for name in towers})


def read_artifact(directory: Path) -> Artifact:
    """Read an artifact; sizes and digests are checked before any other file is parsed.

    Raises `ArtifactError` naming the file that is missing, damaged, from the future or not of this
    artifact, and the entry in it that is not allowed.
    """
    return _read(directory, read_index(directory))


def _read(directory: Path, index: ArtifactIndex) -> Artifact:
    verify_files(directory, index)
    towers = {name: _read_tower(directory, name) for name in index.towers}
    config, extra = restored(index.config, INDEX), restored(index.extra, INDEX)
    return Artifact(towers, config, extra, index.versions)


def _read_tower(directory: Path, name: str) -> GraphModule:
    graph_name, tensor_name = f"{name}.graph.json", f"{name}.safetensors"
    try:
        document = parse_document(loads(read_file(directory, graph_name), graph_name))
    except ArtifactError as error:
        raise _named(graph_name, error) from None
    try:
        tensors = _read_tensors(directory, tensor_name, document.tensors)
    except ArtifactError as error:
        raise _named(tensor_name, error) from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"{tensor_name}: damaged: {shown(str(error), 120)}") from None
    try:
        return build(document, tensors)
    except ArtifactError as error:
        raise _named(graph_name, error) from None


def _named(name: str, error: ArtifactError) -> ArtifactError:
    text = str(error)
    return ArtifactError(text if text.startswith(name) else f"{name}: {text}")


def _read_tensors(directory: Path, name: str, wanted: Mapping[str, Stored]) -> dict[str, Tensor]:
    with safe_open(plain_file(directory, name), framework="pt", device="cpu") as file:
        if different := set(file.keys()) ^ set(wanted):
            state = "missing" if min(different) in wanted else "not part of the graph"
            raise ArtifactError(f"the tensor {shown(min(different))} is {state}")
        return {key: restore(stored, file.get_tensor(key), key) for key, stored in wanted.items()}


def save_graph(gm: GraphModule, path: Path, *, force: bool = False) -> None:
    """Save one converted graph as an artifact, atomically (`qwt_fx.save`).

    Raises `ArtifactError` for a graph that cannot be stored (nothing is written then) and
    `OutputError` for a target that must not or cannot be replaced.
    """
    towers = {_MODEL: gm}
    documents = _checked_documents(towers)
    config = graph_info(gm).config if has_graph_info(gm) else {}
    with OutputDirectory(path, force=force, keep_partial=False) as output:
        _write(output.path, towers, documents, config, {})


def load_graph(path: Path) -> GraphModule:
    """Load a graph saved by `save_graph` (`qwt_fx.load`).

    Raises `ArtifactError` as `read_artifact` does, and for the artifact of a CLIP.
    """
    index = read_index(path)
    if index.kind != GRAPH_KIND:
        raise ArtifactError(
            f"{path} holds a CLIP, not one graph: use qwt_fx.clip.load({str(path)!r})"
        )
    return _read(path, index).towers[_MODEL]
