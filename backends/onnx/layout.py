"""Rewrites a converted graph into the shape that ONNX runtimes fuse into integer products.

ONNX Runtime computes MatMul(DequantizeLinear(a), DequantizeLinear(w)) from integers when nothing stands
between the two dequantizations and the product. So here

* weights are stored transposed, (in, out);
* shape-only operators move the codes, before they are dequantized;
* a dynamic input's codes meet the weight's in MatMulInteger, and each row of the product is corrected by
  its own zero point and scale: ONNX's DynamicQuantizeLinear has one range for a tensor;
* the scales of positions multiply the product instead of the activation (exact: powers of two);
* a convolution of patches that do not overlap is a matmul of the patches' codes;
* fused attention is written out, so that every product of the source is one of the export;
* what depends on parameters alone is computed before (`backends.constant_folding`);
* resizing with antialiasing is two products with constant matrices (`backends.onnx.resize`);
* what the graph computes in half or double precision is computed in float32 (`backends.widening`).

The function stays the same up to the order in which floating-point numbers are added.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from qwt_fx.backends.constant_folding import fold_constants
from qwt_fx.backends.lowering import LayerRewriter, float_reason, integer_layers, why_no_row_product
from qwt_fx.backends.onnx.integer_product import MATMUL_INTEGER
from qwt_fx.backends.onnx.resize import write_out_resizes
from qwt_fx.backends.token_quantizers import write_out_token_quantizers
from qwt_fx.backends.widening import as_float32, compute_in_float32
from qwt_fx.capture.attention import decompose_attention, why_not_decomposable
from qwt_fx.graph.aten import SDPA
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.nodes import compute_nodes, layer_name
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.quant import torch_ao
from qwt_fx.quant.integer_layers import IntegerLayer, IntegerWeight, layers_to_lower

aten = torch.ops.aten
_INT4 = (-8, 7)
_INT8 = (-128, 127)
# uint8 x int8 products are added in pairs as int16 by CPUs with AVX2 but no VNNI. Weights of this range
# cannot overflow there: 2 * 255 * 64 = 32640.
_NO_OVERFLOW = (-64, 63)


@dataclass(frozen=True)
class WeightStorage:
    """How integer weights are stored.

    Attributes:
        int4: weights of at most 4 bits in 4 bits.
        int8: every weight that fits it in int8 with zero point 0. Otherwise 8-bit weights are uint8
            codes, because ONNX Runtime's int8 products overflow on CPUs without VNNI.
    """

    int4: bool = False
    int8: bool = False


@dataclass
class Layout:
    """A graph ready for the exporter.

    Attributes:
        graph_module: the rewritten copy.
        reasons: layer name -> why it stays in floating point; `None` for an integer product. In
            graph order.
        layer_of: name of a weight's codes in the graph -> its layer.
        packed: the codes among them that are to be stored in 4 bits.
    """

    graph_module: GraphModule
    reasons: dict[str, str | None] = field(default_factory=dict)
    layer_of: dict[str, str] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)


def lay_out(
    quantized: GraphModule, example_inputs: tuple[Tensor, ...], storage: WeightStorage | None = None
) -> Layout:
    """Rewrite a copy of a converted graph; `example_inputs` are of full length, any batch.

    Floating-point inputs are float32 in the copy.
    """
    gm = copy.deepcopy(quantized)
    layout = Layout(gm)
    storage = storage or WeightStorage()
    fold_constants(gm)
    compute_in_float32(gm)
    _record_shapes(gm, tuple(as_float32(x) for x in example_inputs))
    write_out_resizes(gm)
    for node in list(gm.graph.find_nodes(op="call_function", target=SDPA)):
        if why_not_decomposable(node) is None:
            decompose_attention(gm, node)
    layers = integer_layers(gm, why_no_row_product)
    layout.reasons |= {layer_name(node): float_reason(node) for node in compute_nodes(gm)}
    for layer in layers:
        if layer.input.of_token is None or _packed(layer, storage):
            _rewrite(layout, layer, storage)
        else:
            _rewrite_dynamic(layout, layer, storage)
    write_out_token_quantizers(gm, but={torch_ao.QUANTIZE_PER_TOKEN})
    clean_up(gm)
    return layout


def _record_shapes(gm: GraphModule, example_inputs: tuple[Tensor, ...]) -> None:
    """Shapes of every value on the example: an artifact does not keep them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [mode.from_tensor(x) for x in example_inputs]
    with torch.no_grad():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)


