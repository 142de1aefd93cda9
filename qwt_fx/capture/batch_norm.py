"""Folds batch norms of evaluation mode into the layer before or behind them, function unchanged.

    y = (x - mean) / sqrt(var + eps) * weight + bias = s x + t          arXiv 1502.03167, algorithm 2

Behind a linear or convolution: W' = diag(s) W, b' = s b + t, in the layer's rows. In front of layers
alone: W' = W diag(s), b' = b + W t, in their columns; with t not 0 not where zeros are padded, which
would have become t. What is neither becomes a product and a sum. All of it is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qwt_fx.capture.blocks import module_path
from qwt_fx.graph.aten import CONVOLUTIONS, LINEAR, SHAPE_ONLY
from qwt_fx.graph.edits import add_tensor, described
from qwt_fx.graph.nodes import argument, dtype_of, is_call, layer_name, shape_of, tensor_of
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.graph.sample_ids import resolve, run_move

aten = torch.ops.aten
_FUNCTIONAL = aten._native_batch_norm_legit_no_training.default
_LAYERS = CONVOLUTIONS | {LINEAR, aten.conv3d.default, aten.conv3d.padding}
_SIZES = frozenset({aten.sym_size.int, aten.sym_numel.default})
_LIKE = frozenset({aten.reshape_as.default, aten.view_as.default, aten.expand_as.default})
_BATCH = 2  # stands for every symbol of a size


@dataclass(frozen=True)
class _Norm:
    """y = scale x + shift: the value it reads, the node of y; scale and shift (channels,) float64."""

    x: Node
    y: Node
    scale: Tensor
    shift: Tensor


def fold_batch_norms(gm: GraphModule) -> int:
    """Replace every batch norm of evaluation mode, in place; returns how many there were.

    So are those written as a product with a constant and a sum with one (torchvision's
    `FrozenBatchNorm2d`), where a layer takes them up. A norm of the batch's own statistics stays. Layers
    must have their names already (`meta["layer"]`): a weight that several read is copied under another.
    """
    count = 0
    for node in list(gm.graph.nodes):
        norm = _batch_norm(gm, node) or _written_out(gm, node)
        if norm is None:
            continue
        new = norm.x
        if (layer := _layer_before(gm, norm)) is not None:
            _scale_rows(gm, layer, norm)
        elif readers := _layers_behind(gm, norm):
            for reader in readers:
                _scale_columns(gm, reader, norm)
        elif is_call(node, {aten.mul.Tensor}):
            continue
        else:
            new = _affine(gm, norm)
        norm.y.replace_all_uses_with(new)
        for old in dict.fromkeys((norm.y, node)):
            gm.graph.erase_node(old)
        count += 1
    if count:
        clean_up(gm)
    return count


def _batch_norm(gm: GraphModule, node: Node) -> _Norm | None:
    """A norm with running statistics."""
    y = node
    if is_call(node, {aten.batch_norm.default}):
        if argument(node, 5, "training"):
            return None
        eps = argument(node, 7, "eps")
    elif is_call(node, {_FUNCTIONAL}):
        if len(node.users) != 1:  # the batch's mean and variance, of which it computes none
            return None
        (y,) = node.users
        eps = argument(node, 6, "eps")
    else:
        return None
    names = ("weight", "bias", "running_mean", "running_var")
    reads = [argument(node, i, name) for i, name in enumerate(names, 1)]
    weight, bias, mean, var = (tensor_of(gm, read) for read in reads)
    if mean is None or var is None or (weight is None) is not (reads[0] is None):
        return None
    if (bias is None) is not (reads[1] is None):
        return None
    scale = (var.detach().double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    shift = shift if bias is None else shift + bias.detach().double()
    x = node.args[0]
    assert isinstance(x, Node)  # the operator's schema
    return _Norm(x, y, scale, shift) if dtype_of(x) == dtype_of(y) else None


def _written_out(gm: GraphModule, node: Node) -> _Norm | None:
    """x * s + t with constants that are no parameters and have one value for each channel of x."""
    if not is_call(node, {aten.mul.Tensor}) or len(node.users) != 1:
        return None
    (y,) = node.users
    if not is_call(y, {aten.add.Tensor}) or y.kwargs:
        return None
    (x, first), (product, second) = node.args[:2], y.args[:2]
    scale, shift = _per_channel(gm, x, first), _per_channel(gm, x, second)
    if product is not node or scale is None or shift is None or len(scale) != len(shift):
        return None
    assert isinstance(x, Node)  # _per_channel
    return _Norm(x, y, scale, shift)


def _per_channel(gm: GraphModule, x: object, constant: object) -> Tensor | None:
    value, shape = tensor_of(gm, constant), shape_of(x) if isinstance(x, Node) else None
    if value is None or isinstance(value, nn.Parameter) or shape is None or len(shape) < 3:
        return None
    wanted = (1, shape[1], *[1] * (len(shape) - 2))
    return value.detach().double().flatten() if tuple(value.shape) == wanted else None


def _layer_before(gm: GraphModule, norm: _Norm) -> Node | None:
    """The layer of whose output, moved about perhaps, the norm is the one reader."""
    chain, node = [], norm.x
    while _has_one_reader(node) and is_call(node, SHAPE_ONLY):
        chain.append(node)
        source = node.args[0]
        assert isinstance(source, Node)  # a move reads a node
        node = source
    if not _has_one_reader(node) or not _has_parameters(gm, node):
        return None
    return node if _channels_stay(node, chain[::-1], norm) else None


def _has_one_reader(node: Node) -> bool:
    """Whether one other reads more of it than its sizes."""
    of_size = [
        is_call(u, _SIZES) or (is_call(u, _LIKE) and u.args[0] is not node) for u in node.users
    ]
    return of_size.count(False) == 1


def _has_parameters(gm: GraphModule, layer: Node) -> bool:
    """Whether this is a layer with weight and bias at hand: computed ones cannot take up anything.

    The weight of a transposed convolution is laid out otherwise.
    """
    if not is_call(layer, _LAYERS) or tensor_of(gm, layer.args[1]) is None:
        return False
    if layer.target is aten.convolution.default and argument(layer, 6, "transposed"):
        return False
    bias = argument(layer, 2, "bias")
    return bias is None or tensor_of(gm, bias) is not None


def _channels_stay(layer: Node, moves: Sequence[Node], norm: _Norm) -> bool:
    """Whether channel c of the layer's output is channel c, in dimension 1, of what the norm reads."""
    shape, count = shape_of(layer), len(norm.scale)
    if shape is None:
        return False
    axis = len(shape) - 1 if is_call(layer, {LINEAR}) else 1
    if shape[axis] != count:
        return False
    if not moves:
        return axis == 1
    sizes = [resolve(s, _BATCH) for s in shape]
    ids = torch.arange(count).reshape(-1, *[1] * (len(shape) - 1 - axis))
    env = {layer: ids.expand(sizes)}
    try:
        for move in moves:
            env[move] = run_move(move, env, _BATCH)
    except (KeyError, RuntimeError, IndexError):
        return False
    found = env[moves[-1]]
    wanted = torch.arange(count).reshape(-1, *[1] * (found.dim() - 2))
    return bool(found.shape[1] == count and (found == wanted).all())


