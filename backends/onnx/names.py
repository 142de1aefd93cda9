"""What inputs and outputs of an exported model are called: its own words, or the user's, one each."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qwt_fx.artifact.structure import children
from qwt_fx.errors import ConfigError


def input_names(gm: GraphModule, given: Sequence[str] | None) -> list[str] | None:
    """The names given; `None` for the graph's own. Raises `ConfigError` for another number of names."""
    own = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return _checked("input_names", given, own)


def output_names(gm: GraphModule, given: Sequence[str] | None) -> list[str] | None:
    """The names given, else the fields' of a model output or dict; `None` for a tensor's or tuple's.

    Fields within fields are joined by "_", positions counted from 0: `hidden_states_0`.

    Raises `ConfigError` for another number of names than the graph has outputs.
    """
    structure = gm.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    own = [] if structure is None else list(_paths(structure, ""))
    names = _checked(
        "output_names",
        given,
        [name if _is_named(name) else f"output {n}" for n, name in enumerate(own)],
    )
    return names or (own if all(map(_is_named, own)) and own else None)


def _is_named(path: str) -> bool:
    return bool(path) and not path[0].isdigit()


def _paths(spec: pytree.TreeSpec, path: str) -> list[str]:
    parts = children(spec)
    if spec.is_leaf():
        return [path]
    keys = spec.context if isinstance(spec.context, list) else range(len(parts))
    return [
        name
        for key, part in zip(keys, parts, strict=True)
        for name in _paths(part, f"{path}_{key}" if path else str(key))
    ]


def _checked(what: str, given: Sequence[str] | None, own: Sequence[str]) -> list[str] | None:
    if given is None:
        return None
    if len(given) != len(own):
        raise ConfigError(
            f"{what}: got {len(given)} ({', '.join(given)}), wanted {len(own)}, one each for "
            f"{', '.join(own)}"
        )
    if len(set(given)) != len(given):
        raise ConfigError(f"{what}: got {', '.join(given)}, wanted names that differ")
    return list(given)
