"""A stored graph's document, checked as a whole before anything is built from it.

torch.fx writes Python source from node names, operator names and arguments and runs it, so no
string of a document may reach that source unless it matches a strict pattern.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch.utils import _pytree as pytree

from qwt_fx.artifact import graph_args
from qwt_fx.artifact.allowed_operators import OPERATORS, Operator
from qwt_fx.artifact.graph_args import Argument
from qwt_fx.artifact.graph_info_json import info_from_json
from qwt_fx.artifact.graph_tensors import Attribute, Stored, parse_attributes, parse_tensors
from qwt_fx.artifact.json_values import Json, shown
from qwt_fx.artifact.structure import children, spec_from_json
from qwt_fx.errors import ArtifactError
from qwt_fx.graph.graph_info import GraphInfo

SCHEMA = 1
MAX_NODES = 200_000

_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,500}")
_LAYER = re.compile(r"[\x20-\x7e]{0,1000}")
# Names that mean something in the source torch.fx generates.
_RESERVED = frozenset(
    {"torch", "device", "inf", "nan", "self", "fx_pytree", "pytree", "NoneType", "getattr"}
)
NODE_OPS = ("placeholder", "get_attr", "call_function", "output")
_KEYS = {
    "placeholder": ({"name", "op"}, {"layer"}),
    "get_attr": ({"name", "op", "target"}, {"layer"}),
    "call_function": ({"name", "op", "target", "args"}, {"kwargs", "layer"}),
    "output": ({"name", "op", "args"}, set[str]()),
}


@dataclass(frozen=True)
class Call:
    """A checked node: its target is an operator, a path or nothing; its arguments hold `Ref`s."""

    name: str
    op: str
    target: Operator | str | None
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]
    layer: str | None


@dataclass(frozen=True)
class Document:
    """A checked document: everything that building its graph needs."""

    calls: tuple[Call, ...]
    arguments: tuple[str, ...]
    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec
    attributes: dict[str, Attribute]
    tensors: dict[str, Stored]
    info: GraphInfo | None


def parse_document(document: Json) -> Document:
    """Check a whole document. Raises `ArtifactError` naming what is not allowed in it."""
    if not isinstance(document, dict):
        raise ArtifactError("wanted a JSON object")
    schema = document.get("schema")
    if type(schema) is not int or schema < 1:
        raise ArtifactError(f"schema {shown(schema)} is not known")
    if schema > SCHEMA:
        raise ArtifactError(
            f"schema {schema} is newer than this qwt-fx reads ({SCHEMA}): "
            "pip install --upgrade qwt-fx"
        )
    _require_keys(
        document,
        {"schema", "signature", "nodes", "attributes", "tensors", "info"},
        set(),
        "document",
    )
    tensors = parse_tensors(document["tensors"])
    attributes = parse_attributes(document["attributes"], tensors)
    calls = _parse_nodes(document["nodes"], attributes)
    arguments, inputs, outputs = _parse_signature(document["signature"], calls)
    info = None if document["info"] is None else info_from_json(document["info"])
    if info is not None and info.end_of_text is not None:
        inputs_read = [call.name for call in calls if call.op == "placeholder"]
        operators = {call.name for call in calls if call.op == "call_function"}
        if info.end_of_text not in operators or len(inputs_read) != 1:
            raise ArtifactError(
                f"info: end_of_text: {shown(info.end_of_text)} is no operator of a graph with one input"
            )
    return Document(calls, arguments, inputs, outputs, attributes, tensors, info)


def _require_keys(
    value: Json, required: set[str], optional: set[str], where: str
) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: wanted a JSON object")
    if missing := required - set(value):
        raise ArtifactError(f"{where}: {min(missing)} is missing")
    if unknown := set(value) - required - optional:
        raise ArtifactError(f"{where}: unknown key {shown(min(unknown))}")
    return value


def _require_name(value: Json, where: str, reserved: frozenset[str] = _RESERVED) -> str:
    if (
        not isinstance(value, str)
        or not _NAME.fullmatch(value)
        or keyword.iskeyword(value)
        or value in reserved
    ):
        raise ArtifactError(f"{where}: {shown(value)} is not a name a graph may use")
    return value


def _parse_nodes(entries: Json, attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_NODES:
        raise ArtifactError(f"nodes: wanted a list of 1..{MAX_NODES} nodes")
    calls: list[Call] = []
    known: set[str] = set()
    for index, entry in enumerate(entries):
        call = _parse_node(entry, f"nodes: entry {index}", known, attributes)
        if call.name in known:
            raise ArtifactError(f"node {call.name}: the name occurs twice")
        if calls and call.op == "placeholder" and calls[-1].op == "call_function":
            raise ArtifactError(f"node {call.name}: an input after the first operator")
        known.add(call.name)
        calls.append(call)
    ops = [call.op for call in calls]
    if ops.count("output") != 1 or ops[-1] != "output":
        raise ArtifactError("nodes: wanted exactly one output, at the end")
    read = {call.target for call in calls if call.op == "get_attr"}
    if unread := set(attributes) - read:
        raise ArtifactError(f"attributes: {min(unread)} is read by no node")
    return tuple(calls)


def _parse_node(
    entry: Json, where: str, known: set[str], attributes: Mapping[str, Attribute]
) -> Call:
    if not isinstance(entry, dict) or entry.get("op") not in NODE_OPS:
        raise ArtifactError(f"{where}: wanted a JSON object with an op of {', '.join(NODE_OPS)}")
    op = str(entry["op"])
    _require_keys(entry, *_KEYS[op], where)
    name = _require_name(entry["name"], where)
    args, kwargs, layer = entry.get("args", []), entry.get("kwargs", {}), entry.get("layer")
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ArtifactError(f"node {name}: args wants a list and kwargs an object")
    if "layer" in entry and (not isinstance(layer, str) or not _LAYER.fullmatch(layer)):
        raise ArtifactError(f"node {name}: the layer {shown(layer)} is malformed")
    target: Operator | str | None = None
    decoded = tuple(graph_args.decode(v, name, known) for v in args)
    named = {
        _require_name(k, f"node {name}", frozenset()): graph_args.decode(v, name, known)
        for k, v in kwargs.items()
    }
    if op == "get_attr":
        path = entry["target"]
        if not isinstance(path, str) or path not in attributes:
            raise ArtifactError(f"node {name}: reads {shown(path)}, which is not stored")
        target = path
    elif op == "call_function":
        target = OPERATORS.get(entry["target"]) if isinstance(entry["target"], str) else None
        if target is None:
            raise ArtifactError(
                f"node {name}: the operator {shown(entry['target'])} is not on the list of those "
                "that may be loaded, or this torch does not have it"
            )
        graph_args.check_call(target, decoded, named, name)
    return Call(name, op, target, decoded, named, str(layer) if "layer" in entry else None)


def _parse_signature(
    entry: Json, calls: tuple[Call, ...]
) -> tuple[tuple[str, ...], pytree.TreeSpec, pytree.TreeSpec]:
    entry = _require_keys(entry, {"arguments", "inputs", "outputs"}, set(), "signature")
    inputs = spec_from_json(entry["inputs"], "signature: inputs")
    outputs = spec_from_json(entry["outputs"], "signature: outputs")
    arguments = entry["arguments"]
    if not isinstance(arguments, list):
        raise ArtifactError("signature: arguments: wanted a list")
    names = tuple(_require_name(name, "signature: arguments") for name in arguments)
    if len(set(names)) != len(names):
        raise ArtifactError("signature: arguments: a name occurs twice")
    # torch.export's own form, (positional, keyword); the generated source relies on it.
    parts = children(inputs) if inputs.type is tuple else []
    if [part.type for part in parts] != [tuple, dict]:
        raise ArtifactError("signature: inputs: wanted a tuple of a tuple and a dict")
    if len(names) != sum(part.num_children for part in parts):
        raise ArtifactError(f"signature: {len(names)} arguments do not fit the inputs' structure")
    placeholders = sum(call.op == "placeholder" for call in calls)
    if placeholders != inputs.num_leaves:
        raise ArtifactError(f"signature: {inputs.num_leaves} inputs, {placeholders} placeholders")
    results = calls[-1].args
    if len(results) != 1 or not isinstance(results[0], list | tuple):
        raise ArtifactError(f"node {calls[-1].name}: wanted one list of outputs")
    if len(results[0]) != outputs.num_leaves:
        raise ArtifactError(f"signature: {outputs.num_leaves} outputs, {len(results[0])} returned")
    return names, inputs, outputs