def _layers_behind(gm: GraphModule, norm: _Norm) -> list[Node]:
    """All readers of the norm, if each is a layer that can take it up; else none."""
    shape = shape_of(norm.y)
    readers = list(norm.y.users)
    for reader in readers:
        if not _has_parameters(gm, reader) or reader.args[0] is not norm.y or shape is None:
            return []
        if is_call(reader, {LINEAR}):
            if len(shape) != 2:
                return []
        elif bool((norm.shift != 0).any()) and _pads(gm, reader):
            return []
    return readers


def _pads(gm: GraphModule, convolution: Node) -> bool:
    padding = argument(convolution, 4, "padding", 0)
    if isinstance(padding, str):
        weight = tensor_of(gm, convolution.args[1])
        return padding != "valid" and (weight is None or any(s != 1 for s in weight.shape[2:]))
    return bool(padding != 0 and any(padding if isinstance(padding, list | tuple) else [padding]))


def _scale_rows(gm: GraphModule, layer: Node, norm: _Norm) -> None:
    """W' = diag(s) W, b' = s b + t."""
    weight, bias = _tensors(gm, layer)
    scaled = weight * norm.scale.reshape(-1, *[1] * (weight.dim() - 1))
    _set(gm, layer, scaled, norm.shift if bias is None else norm.shift + norm.scale * bias)


