"""Strict JSON: what is written is read back equal, and what is ambiguous is refused.

JSON has no NaN, infinities or tuples: the first two are written as `{"$float": "nan"}`, tuples
become lists. Floats survive to the last bit (Python writes the shortest text that reads back).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

from qwt_fx.errors import ArtifactError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
# Of JSON values: a report, an index, an entry of these.
JsonObject = dict[str, Any]

MAX_BYTES = 256 * 1024 * 1024
MAX_DEPTH = 64
_FLOAT = "$float"
_NON_FINITE = ("nan", "inf", "-inf")


def shown(value: object, length: int = 80) -> str:
    """An untrusted value for a message: plain ASCII, one line, short."""
    text = ascii(value)
    return text if len(text) <= length else text[:length] + "..."


def encode_float(value: float) -> Json:
    """A float as a JSON value; NaN and the infinities as a tagged object."""
    return value if math.isfinite(value) else {_FLOAT: repr(value)}


def plain(value: object, where: str, depth: int = 0) -> Json:
    """Free-form values as JSON values. Raises `ArtifactError` naming what JSON cannot hold."""
    if depth > MAX_DEPTH:
        raise ArtifactError(f"{where}: nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return encode_float(float(value))
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _FLOAT:
                raise ArtifactError(f"{where}: the key {shown(key)} cannot be stored in JSON")
        return {k: plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    raise ArtifactError(f"{where}: a value of type {type(value).__name__} cannot be stored in JSON")


def plain_dict(values: Mapping[str, object], where: str) -> dict[str, Json]:
    """As `plain`, of a mapping."""
    document = plain(dict(values), where)
    assert isinstance(document, dict)
    return document


def restored(value: Any, where: str) -> Any:
    """Free-form values from JSON values: the inverse of `plain`, tuples aside."""
    if isinstance(value, list):
        return [restored(v, where) for v in value]
    if isinstance(value, dict):
        if _FLOAT in value:
            if set(value) != {_FLOAT} or value[_FLOAT] not in _NON_FINITE:
                raise ArtifactError(f"{where}: the number {shown(value)} is malformed")
            return float(value[_FLOAT])
        return {k: restored(v, where) for k, v in value.items()}
    return value


def dumps(document: Json) -> bytes:
    """A document of JSON values as ASCII bytes, one value a line."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode("ascii")


def digest(document: Mapping[str, Json]) -> str:
    """SHA-256 of a document's content, whatever its spacing and the order of its keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        raise ValueError("a key occurs twice")
    return entry


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _depth(value: Json) -> int:
    """Nesting of a parsed document, without recursion."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        current, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(current, dict | list):
            children = current.values() if isinstance(current, dict) else current
            stack.extend((child, depth + 1) for child in children)
    return deepest


def loads(data: bytes, name: str) -> Json:
    """Parse JSON bytes strictly.

    Raises `ArtifactError` with the file's `name` for bytes that are not UTF-8 JSON, for a key given
    twice, for NaN and infinities, and for documents that are too large or nested too deeply.
    """
    if len(data) > MAX_BYTES:
        raise ArtifactError(f"{name}: {len(data)} bytes of JSON, wanted at most {MAX_BYTES}")
    try:
        document: Json = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name}: damaged: not valid JSON: {shown(str(error), 120)}") from None
    if _depth(document) > 2 * MAX_DEPTH:
        raise ArtifactError(f"{name}: nested deeper than {2 * MAX_DEPTH}")
    return document
