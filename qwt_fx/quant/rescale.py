"""Moves scales and shifts of channels from one layer into the layers that read it, function unchanged.

With scale r and shift t per channel, x' = x / r - t is made upstream, by a norm's affine or by the rows
of the linear that computes attention's values, and undone downstream: W' = W diag(r), b' = b + W' t.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.aten import LAYER_NORM
from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.graph.edits import add_module, add_tensor, described, drop_tensor
from qwt_fx.graph.nodes import argument, dtype_of, layer_name, tensor_of
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_of, is_fake_quant
from qwt_fx.quant.norms import norm_affine, weight_node

aten = torch.ops.aten


def weight_and_bias(gm: GraphModule, layer: Node) -> tuple[Tensor, Tensor | None]:
    """The weight of a linear or convolution behind its quantizer, and its bias."""
    weight = tensor_of(gm, weight_node(gm, layer))
    assert weight is not None  # callers look at layers whose weight is a parameter
    bias = tensor_of(gm, argument(layer, 2, "bias"))
    return weight.detach(), None if bias is None else bias.detach()


def set_layer(
    gm: GraphModule,
    layer: Node,
    weight: Tensor,
    bias: Tensor | None,
    qparams: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Give a layer parameters, and its weight's quantizer qparams, of its own.

    The old ones may be tied to other layers, so all three get fresh names. The layer keeps its dtype.
    """
    old = layer.args[1]
    assert isinstance(old, Node)
    before, _ = weight_and_bias(gm, layer)
    base = layer_name(layer)
    with gm.graph.inserting_before(layer):
        new = add_tensor(gm, f"{base}_weight", weight.to(before.dtype), parameter=True)
        shift = None
        if bias is not None:
            shift = add_tensor(gm, f"{base}_bias", bias.to(before.dtype), parameter=True)
        if is_fake_quant(gm, old):
            module = FakeQuant(fake_quant_of(gm, old).spec, f"{base}.weight")
            module.mode = fake_quant_of(gm, old).mode
            if qparams is not None:
                module.set_qparams(*qparams)
            new = gm.graph.call_module(add_module(gm, "fake_quant_0", module), (new,))
            new.meta = described(old)
    layer.update_arg(1, new)
    old_bias = argument(layer, 2, "bias")
    if len(layer.args) > 2:
        layer.update_arg(2, shift)
    elif shift is not None:
        layer.args = (*layer.args, shift)
        layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}
    old_weight: object = old
    if is_fake_quant(gm, old):
        old_weight = old.args[0]
        if not old.users:  # a walk over the graph must not meet it
            gm.graph.erase_node(old)
    # A large model's weights are rewritten several times: what is replaced goes at once.
    drop_tensor(gm, old_weight)
    drop_tensor(gm, old_bias)


def undo_in_columns(gm: GraphModule, linear: Node, scale: Tensor, shift: Tensor) -> None:
    """W' = W diag(scale), b' = b + W' shift: the linear reads x / scale - shift from now on."""
    weight, bias = weight_and_bias(gm, linear)
    scaled = weight.double() * scale
    moved = scaled @ shift
    if bias is not None:
        moved = bias.double() + moved
    set_layer(gm, linear, scaled, moved if bias is not None or bool((shift != 0).any()) else None)


def divide_input(gm: GraphModule, quantizer: Node, scale: Tensor, shift: Tensor) -> Node:
    """The quantizer reads x / scale - shift from now on; returns the node that computes it.

    For values that no norm and no linear upstream can rescale: an elementwise product, which
    compilers fuse into what computes x.
    """
    source = quantizer.args[0]
    assert isinstance(source, Node)  # a FakeQuant reads one tensor
    dtype = dtype_of(source) or torch.float32
    base = fake_quant_of(gm, quantizer).name
    with gm.graph.inserting_before(quantizer):
        inverse = add_tensor(gm, f"{base}_input_inverse", scale.reciprocal().to(dtype))
        new = gm.graph.call_function(aten.mul.Tensor, (source, inverse))
        if bool((shift != 0).any()):
            new.meta = dict(source.meta)
            offset = add_tensor(gm, f"{base}_input_shift", shift.to(dtype))
            new = gm.graph.call_function(aten.sub.Tensor, (new, offset))
    new.meta = dict(source.meta)
    Correspondence.inserted(new, behind=source)
    quantizer.update_arg(0, new)
    return new


def divide_norm(gm: GraphModule, norm: Node, scale: Tensor, shift: Tensor) -> None:
    """The norm returns x / scale - shift from now on. Raises nothing: callers checked the affine."""
    weight, bias = (tensor_of(gm, a) for a in norm_affine(norm))
    like = weight if weight is not None else bias
    dtype = dtype_of(norm) if like is None else like.dtype
    ones = torch.ones_like(scale)
    new_weight = ((ones if weight is None else weight.detach().double()) / scale).to(dtype)
    new_bias = -shift if bias is None else bias.detach().double() / scale - shift
    x, shape = norm.args[0], argument(norm, 1, "normalized_shape")
    base = layer_name(norm)
    with gm.graph.inserting_before(norm):
        gamma = add_tensor(gm, f"{base}_weight", new_weight, parameter=True)
        if norm.target is LAYER_NORM:
            beta = add_tensor(gm, f"{base}_bias", new_bias.to(dtype), parameter=True)
            norm.args = (x, shape, gamma, beta, argument(norm, 4, "eps", 1e-5), False)
        else:
            norm.args = (x, shape, gamma, argument(norm, 3, "eps"))
    norm.kwargs = {}


def divide_rows(gm: GraphModule, linear: Node, rows: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Output row rows[k] of the linear becomes (row / scale[k]) - shift[k] from now on.

    A quantized weight keeps its codes: its scale is divided. scale, shift: (k,) float64.
    """
    weight, bias = weight_and_bias(gm, linear)
    factor = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    factor[rows] = scale
    offset = torch.zeros_like(factor)
    offset[rows] = shift
    old = linear.args[1]
    qparams = None
    if is_fake_quant(gm, old):
        assert isinstance(old, Node)
        module = fake_quant_of(gm, old)
        if module.scale is not None and module.zero_point is not None:
            qparams = ((module.scale.double() / factor).float(), module.zero_point)
    new_bias = (torch.zeros_like(factor) if bias is None else bias.double() / factor) - offset
    needed = bias is not None or bool((shift != 0).any())
    set_layer(gm, linear, weight.double() / factor[:, None], new_bias if needed else None, qparams)


def divide_constants(
    gm: GraphModule, constants: tuple[Node, ...], rows: Tensor, scale: Tensor, shift: Tensor
) -> None:
    """The same for constants that stand in for the linear's output at some positions."""
    for node in constants:
        value = tensor_of(gm, node.args[1])
        assert value is not None  # FixConstantTokens made it
        moved = value.detach().double()
        moved[..., rows] = moved[..., rows] / scale - shift
        with gm.graph.inserting_before(node):
            new = add_tensor(gm, str(node.args[1]), moved.to(value.dtype))
        node.update_arg(1, new)