def _rewrite(layout: Layout, layer: IntegerLayer, storage: WeightStorage) -> None:
    activation, rewriter = layer.input, LayerRewriter(layout.graph_module)
    call = rewriter.call
    source = layer.node.args[0]
    assert isinstance(source, Node)  # a layer reads a node
    with layout.graph_module.graph.inserting_before(layer.node):
        codes = rewriter.moved(layer, activation.codes)
        sizes: tuple[Node, int, int] | None = None
        if layer.weight.codes.dim() == 4:
            codes, sizes = _patches(rewriter, codes, source.meta["val"].shape, layer)
        matrix = source.meta["val"].dim() == 2
        if matrix:  # a product of two matrices and an addition become a floating-point Gemm
            codes = call(aten.unsqueeze.default, codes, 0)
        limits = (activation.quant_min, activation.quant_max, torch.uint8)
        if activation.of_token is not None:  # of weights in 4 bits: a floating-point product
            dequantized = call(
                torch_ao.DEQUANTIZE_PER_TOKEN, codes, *activation.of_token, *limits, torch.float32
            )
        else:
            qparams = (activation.scale, activation.zero_point, *limits)
            dequantized = call(torch_ao.DEQUANTIZE_PER_TENSOR, codes, *qparams)
        new = call(aten.matmul.default, dequantized, _weight(layout, layer, storage))
        new.meta["layer"] = layer.name
        if matrix:
            new = call(aten.squeeze.dim, new, 0)
        if activation.token_scale is not None:
            new = call(aten.mul.Tensor, new, activation.token_scale)
        if layer.bias is not None:
            new = call(aten.add.Tensor, new, layer.bias)
        if sizes is not None:
            samples, *grid = sizes
            channels_first = call(aten.permute.default, new, [0, 2, 1])
            new = call(aten.reshape.default, channels_first, [samples, -1, *grid])
    rewriter.replace(layer.node, new)


def _rewrite_dynamic(layout: Layout, layer: IntegerLayer, storage: WeightStorage) -> None:
    """y = s_m t_j (sum_k a_mk w_jk - z_m sum_k w_jk) + b_j, w without its zero point, sums in int32."""
    assert layer.input.of_token is not None  # the caller asked
    gm, rewriter = layout.graph_module, LayerRewriter(layout.graph_module)
    call, weight = rewriter.call, layer.weight
    scale, zero_point = layer.input.of_token
    stem = _stem(layer)
    with gm.graph.inserting_before(layer.node):
        codes, zeros, _ = _stored(weight, storage)
        rows = codes.T.contiguous()
        codes_node = add_tensor(gm, f"{stem}_codes", rows)
        layout.layer_of[str(codes_node.target)] = layer.name
        zeros_node = add_tensor(gm, f"{stem}_zero_point", zeros.to(rows.dtype))
        sums = (codes.long() - zeros[:, None]).sum(dim=1)
        sums_node = add_tensor(gm, f"{stem}_sums", sums.to(torch.int32))
        scale_node = add_tensor(gm, f"{stem}_scale", weight.scale.float())
        new = call(MATMUL_INTEGER, layer.input.codes, codes_node, zeros_node)
        new.meta["layer"] = layer.name
        new = call(aten.sub.Tensor, new, call(aten.mul.Tensor, zero_point, sums_node))
        new = call(aten.to.dtype, new, torch.float32)
        new = call(aten.mul.Tensor, call(aten.mul.Tensor, new, scale_node), scale)
        if layer.bias is not None:
            new = call(aten.add.Tensor, new, layer.bias)
    rewriter.replace(layer.node, new)


