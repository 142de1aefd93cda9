"""What a graph may be called with, checked at every call before anything is computed.

`torch.export` turns a model's own checks of its input's size into facts about the size it was captured
with, and drops them: another size would run and give numbers. `GraphInfo.inputs` keeps those facts.
The check hangs on the module, not in the graph, so that no pass and no exporter sees it; export and
Dynamo run it while they trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen

from qwt_fx.errors import DataError
from qwt_fx.graph.nodes import is_call

aten = torch.ops.aten

ANY, FLOATING, INTEGER = "any", "floating", "integer"
UNKNOWN = "unknown"  # an input of which nothing is known
_IDS = ("int64", "int32")  # either is taken where the other was captured


@dataclass(frozen=True)
class Input:
    """One input of a graph, as captured.

    Attributes:
        name: of its placeholder.
        dtype: of a tensor: "float32"; "floating", "integer" or "any" where the graph casts it before
            all else; "unknown" takes whatever comes. `None` where it is no tensor.
        sizes: of a tensor: a number, or (symbol, least, most) where it may vary, `None` for no limit.
            Equal symbols stand for equal sizes.
        value: what is no tensor is part of what was captured: a number, a string or `None`.
    """

    name: str
    dtype: str | None
    sizes: tuple[Any, ...] = ()
    value: Any = None

    @property
    def shape(self) -> str:
        """The sizes as a message shows them: `(n, 3, 224, 224)`, `(n, at most 77)`."""
        return f"({', '.join(map(_shown, self.sizes))}{',' * (len(self.sizes) == 1)})"


def _shown(size: Any) -> str:
    if isinstance(size, int):
        return str(size)
    _, least, most = size
    bounded = most is not None and most < MAX_BATCH
    limits = [f"at least {least}"] * (least > 1) + [f"at most {most}"] * bounded
    return " and ".join(limits) or "n"


MAX_BATCH = 1 << 20  # what capture and export allow for a batch


def inputs_of(gm: GraphModule) -> list[Input]:
    """The inputs of a graph that `torch.export` made, with the ranges of its symbols."""
    ranges = getattr(gm, "range_constraints", None) or {}

    def size(value: int | torch.SymInt) -> object:
        if not isinstance(value, torch.SymInt):
            return value
        limits = ranges.get(value.node.expr)
        if limits is None:
            return str(value.node.expr), 0, None
        return str(value.node.expr), int(limits.lower), _finite(limits.upper)

    found = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            found.append(Input(node.name, _dtype(node, value), tuple(map(size, value.shape))))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append(Input(node.name, None, value=value))
        else:
            return []  # a size or an object as input: nothing is known that could be checked
    return found


def _finite(bound: Any) -> int | None:
    return int(bound) if bound.is_finite and bound < 1 << 62 else None


def _dtype(node: Node, value: Tensor) -> str:
    """See `Input.dtype`."""
    readers = [n for n in node.users if not is_call(n, {aten.sym_size.int})]
    if readers and all(is_call(n, {aten.to.dtype}) for n in readers):
        if all(n.args[1] is torch.bool for n in readers):
            return ANY
        if value.is_floating_point():
            return FLOATING
        if not value.is_complex():
            return INTEGER
    return str(value.dtype).removeprefix("torch.")


class InputCheck:
    """A forward pre-hook that raises `DataError` for inputs that a graph was not captured for."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Input]) -> None:
        self.inputs = tuple(inputs)
        codegen = gm.graph._codegen
        pytree = codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None
        self.names = tuple(i.name for i in inputs) if pytree is None else tuple(pytree.orig_args)
        self.structure = None if len(self.names) == len(inputs) else pytree and pytree.in_spec

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See `torch.nn.Module.register_forward_pre_hook`, with_kwargs."""
        rest = self.names[len(args) :]
        if len(args) > len(self.names) or set(rest) != set(kwargs):
            got = ", ".join(["..."] * len(args) + sorted(kwargs)) or "none"
            raise DataError(f"inputs: got ({got}), wanted ({', '.join(self.names)})")
        values = [*args, *(kwargs[name] for name in rest)]
        if self.structure is not None:
            positional = self.structure.child(0).num_children
            named = dict(zip(self.names[positional:], values[positional:], strict=True))
            values = fx_pytree.tree_flatten_spec((values[:positional], named), self.structure)
        check_inputs(module, self.inputs, values)


def check_inputs(gm: nn.Module, inputs: Sequence[Input], values: Sequence[Any]) -> None:
    """Raise `DataError` where flat inputs, one each, are not what the graph was captured for."""
    if len(values) != len(inputs):
        names = ", ".join(i.name for i in inputs)
        raise DataError(f"inputs: got {len(values)}, wanted {len(inputs)} ({names})")
    first: dict[str, tuple[str, Any]] = {}
    for wanted, value in zip(inputs, values, strict=True):
        if wanted.dtype == UNKNOWN:
            continue
        if wanted.dtype is None:
            if type(value) is not type(wanted.value) or value != wanted.value:
                raise DataError(
                    f"input {wanted.name!r}: got {_described(value)}, wanted {wanted.value!r}: what "
                    "is no tensor is part of the captured graph; capture the model for each value"
                )
        elif not isinstance(value, Tensor):
            raise DataError(
                f"input {wanted.name!r}: got {_described(value)}, wanted a tensor {wanted.shape} of "
                f"{wanted.dtype}"
            )
        else:
            if not _sizes_fit(wanted.sizes, value.shape):
                raise DataError(
                    f"input {wanted.name!r}: got a tensor of shape {tuple(value.shape)}, wanted "
                    f"{wanted.shape}, the shape that the model was captured for; for another one "
                    "capture (and quantize) the model with example inputs of that shape"
                )
            if wanted.dtype != (dtype := str(value.dtype).removeprefix("torch.")):
                _check_dtype(gm, wanted, value, dtype)
            for size, got in zip(wanted.sizes, value.shape, strict=True):
                if isinstance(size, int) or not isinstance(got, int):
                    continue
                name, other = first.setdefault(size[0], (wanted.name, got))
                if got != other:
                    raise DataError(
                        f"inputs {name!r} and {wanted.name!r}: got sizes {other} and {got}, wanted "
                        "one size in both, the batch"
                    )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else f"a {type(value).__name__}"


def _sizes_fit(wanted: Sequence[Any], shape: Sequence[Any]) -> bool:
    if len(wanted) != len(shape):
        return False
    for size, got in zip(wanted, shape, strict=True):
        if isinstance(size, int):
            if size != got:
                return False
        elif isinstance(got, int):  # a symbol keeps the range that its tracer gave it
            _, least, most = size
            if (least > 1 and got < least) or (most is not None and got > most):
                return False
    return True


def _check_dtype(gm: nn.Module, wanted: Input, value: Tensor, dtype: str) -> None:
    """A captured dtype goes with the graph's parameters, which may have been converted since."""
    floating, name = value.is_floating_point(), wanted.dtype
    if name == ANY or (name in _IDS and dtype in _IDS):
        return
    if name == INTEGER and not floating and not value.is_complex():
        return
    if name == FLOATING and floating:
        return
    if floating and str(name).rstrip("0123456789") in ("float", "bfloat"):
        held = {str(p.dtype).removeprefix("torch.") for p in gm.parameters()}
        if torch.is_autocast_enabled(value.device.type) or (name not in held and dtype in held):
            return
    remedy = f"convert it with .to(torch.{name})" if floating else "convert it as the model expects"
    raise DataError(f"input {wanted.name!r}: got a tensor of {dtype}, wanted {name}: {remedy}")
