"""The nested structure of a graph's inputs and outputs as JSON.

An output class of another library (a Hugging Face `ModelOutput`) is stored by its registered name
and found again only if the library that registers it has been imported: nothing is imported here.
"""

from __future__ import annotations

import dataclasses
import keyword
import re

from torch.utils import _pytree as pytree

from qwt_fx.artifact.json_values import Json, shown
from qwt_fx.errors import ArtifactError

_MAX_DEPTH, _MAX_CHILDREN = 8, 256
# torch.fx writes the names of keyword inputs into Python source without escaping them.
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")


def children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The parts of a structure: older torch has a field, newer a method."""
    method = getattr(spec, "children", None)
    return list(method() if callable(method) else spec.children_specs)


def _is_key(value: object) -> bool:
    return (
        isinstance(value, str)
        and _KEY.fullmatch(value) is not None
        and not keyword.iskeyword(value)
        and not value.startswith("__")
    )


def spec_to_json(spec: pytree.TreeSpec, where: str) -> Json:
    """A structure as plain values; a leaf is "*".

    Raises `ArtifactError` for a class that is not registered by name, and for dict keys that are
    not identifiers.
    """
    if spec.is_leaf():
        return "*"
    parts = [spec_to_json(part, where) for part in children(spec)]
    if spec.type in (tuple, list):
        return {spec.type.__name__: parts}
    keys = spec.context
    if not isinstance(keys, list) or len(keys) != len(parts) or not all(map(_is_key, keys)):
        raise ArtifactError(
            f"{where}: the structure {spec.type.__name__} cannot be stored: wanted tuples, lists, "
            "and dicts or model outputs whose keys are identifiers"
        )
    pairs: Json = [[key, part] for key, part in zip(keys, parts, strict=True)]
    if spec.type is dict:
        return {"dict": pairs}
    name = _name(spec.type)
    if _output_classes().get(name) is not spec.type:
        raise ArtifactError(
            f"{where}: the output class {name} cannot be stored: it is not registered in "
            "torch.utils._pytree as a dataclass with named fields"
        )
    return {"registered": [name, pairs]}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _output_classes() -> dict[str, type]:
    """Model outputs that imported libraries registered: dataclasses that are dicts of their fields.

    Other registered classes (torch's own return types, schema holders) are left out: what their
    constructors do with a file's values is not known.
    """
    return {
        _name(cls): cls
        for cls in list(pytree.SUPPORTED_NODES)
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and issubclass(cls, dict)
    }


def spec_from_json(value: Json, where: str, depth: int = 0) -> pytree.TreeSpec:
    """Rebuild a structure. Raises `ArtifactError` for anything `spec_to_json` does not write."""
    if depth > _MAX_DEPTH:
        raise ArtifactError(f"{where}: the structure is nested too deeply")
    if value == "*":
        return pytree.tree_structure(0)
    if not isinstance(value, dict) or len(value) != 1:
        raise ArtifactError(f"{where}: the structure is malformed")
    ((kind, content),) = value.items()
    if not isinstance(content, list) or len(content) > _MAX_CHILDREN:
        raise ArtifactError(f"{where}: the structure is malformed")
    if kind in ("tuple", "list"):
        parts = [spec_from_json(part, where, depth + 1) for part in content]
        return pytree.TreeSpec(tuple if kind == "tuple" else list, None, parts)
    if kind == "dict":
        keys, parts = _pairs(content, where, depth)
        return pytree.TreeSpec(dict, keys, parts)
    if kind == "registered" and len(content) == 2:
        return _registered(content[0], content[1], where, depth)
    raise ArtifactError(f"{where}: the structure is malformed")


def _registered(name: Json, pairs: Json, where: str, depth: int) -> pytree.TreeSpec:
    cls = _output_classes().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ArtifactError(
            f"{where}: the output class {shown(name)} is not registered: import the library that "
            "defines it before loading"
        )
    keys, parts = _pairs(pairs, where, depth)
    fields = {f.name for f in dataclasses.fields(cls)}
    if unknown := [k for k in keys if k not in fields]:
        raise ArtifactError(f"{where}: the output class {name} has no field {unknown[0]}")
    return pytree.TreeSpec(cls, keys, parts)


def _pairs(content: Json, where: str, depth: int) -> tuple[list[str], list[pytree.TreeSpec]]:
    if not isinstance(content, list) or len(content) > _MAX_CHILDREN:
        raise ArtifactError(f"{where}: the structure is malformed")
    specs: dict[str, pytree.TreeSpec] = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ArtifactError(f"{where}: the structure is malformed")
        key = pair[0]
        if not isinstance(key, str) or not _is_key(key):
            raise ArtifactError(f"{where}: {shown(key)} is not a name an input or output may have")
        if key in specs:
            raise ArtifactError(f"{where}: a name occurs twice")
        specs[key] = spec_from_json(pair[1], where, depth + 1)
    return list(specs), list(specs.values())
