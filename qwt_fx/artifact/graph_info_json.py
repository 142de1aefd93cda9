"""A graph's records as JSON, and back with every value checked."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch.fx import GraphModule

from qwt_fx.artifact.json_values import Json, plain, restored, shown
from qwt_fx.errors import ArtifactError
from qwt_fx.graph.graph_info import Block, GraphInfo, graph_info
from qwt_fx.graph.input_check import Input

_TEXT = re.compile(r"[\x20-\x7e]{1,1000}")


def info_to_json(gm: GraphModule) -> Json:
    """The records of a graph as JSON values.

    Raises `ArtifactError` for a graph marked as one that cannot be stored, and for values that JSON
    cannot hold.
    """
    info = graph_info(gm)
    if info.unstorable is not None:
        raise ArtifactError(f"the graph cannot be saved: {info.unstorable}")
    return plain(dataclasses.asdict(info), "info")


def info_from_json(value: Json) -> GraphInfo:
    """Records from JSON values; a missing key has its default.

    Raises `ArtifactError` for unknown keys, values of another kind, malformed blocks and a graph
    that is marked as one that cannot be stored.
    """
    if not isinstance(value, dict):
        raise ArtifactError("info: wanted a JSON object")
    defaults = GraphInfo()
    known = {f.name for f in dataclasses.fields(GraphInfo)}
    if unknown := set(value) - known:
        raise ArtifactError(
            f"info: unknown key {shown(min(unknown))}: a newer qwt-fx may read it: "
            "pip install --upgrade qwt-fx"
        )
    entry = restored(value, "info")
    for key, content in entry.items():
        kind = type(getattr(defaults, key))
        if kind is not type(None) and not isinstance(content, kind):
            raise ArtifactError(f"info: {key}: got {shown(content)}, wanted a {kind.__name__}")
    if entry.get("unstorable") is not None:
        raise ArtifactError("info: the graph is marked as one that cannot be stored")
    _check_length(entry)
    if "blocks" in entry:
        entry["blocks"] = [_block(block) for block in entry["blocks"]]
    if "inputs" in entry:
        entry["inputs"] = [_input(value) for value in entry["inputs"]]
    return GraphInfo(**entry)


def _check_length(entry: dict[str, Any]) -> None:
    end, context = entry.get("end_of_text"), entry.get("context_length")
    if end is not None and not (isinstance(end, str) and _TEXT.fullmatch(end)):
        raise ArtifactError(f"info: end_of_text: got {shown(end)}, wanted a node's name")
    positive = type(context) is int and context > 0
    if (end is None) != (context is None) or (context is not None and not positive):
        raise ArtifactError(f"info: context_length: got {shown(context)}, end_of_text {shown(end)}")


def _block(value: object) -> Block:
    wanted = {f.name for f in dataclasses.fields(Block)}
    if not isinstance(value, dict) or set(value) != wanted:
        raise ArtifactError(f"info: blocks: got {shown(value)}, wanted {', '.join(sorted(wanted))}")
    if not all(isinstance(v, str) and _TEXT.fullmatch(v) for v in value.values()):
        raise ArtifactError(f"info: blocks: {shown(value)}: wanted short texts")
    return Block(**value)


def _input(value: object) -> Input:
    wanted = {f.name for f in dataclasses.fields(Input)}
    if not isinstance(value, dict) or set(value) != wanted:
        raise ArtifactError(f"info: inputs: got {shown(value)}, wanted {', '.join(sorted(wanted))}")
    texts = [value["name"], value["dtype"] or "none"]
    sizes = value["sizes"] if isinstance(value["sizes"], list) else [None]
    plain = value["value"] is None or isinstance(value["value"], bool | int | float | str)
    if not plain or not all(isinstance(t, str) and _TEXT.fullmatch(t) for t in texts):
        raise ArtifactError(f"info: inputs: {shown(value)}: wanted short texts")
    return Input(**value | {"sizes": tuple(_size(size) for size in sizes)})


def _size(value: object) -> object:
    if type(value) is int:
        return value
    if isinstance(value, list) and len(value) == 3:
        symbol, least, most = value
        limits = type(least) is int and (most is None or type(most) is int)
        if limits and isinstance(symbol, str) and _TEXT.fullmatch(symbol):
            return symbol, least, most
    raise ArtifactError(f"info: inputs: got the size {shown(value)}, wanted a number or a range")
