"""A graph as JSON, and back, bit for bit: names and arguments, no code, no pickle."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from qwt_fx.artifact import graph_args
from qwt_fx.artifact.allowed_operators import NAMES
from qwt_fx.artifact.graph_document import NODE_OPS, SCHEMA, Document, parse_document
from qwt_fx.artifact.graph_info_json import info_to_json
from qwt_fx.artifact.graph_tensors import describe_tensors, register
from qwt_fx.artifact.json_values import Json
from qwt_fx.artifact.structure import spec_to_json
from qwt_fx.errors import ArtifactError
from qwt_fx.graph.graph_info import has_graph_info, set_graph_info
from qwt_fx.graph.graph_source import forget_source_with


def graph_to_json(gm: GraphModule) -> dict[str, Json]:
    """The graph as JSON values; its tensors are described, not held. Raises what `describe` does."""
    return describe(gm)[0]


def describe(gm: GraphModule) -> tuple[dict[str, Json], Document]:
    """The graph as JSON values, and these parsed.

    Raises `ArtifactError` naming the node, and the reason, when the graph cannot be stored:
    whatever `parse_document` refuses is refused here already.
    """
    codegen = gm.graph._codegen
    if type(codegen) is not _PyTreeCodeGen:
        raise ArtifactError("signature: the graph was not captured by qwt_fx.capture")
    signature = codegen.pytree_info
    if signature.out_spec is None:
        raise ArtifactError("signature: the structure of the outputs is not recorded")
    nodes: Json = [_node_to_json(node) for node in gm.graph.nodes]
    attributes, tensors = describe_tensors(gm)
    document: dict[str, Json] = {
        "schema": SCHEMA,
        "signature": {
            "arguments": list(signature.orig_args),
            "inputs": spec_to_json(signature.in_spec, "signature: inputs"),
            "outputs": spec_to_json(signature.out_spec, "signature: outputs"),
        },
        "nodes": nodes,
        "attributes": attributes,
        "tensors": tensors,
        "info": info_to_json(gm) if has_graph_info(gm) else None,
    }
    return document, parse_document(document)


def why_not_storable(gm: GraphModule) -> str | None:
    """Why a graph could not be stored, and what can be done; `None` when it can."""
    try:
        describe(gm)
    except ArtifactError as error:
        return (
            f"the graph can be quantized, run, lowered and exported, but not saved: {error}; to save "
            "it, write that part of the model with operators of the list"
        )
    return None


def _node_to_json(node: Node) -> Json:
    entry: dict[str, Json] = {"name": node.name, "op": node.op}
    if node.op not in NODE_OPS:
        raise ArtifactError(
            f"node {node.name}: {node.op} {node.target} cannot be stored: wanted a converted graph "
            "of operators; call qwt_fx.convert first"
        )
    if node.op == "placeholder" and (node.args or node.kwargs):
        raise ArtifactError(f"node {node.name}: an input with a default value cannot be stored")
    if node.op == "call_function":
        if node.target not in NAMES:
            raise ArtifactError(
                f"node {node.name}: the operator {node.target} is not on the list of those that "
                "may be stored (qwt_fx.artifact.allowed_operators)"
            )
        entry["target"] = NAMES[node.target]
    elif node.op == "get_attr":
        entry["target"] = str(node.target)
    if node.op in ("call_function", "output"):
        entry["args"] = [graph_args.encode(a, node.name) for a in node.args]
    if node.kwargs:
        entry["kwargs"] = {k: graph_args.encode(v, node.name) for k, v in node.kwargs.items()}
    if "layer" in node.meta:
        entry["layer"] = str(node.meta["layer"])
    return entry


def graph_from_json(document: Json, tensors: Mapping[str, Tensor]) -> GraphModule:
    """Build the graph of a document over its tensors, as they are after `graph_tensors.restore`.

    Raises `ArtifactError` naming the node for anything that is not as `graph_to_json` writes it:
    an operator not listed, a name that could be code, a reference forwards, an unknown tensor.
    """
    return build(parse_document(document), tensors)


def build(document: Document, tensors: Mapping[str, Tensor]) -> GraphModule:
    """Build the graph of a checked document. Raises `ArtifactError` for tensors that do not fit."""
    for name, stored in document.tensors.items():
        value = tensors.get(name)
        if value is None or value.dtype is not stored.dtype or value.shape != stored.shape:
            raise ArtifactError(f"tensors: {name} is missing or not as recorded")
    gm = GraphModule(nn.Module(), Graph())
    forget_source_with(gm)
    register(gm, document.attributes, tensors)
    graph = Graph()
    nodes: dict[str, Node] = {}
    for call in document.calls:
        args = tuple(graph_args.substitute(v, nodes) for v in call.args)
        kwargs = {k: graph_args.substitute(v, nodes) for k, v in call.kwargs.items()}
        target = call.name if call.target is None else call.target
        node = graph.create_node(call.op, target, args, kwargs, call.name)
        node.name = call.name  # torch.fx renames what looks like its own numbering (`w_01`)
        if call.layer is not None:
            node.meta["layer"] = call.layer
        nodes[call.name] = node
    info = _PyTreeInfo(list(document.arguments), document.inputs, document.outputs)
    graph.set_codegen(_PyTreeCodeGen(info))
    gm.graph = graph
    forget_source_with(gm)
    gm.graph.lint()
    if document.info is not None:
        set_graph_info(gm, document.info)
    gm.eval()
    return gm
