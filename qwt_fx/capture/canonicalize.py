"""Clean-up of an exported graph: what export adds for its checks, what computes nothing, devices."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.capture.contexts import inline_contexts
from qwt_fx.capture.rms_norm import fuse_rms_norms
from qwt_fx.errors import CaptureError
from qwt_fx.graph.constants import constant_value
from qwt_fx.graph.dead_code import remove_dead_nodes
from qwt_fx.graph.edits import add_tensor, described
from qwt_fx.graph.nodes import ancestors, argument, dtype_of, get_attr, is_constant
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.graph.runner import Env

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_async.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch.ops.aten.lift_fresh_copy.default,
    }
) - {aten.lift_fresh_copy.default}
_IDENTITIES = frozenset({aten.alias.default, aten.lift_fresh_copy.default, aten.detach.default})
_DROPOUTS = frozenset(
    {aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default}
)
_SYNONYMS = {  # Python's operators on tensors
    getattr(aten, f"__{name}__").Tensor: getattr(aten, f"bitwise_{name}").Tensor
    for name in ("and", "or", "xor")
} | {
    getattr(aten, f"__{name}__").Scalar: getattr(aten, f"bitwise_{name}").Scalar
    for name in ("and", "or", "xor")
}
_CASTS = frozenset(
    {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.to.other}
)
_FACTORIES = frozenset(
    {
        aten.zeros.default,
        aten.ones.default,
        aten.empty.memory_format,
        aten.full.default,
        aten.scalar_tensor.default,
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
    }
)
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
_OWN_CALLS = frozenset({torch.sym_not, torch.sym_min, torch.sym_max})


def canonicalize(gm: GraphModule) -> None:
    """Rewrite an exported graph in place into the canonical form every pass relies on.

    Contexts without effect are put in line (`capture.contexts`). Export's assertions and guards, dropout
    in evaluation mode, aliases, pads by nothing, casts to the type a value already has and whatever
    nothing reads are removed. A view becomes a reshape, because kernels of another
    device may lay their results out differently; an RMSNorm in separate operators becomes one.
    Values that depend on no input become buffers; factories take their device from an input.
    Raises `CaptureError` naming the node for any other call.
    """
    inline_contexts(gm)
    _remove_checks(gm)
    _remove_identities(gm)
    fuse_rms_norms(gm)
    _fold_constants(gm)
    _follow_devices(gm)
    remove_dead_nodes(gm)
    for node in gm.graph.nodes:
        _require_canonical(node)
    clean_up(gm)


def _erase(gm: GraphModule, node: Node, replacement: Node | None = None) -> None:
    if replacement is not None:
        node.replace_all_uses_with(replacement)
    gm.graph.erase_node(node)


def _remove_checks(gm: GraphModule) -> None:
    for node in reversed(list(gm.graph.nodes)):
        guard = node.op == "call_module" and str(node.target).startswith("_guards")
        if (
            guard or (node.op == "call_function" and node.target in _ASSERTIONS)
        ) and not node.users:
            gm.graph.erase_node(node)
    remove_dead_nodes(gm)


def _remove_identities(gm: GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        source = node.args[0]
        node.target = _SYNONYMS.get(node.target, node.target)
        if node.target in _IDENTITIES:
            _erase(gm, node, source)
        elif node.target in _DROPOUTS:
            if argument(node, 2, "train", False):
                raise CaptureError(f"{node.name}: dropout in training mode; call model.eval()")
            _erase(gm, node, source)
        elif node.target in _VIEWS:
            node.target = aten.reshape.default
        elif node.target in _PADS and not any(argument(node, 1, "pad")):
            _erase(gm, node, source)
        elif node.target in _CASTS and dtype_of(node) is not None:
            if dtype_of(node) == dtype_of(source):
                _erase(gm, node, source)
            else:  # keeps the dtype, drops any literal device
                node.target = aten.to.dtype
                node.args, node.kwargs = (source, dtype_of(node)), {}


def _fold_constants(gm: GraphModule) -> None:
    """Turn tensors that depend on no input into buffers: masks, tables, anything on a literal device.

    Functions of parameters (a sliced position table) stay in the graph: folding them would cut the
    link to the parameter and double the storage.
    """
    constants = {
        n
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)
    }
    constants = {n for n in constants if is_constant(n) and not _reads_parameters(gm, n)}
    cache: Env = {}
    for node in list(gm.graph.nodes):
        if node not in constants or all(user in constants for user in node.users):
            continue
        with torch.no_grad():
            value = constant_value(gm, node, cache)
        with gm.graph.inserting_before(node):
            buffer = add_tensor(gm, f"constant_{node.name}", value.detach().contiguous().clone())
        buffer.meta = described(node)
        _erase(gm, node, buffer)
    remove_dead_nodes(gm)


def _reads_parameters(gm: GraphModule, node: Node) -> bool:
    reads = [n for n in ancestors(node) if n.op == "get_attr"]
    return any(isinstance(get_attr(gm, str(n.target)), torch.nn.Parameter) for n in reads)


def _follow_devices(gm: GraphModule) -> None:
    """Make factories whose size depends on an input take their device from it."""
    anchor = next(
        (
            n
            for n in gm.graph.nodes
            if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)
        ),
        None,
    )
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _FACTORIES:
            continue
        if anchor is None:
            raise CaptureError(f"{node.name}: a factory call, and the model has no tensor input")
        dtype = dtype_of(node)
        with gm.graph.inserting_before(node):
            new = _REWRITES.get(node.target, _new_filled)(gm, node, anchor, dtype)
        new.meta = described(node)
        _erase(gm, node, new)


def _new_filled(gm: GraphModule, node: Node, anchor: Node, dtype: torch.dtype | None) -> Node:
    value: object
    if node.target is aten.full.default:
        size, value = node.args[0], node.args[1]
    elif node.target is aten.scalar_tensor.default:
        size, value = [], node.args[0]
    else:
        size, value = node.args[0], 1 if node.target is aten.ones.default else 0
    return gm.graph.call_function(aten.new_full.default, (anchor, size, value), {"dtype": dtype})


def _new_range(gm: GraphModule, node: Node, anchor: Node, dtype: torch.dtype | None) -> Node:
    """arange(start, end, step) = start + step * (cumsum(ones) - 1), on the anchor's device."""
    start, end, step = 0, node.args[0], 1
    if node.target is not aten.arange.default:
        start, end = node.args[0], node.args[1]  # type: ignore[assignment]
        step = argument(node, 2, "step", 1)
    if step != 1:
        raise CaptureError(f"{node.name}: arange with step {step} over a dynamic size")
    call = gm.graph.call_function
    count = end if start == 0 else call(operator.sub, (end, start))
    ones = call(aten.new_full.default, (anchor, [count], 1), {"dtype": dtype})
    counted = call(aten.cumsum.default, (ones, 0), {"dtype": dtype})
    return (
        call(aten.add.Scalar, (counted, -1))
        if start == 0
        else call(aten.add.Tensor, (call(aten.add.Scalar, (counted, -1)), start))
    )


_REWRITES: dict[object, Callable[[GraphModule, Node, Node, torch.dtype | None], Node]] = {
    aten.arange.default: _new_range,
    aten.arange.start: _new_range,
    aten.arange.start_step: _new_range,
}


def _require_canonical(node: Node) -> None:
    if node.op in ("placeholder", "get_attr", "output"):
        return
    if node.op != "call_function":
        raise CaptureError(f"{node.name}: {node.op} {node.target}: wanted ATen calls only")
    known = (
        isinstance(node.target, torch._ops.OpOverload)
        or getattr(node.target, "__module__", "") == "_operator"
        or node.target in _OWN_CALLS
        or getattr(node.target, "__module__", "") == "math"
    )
    if getattr(node.target, "__name__", "").startswith("flex_attention"):
        raise CaptureError(
            f"{node.name}: flex attention is no ATen operator: load the model with "
            'attn_implementation="sdpa"'
        )
    if not known:
        raise CaptureError(
            f"{node.name}: calls {node.target}, wanted an ATen operator; control flow and "
            "higher-order operators are not supported"
        )
