"""What is put right in an ONNX model after PyTorch's exporter wrote it: integers, names, no traces."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "Gemm", "Conv", "ConvTranspose", "Einsum"})
_FOUR_BITS = {ir.DataType.INT8: ir.DataType.INT4, ir.DataType.UINT8: ir.DataType.UINT4}


def store_weights(model: ir.Model, packed: Collection[str]) -> None:
    """Give every integer weight zero points of its own, in its own type; pack the ones named.

    PyTorch keeps zero points in int64 and casts them in the graph. One initializer each, because
    ONNX Runtime's rewrite of int8 weights refuses zero points that two weights share. A weight that two
    layers read is stored once.
    """
    halves: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        codes, zeros = node.inputs[0], _source(node.inputs[2])
        if codes.const_value is None or zeros.const_value is None:
            continue  # an activation
        name, kind = str(codes.name), codes.dtype
        if name in packed:
            kind = _FOUR_BITS[kind]
            if name not in halves:
                halves[name] = _initializer(model, f"{name}_4bit", codes, kind)
            node.replace_input_with(0, halves[name])
        node.replace_input_with(2, _initializer(model, f"{name}_zero_point", zeros, kind))
    RemoveUnusedNodesPass()(model)


def _source(value: ir.Value) -> ir.Value:
    """The initializer behind a cast, or the value itself."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Cast" else value


def _initializer(model: ir.Model, name: str, source: ir.Value, kind: ir.DataType) -> ir.Value:
    """A new initializer of another type with the values of `source`."""
    base, number = name, 1
    while name in model.graph.initializers:
        name, number = f"{base}_{number}", number + 1
    values = source.const_value.numpy().astype(kind.numpy())
    tensor = ir.tensor(values, dtype=kind, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def name_products(model: ir.Model, names: Sequence[str], layer_of: Mapping[str, str]) -> None:
    """Name each product after its layer, so that a runtime's graph can be read layer by layer.

    The exporter keeps the order of products. Where it made more or fewer than `names` (an operator
    it writes out), only the products of integer weights are named, by their codes.
    """
    products = [node for node in model.graph if node.op_type in _PRODUCTS]
    if len(names) == len(products):
        for node, name in zip(products, names, strict=True):
            node.name = name
        return
    used: set[str] = set()  # layers of equal weights read one initializer
    for node in products:
        if len(node.inputs) < 2:
            continue
        codes, weight = node.inputs[1], node.inputs[1].producer()
        if weight is not None and weight.op_type == "DequantizeLinear":
            codes = weight.inputs[0]
        layer = layer_of.get(str(codes.name).removesuffix("_4bit"), "")
        if layer and layer not in used:
            node.name = layer
            used.add(layer)


def drop_traces(model: ir.Model) -> None:
    """Remove what the exporter notes about its own run: stack traces with names of local files."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.initializers.values(), *model.graph.inputs):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
