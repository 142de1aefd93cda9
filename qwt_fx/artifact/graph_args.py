"""Arguments of a graph's calls as JSON, and back; each call is checked against its schema.

Nodes become `{"node": name}`, tuples `{"tuple": [...]}`, dtypes `{"dtype": "float32"}`; lists,
numbers, booleans, strings and `None` stay what they are in JSON.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx
from torch.fx import Node

from qwt_fx.artifact.allowed_operators import Operator
from qwt_fx.artifact.json_values import Json, encode_float, shown
from qwt_fx.errors import ArtifactError

MAX_DEPTH = 8
_MAX_INT = 2**63
# torch.fx writes strings into Python source, quoted by repr; the words operators take
# ("tanh", "bilinear", "bhwc,hkc->bhwk") need no more than these characters.
_WORD = re.compile(r"[A-Za-z0-9_,.> -]{0,200}")
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (
        torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d,
    )
}  # fmt: skip
_LAYOUTS = {"strided": torch.strided}
_TABLES: dict[str, Mapping[str, torch.dtype | torch.memory_format | torch.layout]] = {
    "dtype": DTYPES,
    "memory_format": _FORMATS,
    "layout": _LAYOUTS,
}
_TAGS = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}


@dataclass(frozen=True)
class Ref:
    """A reference to an earlier node of a document, before any node is built."""

    name: str


Argument: TypeAlias = (
    "bool | int | float | str | Ref | torch.dtype | torch.memory_format | torch.layout"
    " | list[Argument] | tuple[Argument, ...] | None"
)


def encode(value: object, where: str) -> Json:
    """One argument as a JSON value. Raises `ArtifactError` naming the node for an unknown kind."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return encode_float(float(value))
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(v, where) for v in value]
    if type(value) is tuple or isinstance(value, torch.Size):
        return {"tuple": [encode(v, where) for v in value]}
    if tag := _TAGS.get(type(value)):
        return {tag: str(value).removeprefix("torch.")}
    raise ArtifactError(
        f"node {where}: an argument of type {type(value).__name__} ({shown(str(value))}) cannot be "
        "stored: wanted nodes, numbers, strings, dtypes, and lists or tuples of them"
    )


def decode(value: Json, where: str, known: Set[str], depth: int = 0) -> Argument:
    """One argument from its JSON value; nodes become `Ref`s to names in `known`.

    Raises `ArtifactError` naming the node for anything that `encode` does not write.
    """
    if depth > MAX_DEPTH:
        raise ArtifactError(f"node {where}: arguments nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if not -_MAX_INT <= value < _MAX_INT:
            raise ArtifactError(f"node {where}: an integer does not fit 64 bits")
        return value
    if isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise ArtifactError(f"node {where}: the string {shown(value)} is not allowed")
        return value
    if isinstance(value, list):
        return [decode(v, where, known, depth + 1) for v in value]
    if isinstance(value, dict) and len(value) == 1:
        ((tag, content),) = value.items()
        return _decode_tagged(tag, content, where, known, depth)
    raise ArtifactError(f"node {where}: the argument {shown(value)} is malformed")


def _decode_tagged(tag: str, content: Json, where: str, known: Set[str], depth: int) -> Argument:
    if tag == "tuple" and isinstance(content, list):
        return tuple(decode(v, where, known, depth + 1) for v in content)
    if isinstance(content, str):
        if tag == "node":
            if content not in known:
                raise ArtifactError(
                    f"node {where}: reads {shown(content)}, which is not an earlier node"
                )
            return Ref(content)
        if tag == "$float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if tag in _TABLES and content in _TABLES[tag]:
            return _TABLES[tag][content]
    raise ArtifactError(f"node {where}: the argument {shown({tag: content})} is not known")


def substitute(value: Argument, nodes: Mapping[str, Node]) -> fx.node.Argument:
    """Replace every `Ref` by its node."""
    if isinstance(value, Ref):
        return nodes[value.name]
    if isinstance(value, list):
        return [substitute(v, nodes) for v in value]
    if isinstance(value, tuple):
        return tuple(substitute(v, nodes) for v in value)
    return value


def check_call(
    target: Operator, args: tuple[Argument, ...], kwargs: Mapping[str, Argument], where: str
) -> None:
    """Check a call's arguments against the operator's schema or the function's signature.

    Raises `ArtifactError` naming the node and the argument.
    """
    if isinstance(target, torch._ops.OpOverload):
        _check_schema(target, args, kwargs, where)
        return
    least, most = _arity(target)
    if kwargs or not least <= len(args) <= most:
        raise ArtifactError(
            f"node {where}: {len(args)} arguments and {len(kwargs)} keywords, "
            f"wanted {least} arguments"
        )
    for value in args:
        if not isinstance(value, Ref | int | float):
            raise ArtifactError(
                f"node {where}: the argument {shown(value)} of {target.__name__} is not a number"
            )


def _arity(target: Operator) -> tuple[int, int]:
    parameters = inspect.signature(target).parameters.values()
    least = sum(1 for p in parameters if p.default is inspect.Parameter.empty)
    return least, len(parameters)


def _check_schema(
    target: torch._ops.OpOverload,
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument],
    where: str,
) -> None:
    arguments = target._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    if len(args) > len(positional):
        raise ArtifactError(
            f"node {where}: {len(args)} arguments, {target} takes at most {len(positional)}"
        )
    given: dict[str, Argument] = {a.name: v for a, v in zip(positional, args, strict=False)}
    names = {a.name for a in arguments}
    for name, value in kwargs.items():
        if name not in names or name in given:
            raise ArtifactError(f"node {where}: {target} takes no further {shown(name)}")
        given[name] = value
    for argument in arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise ArtifactError(f"node {where}: {target} needs {argument.name}")
        elif not _fits(given[argument.name], argument.type):
            raise ArtifactError(
                f"node {where}: {argument.name} of {target}: got "
                f"{shown(given[argument.name])}, wanted {argument.type}"
            )


def _fits(value: Argument, kind: torch._C.JitType) -> bool:
    """Whether an argument may stand for a schema type; sizes and numbers may come from nodes."""
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(value, kind.getElementType())
    if isinstance(value, Ref):
        return True
    if name == "ListType":
        element = kind.getElementType()
        if isinstance(value, list | tuple):
            return all(_fits(v, element) for v in value)
        return element.kind() != "TensorType" and _fits(value, element)
    if name in ("IntType", "SymIntType"):  # dtypes and layouts are integers to the schema
        return isinstance(value, int | torch.dtype | torch.memory_format | torch.layout)
    if name in ("TensorType", "FloatType", "NumberType", "SymFloatType"):
        return isinstance(value, int | float)  # operators take a number for a 0-d tensor
    if name in ("BoolType", "SymBoolType"):
        return isinstance(value, int)
    return name == "StringType" and isinstance(value, str)
