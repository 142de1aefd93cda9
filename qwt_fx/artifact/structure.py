"""The nested structure of a graph's inputs and outputs as JSON.

An output class of another library (a Hugging Face `ModelOutput`) is stored by its registered name
and found again only if the library that registers it has been imported: nothing is imported here.
"""

from __future__ import annotations

import dataclasses
import keyword
import re
from typing import Any

from torch.utils import _pytree as pytree

from qwt_fx.artifact.json_values import shown
from qwt_fx.errors import ArtifactError

_MAX_DEPTH, _MAX_CHILDREN = 8, 256
# torch.fx writes the names of keyword inputs into Python source without escaping them.
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """Older torch has a field, newer a method."""
    children = getattr(spec, "children", None)
    return list(children() if callable(children) else spec.children_specs)


def _is_key(value: object) -> bool:
    return (
        isinstance(value, str)
        and _KEY.fullmatch(value) is not None
        and not keyword.iskeyword(value)
        and not value.startswith("__")
    )


def spec_to_json(spec: pytree.TreeSpec, where: str) -> Any:
    """A structure as plain values; a leaf is "*".

    Raises `ArtifactError` for a class that is not registered by name, and for dict keys that are
    not identifiers.
    """
    if spec.is_leaf():
        return "*"
    children = [spec_to_json(child, where) for child in _children(spec)]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    keys = spec.context
    if not isinstance(keys, list) or len(keys) != len(children) or not all(map(_is_key, keys)):
        raise ArtifactError(
            f"{where}: the structure {spec.type.__name__} cannot be stored: wanted tuples, lists, "
            "and dicts or model outputs whose keys are identifiers"
        )
    pairs = [[k, c] for k, c in zip(keys, children, strict=True)]
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


def spec_from_json(value: Any, where: str, depth: int = 0) -> pytree.TreeSpec:
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
        children = [spec_from_json(child, where, depth + 1) for child in content]
        return pytree.TreeSpec(tuple if kind == "tuple" else list, None, children)
    if kind == "dict":
        keys, children = _pairs(content, where, depth)
        return pytree.TreeSpec(dict, keys, children)
    if kind == "registered" and len(content) == 2:
        return _registered(content[0], content[1], where, depth)
    raise ArtifactError(f"{where}: the structure is malformed")


def _registered(name: Any, pairs: Any, where: str, depth: int) -> pytree.TreeSpec:
    cls = _output_classes().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ArtifactError(
            f"{where}: the output class {shown(name)} is not registered: import the library that "
            "defines it before loading"
        )
    keys, children = _pairs(pairs, where, depth)
    fields = {f.name for f in dataclasses.fields(cls)}
    if unknown := [k for k in keys if k not in fields]:
        raise ArtifactError(f"{where}: the output class {name} has no field {unknown[0]}")
    return pytree.TreeSpec(cls, keys, children)


def _pairs(content: Any, where: str, depth: int) -> tuple[list[str], list[pytree.TreeSpec]]:
    well_formed = isinstance(content, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in content
    )
    if not well_formed or len(content) > _MAX_CHILDREN:
        raise ArtifactError(f"{where}: the structure is malformed")
    keys = [pair[0] for pair in content]
    for key in keys:
        if not _is_key(key):
            raise ArtifactError(f"{where}: {shown(key)} is not a name an input or output may have")
    if len(set(keys)) != len(keys):
        raise ArtifactError(f"{where}: a name occurs twice")
    return keys, [spec_from_json(pair[1], where, depth + 1) for pair in content]
