"""The nested structure of a graph's inputs and outputs as JSON: tuples, lists, dicts, model outputs.

An output class of another library (a Hugging Face `ModelOutput`) is stored by its registered name
and found again only if the library that registers it has been imported: nothing is imported here.
"""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from qwt_fx.errors import ArtifactError

_BUILTIN = {"tuple": tuple, "list": list, "dict": dict}
_MAX_DEPTH, _MAX_CHILDREN = 8, 256


def _fail(where: str, what: str) -> ArtifactError:
    return ArtifactError(f"graph: {where}: {what}")


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """Older torch has a field, newer a method."""
    children = getattr(spec, "children", None)
    return list(children() if callable(children) else spec.children_specs)


def spec_to_json(spec: pytree.TreeSpec) -> Any:
    """A structure as plain values; a leaf is "*". Raises `ArtifactError` for an unnamed class."""
    if spec.is_leaf():
        return "*"
    children = [spec_to_json(child) for child in _children(spec)]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    if spec.type is dict:
        return {"dict": [[key, child] for key, child in zip(spec.context, children, strict=True)]}
    name = _registered_names().get(spec.type)
    keys = _keys(spec)
    if name is None or keys is None:
        raise _fail("signature", f"the structure {spec.type.__name__} cannot be stored")
    return {"registered": [name, [[k, c] for k, c in zip(keys, children, strict=True)]]}


def _registered_names() -> dict[Any, str]:
    return {
        cls: f"{cls.__module__}.{cls.__qualname__}" for cls in pytree.SUPPORTED_SERIALIZED_TYPES
    }


def _keys(spec: pytree.TreeSpec) -> list[str] | None:
    """The field names of a dict-like structure, as Hugging Face registers its outputs."""
    context = spec.context
    if isinstance(context, list | tuple) and len(context) == len(_children(spec)):
        return [str(k) for k in context]
    return None


def spec_from_json(value: Any, where: str, depth: int = 0) -> pytree.TreeSpec:
    """Rebuild a structure. Raises `ArtifactError` for anything `spec_to_json` does not write."""
    if depth > _MAX_DEPTH:
        raise _fail(where, "the structure is nested too deeply")
    if value == "*":
        return pytree.tree_structure(0)
    if not isinstance(value, dict) or len(value) != 1:
        raise _fail(where, "the structure is malformed")
    kind, content = next(iter(value.items()))
    if kind in ("tuple", "list") and isinstance(content, list) and len(content) <= _MAX_CHILDREN:
        return _build(_BUILTIN[kind], None, [spec_from_json(c, where, depth + 1) for c in content])
    if kind == "dict":
        keys, children = _pairs(content, where, depth)
        return _build(dict, keys, children)
    if kind == "registered" and isinstance(content, list) and len(content) == 2:
        classes = {name: cls for cls, name in _registered_names().items()}
        if not isinstance(content[0], str) or content[0] not in classes:
            raise _fail(
                where, f"the output class {str(content[0])[:80]} is unknown: import its library"
            )
        keys, children = _pairs(content[1], where, depth)
        return _build(classes[content[0]], keys, children)
    raise _fail(where, "the structure is malformed")


def _pairs(content: Any, where: str, depth: int) -> tuple[list[str], list[pytree.TreeSpec]]:
    if not isinstance(content, list) or len(content) > _MAX_CHILDREN:
        raise _fail(where, "the structure is malformed")
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise _fail(where, "the structure is malformed")
    return [p[0] for p in content], [spec_from_json(p[1], where, depth + 1) for p in content]


def _build(cls: Any, context: Any, children: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    return pytree.TreeSpec(cls, context, children)