def _stem(layer: IntegerLayer) -> str:
    return f"{layer.name}_onnx".replace("@", "_")


def _packed(layer: IntegerLayer, storage: WeightStorage) -> bool:
    """Whether the weight is stored in 4 bits."""
    return storage.int4 and layer.weight.bits <= 4


def _patches(
    rewriter: LayerRewriter, codes: Node, shape: torch.Size, layer: IntegerLayer
) -> tuple[Node, tuple[Node, int, int]]:
    """Codes (n, c, h, w) as (n, gh gw, c kh kw), and the sizes (n, gh, gw).

    By reshapes, because ONNX has no operator for the windows of `LayerRewriter.rows`.
    """
    call = rewriter.call
    channels, kh, kw = layer.weight.codes.shape[1:]
    height, width = shape[2:]
    gh, gw = height // kh, width // kw
    samples = call(aten.sym_size.int, codes, 0)
    if (height, width) != (gh * kh, gw * kw):  # what no patch covers
        codes = call(aten.slice.Tensor, codes, 2, 0, gh * kh)
        codes = call(aten.slice.Tensor, codes, 3, 0, gw * kw)
    split = call(aten.reshape.default, codes, [samples, channels, gh, kh, gw, kw])
    ordered = call(aten.permute.default, split, [0, 2, 4, 1, 3, 5])
    rows = call(aten.reshape.default, ordered, [samples, gh * gw, channels * kh * kw])
    return rows, (samples, gh, gw)


def _weight(layout: Layout, layer: IntegerLayer, storage: WeightStorage) -> Node:
    """The dequantized weight (in, out)."""
    gm, weight = layout.graph_module, layer.weight
    codes, zero_point, limits = _stored(weight, storage)
    rows = codes.reshape(codes.shape[0], -1).T.contiguous()
    stem = _stem(layer)
    codes_node = add_tensor(gm, f"{stem}_codes", rows)
    scale_node = add_tensor(gm, f"{stem}_scale", weight.scale.float())
    zeros = add_tensor(gm, f"{stem}_zero_point", zero_point)
    layout.layer_of[str(codes_node.target)] = layer.name
    if _packed(layer, storage):
        layout.packed.add(str(codes_node.target))
    return gm.graph.call_function(
        torch_ao.DEQUANTIZE_PER_CHANNEL, (codes_node, scale_node, zeros, 1, *limits, rows.dtype)
    )


def int8_changes_weights(quantized: GraphModule) -> bool:
    """Whether some weights are stored as uint8 codes that `WeightStorage(int8=True)` stores as int8."""
    weights = [la.weight for la in layers_to_lower(quantized) if isinstance(la, IntegerLayer)]
    return any(
        _stored(weight, WeightStorage())[0].dtype is torch.uint8
        and _stored(weight, WeightStorage(int8=True))[0].dtype is torch.int8
        for weight in weights
    )


def _stored(
    weight: IntegerWeight, storage: WeightStorage
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Codes, zero points and the codes' limits as the export stores them."""
    signed = weight.signed()
    low, high = _NO_OVERFLOW
    if storage.int8:
        low, high = _INT8
    if storage.int4 and weight.bits <= 4:
        low, high = _INT4
    if signed is not None and low <= int(signed.min()) and int(signed.max()) <= high:
        # Zeros that are spelled out: some of ONNX Runtime's rewrites need them.
        return signed, torch.zeros_like(weight.zero_point, dtype=torch.int64), (low, high)
    # int64 zero points: the operator subtracts in the type it is given.
    return weight.codes, weight.zero_point.to(torch.int64), (0, 2**weight.bits - 1)