def _scale_columns(gm: GraphModule, layer: Node, norm: _Norm) -> None:
    """W' = W diag(s), b' = b + W t, group by group."""
    weight, bias = _tensors(gm, layer)
    columns, kernel = weight.shape[1], weight.shape[2:]
    groups = len(norm.scale) // columns
    grouped = weight.reshape(groups, -1, columns, *kernel)
    scale, shift = (
        v.reshape(groups, 1, columns, *[1] * len(kernel)) for v in (norm.scale, norm.shift)
    )
    moved = (grouped * shift).reshape(len(weight), -1).sum(1)
    scaled = (grouped * scale).reshape(weight.shape)
    needed = bias is not None or bool((norm.shift != 0).any())
    _set(gm, layer, scaled, (moved if bias is None else bias + moved) if needed else None)


def _affine(gm: GraphModule, norm: _Norm) -> Node:
    """shift + scale x, channels in dimension 1."""
    shape, dtype = shape_of(norm.x), dtype_of(norm.y) or torch.float32
    assert shape is not None  # export records the shape of what an operator reads
    base = module_path(norm.y) or norm.y.name
    with gm.graph.inserting_before(norm.y):
        scale, shift = (
            add_tensor(gm, f"{base}_{name}", v.reshape(-1, *[1] * (len(shape) - 2)).to(dtype))
            for name, v in (("scale", norm.scale), ("shift", norm.shift))
        )
        new = gm.graph.call_function(aten.addcmul.default, (shift, scale, norm.x))
    new.meta = described(norm.y)
    return new


def _tensors(gm: GraphModule, layer: Node) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64."""
    weight, bias = tensor_of(gm, layer.args[1]), tensor_of(gm, argument(layer, 2, "bias"))
    assert weight is not None  # the callers look at layers whose parameters are at hand
    return weight.detach().double(), None if bias is None else bias.detach().double()


def _set(gm: GraphModule, layer: Node, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer other parameters, under the names of its own where nothing else reads those."""
    old, old_bias, base = layer.args[1], argument(layer, 2, "bias"), layer_name(layer)
    like = tensor_of(gm, old)
    assert isinstance(old, Node) and like is not None  # as `_tensors`
    with gm.graph.inserting_before(layer):
        new = _put(gm, old, f"{base}_weight", weight.to(like.dtype))
        new_bias = old_bias
        if bias is not None and isinstance(old_bias, Node):
            new_bias = _put(gm, old_bias, f"{base}_bias", bias.to(like.dtype))
        elif bias is not None:
            new_bias = _added_bias(gm, new, f"{base}_bias", bias.to(like.dtype))
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k not in ("weight", "bias")}
    layer.args = (layer.args[0], new, new_bias, *layer.args[3:])


def _put(gm: GraphModule, node: Node, base: str, value: Tensor) -> Node:
    """A node that reads the value: the one given, where only one layer reads what that reads."""
    target = str(node.target)
    readers = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == target]
    if len(readers) > 1 or len(node.users) > 1:
        return add_tensor(gm, base, value, parameter=True)
    path, _, name = target.rpartition(".")
    owner = gm.get_submodule(path)  # the graph's own: the model's modules and tensors stay
    if name in owner._buffers:
        owner._buffers[name] = value
    else:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    return node


def _added_bias(gm: GraphModule, weight: Node, base: str, value: Tensor) -> Node:
    """A bias beside a weight, under the name a module would give it."""
    path, _, name = str(weight.target).rpartition(".")
    owner = gm.get_submodule(path)
    if name != "weight" or hasattr(owner, "bias"):
        return add_tensor(gm, base, value, parameter=True)
    owner.register_parameter("bias", nn.Parameter(value, requires_grad=False))
    return gm.graph.get_attr(f"{path}.bias".lstrip("."))
