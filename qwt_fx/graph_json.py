"""A graph as JSON, and back: operators from an allow-list, everything checked before anything is built.

torch.fx writes Python source from node names, operator names and arguments and runs it, so no
string of a document may reach that source unless it matches a strict pattern.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from qwt_fx.errors import ArtifactError
from qwt_fx.graph import Block, GraphInfo, get_attr, graph_info, set_graph_info
from qwt_fx.graph_ops import NAMES, OPERATORS
from qwt_fx.structure import spec_from_json, spec_to_json

SCHEMA = 1
MAX_NODES, MAX_DEPTH, MAX_TEXT = 200_000, 8, 4096

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,500}|_[A-Za-z0-9][A-Za-z0-9_]{0,500}")
_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_FORMATS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format,
            "channels_last": torch.channels_last}  # fmt: skip
# Names that mean something in the source torch.fx generates.
_RESERVED = frozenset({"torch", "device", "inf", "nan", "self", "fx_pytree", "pytree", "NoneType"})


def _fail(where: str, what: str) -> ArtifactError:
    return ArtifactError(f"graph: {where}: {what}")


# -- writing ---------------------------------------------------------------------------------


def graph_to_json(gm: GraphModule) -> dict[str, Any]:
    """The graph as plain JSON values. Raises `ArtifactError` naming a node that cannot be stored."""
    codegen = gm.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        raise _fail("signature", "the graph was not captured by qwt_fx.capture")
    info = codegen.pytree_info
    out_spec = info.out_spec
    if out_spec is None:
        raise _fail("signature", "the structure of the outputs is not recorded")
    return {
        "schema": SCHEMA,
        "nodes": [_node_to_json(node) for node in gm.graph.nodes],
        "signature": {
            "arguments": list(info.orig_args),
            "inputs": spec_to_json(info.in_spec),
            "outputs": spec_to_json(out_spec),
        },
        "info": dataclasses.asdict(graph_info(gm)),
    }


def _node_to_json(node: Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        if node.target not in NAMES:
            raise _fail(node.name, f"operator {node.target} cannot be stored")
        entry["target"] = NAMES[node.target]
    elif node.op == "get_attr":
        entry["target"] = str(node.target)
    elif node.op == "call_module":
        raise _fail(node.name, f"calls the module {node.target}: convert the graph first")
    if node.op in ("call_function", "output"):
        entry["args"] = [_value_to_json(node, a) for a in node.args]
        if node.kwargs:
            entry["kwargs"] = {k: _value_to_json(node, v) for k, v in node.kwargs.items()}
    if "layer" in node.meta:
        entry["layer"] = str(node.meta["layer"])
    return entry


def _value_to_json(node: Node, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [_value_to_json(node, v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [_value_to_json(node, v) for v in (value.start, value.stop, value.step)]}
    raise _fail(node.name, f"an argument of type {type(value).__name__} cannot be stored: {value}")


# -- reading ---------------------------------------------------------------------------------


def graph_from_json(document: Any, tensors: Mapping[str, Tensor]) -> GraphModule:
    """Build the graph of a document over these tensors.

    Raises `ArtifactError` naming the node for anything that is not as `graph_to_json` writes it:
    an operator not listed, a name that could be code, a reference forwards, an unknown tensor.
    """
    reader = _Reader(document, tensors)
    return reader.build()


def _object(
    value: Any, where: str, required: set[str], optional: frozenset[str] = frozenset()
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fail(where, "wanted a JSON object")
    if missing := required - set(value):
        raise _fail(where, f"{sorted(missing)} missing")
    if unknown := set(value) - required - optional:
        raise _fail(where, f"unknown keys {sorted(unknown)[:3]}")
    return value


def _identifier(value: Any, where: str) -> str:
    if (
        not isinstance(value, str)
        or not _IDENTIFIER.fullmatch(value)
        or keyword.iskeyword(value)
        or value.startswith("__")
        or value in _RESERVED
    ):
        raise _fail(where, f"{str(value)[:80]!r} is not a name a graph may use")
    return value


class _Reader:
    def __init__(self, document: Any, tensors: Mapping[str, Tensor]) -> None:
        top = _object(document, "document", {"schema", "nodes", "signature", "info"})
        if top["schema"] != SCHEMA:
            raise _fail(
                "schema", f"got {top['schema']!r}, wanted {SCHEMA}; a newer qwt-fx may read it"
            )
        if not isinstance(top["nodes"], list) or not 0 < len(top["nodes"]) <= MAX_NODES:
            raise _fail("nodes", f"wanted a list of 1..{MAX_NODES} nodes")
        self._document = top
        self._tensors = tensors
        self._graph = Graph()
        self._nodes: dict[str, Node] = {}

    def build(self) -> GraphModule:
        signature = _object(
            self._document["signature"], "signature", {"arguments", "inputs", "outputs"}
        )
        names = signature["arguments"]
        if not isinstance(names, list):
            raise _fail("signature", "arguments: wanted a list")
        names = [_identifier(n, "signature") for n in names]
        inputs = spec_from_json(signature["inputs"], "signature inputs")
        outputs = spec_from_json(signature["outputs"], "signature outputs")
        info = self._info(self._document["info"])
        entries = [self._entry(e, i) for i, e in enumerate(self._document["nodes"])]
        self._check(entries, inputs.num_leaves, outputs.num_leaves)
        root = self._root(entries)
        for entry in entries:
            self._add(entry)
        self._check_blocks(info)
        self._graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, inputs, outputs)))
        self._graph.lint()
        gm = GraphModule(root, self._graph)
        set_graph_info(gm, info)
        gm.eval()
        return gm

    def _entry(self, value: Any, index: int) -> dict[str, Any]:
        where = f"node {index}"
        entry = _object(
            value, where, {"name", "op"}, frozenset({"target", "args", "kwargs", "layer"})
        )
        name = _identifier(entry["name"], where)
        op = entry["op"]
        if op not in ("placeholder", "get_attr", "call_function", "output"):
            raise _fail(name, f"operation {str(op)[:40]!r} is not allowed")
        if op == "call_function" and (
            not isinstance(entry.get("target"), str) or entry["target"] not in OPERATORS
        ):
            raise _fail(name, f"operator {str(entry.get('target'))[:80]!r} is not on the list")
        if op == "get_attr":
            target = entry.get("target")
            if (
                not isinstance(target, str)
                or not _PATH.fullmatch(target)
                or "__" in target
                or target not in self._tensors
            ):
                raise _fail(name, f"reads {str(target)[:80]!r}, which is not a stored tensor")
        for key, kind in (("args", list), ("kwargs", dict)):
            if not isinstance(entry.get(key, kind()), kind):
                raise _fail(name, f"{key}: wanted a {kind.__name__}")
        layer = entry.get("layer", "")
        if not isinstance(layer, str) or len(layer) > MAX_TEXT:
            raise _fail(name, "layer: wanted a short string")
        return entry

    def _check(self, entries: list[dict[str, Any]], inputs: int, outputs: int) -> None:
        ops = [e["op"] for e in entries]
        names = [e["name"] for e in entries]
        if len(set(names)) != len(names):
            raise _fail("nodes", "two nodes have one name")
        if ops.count("output") != 1 or ops[-1] != "output":
            raise _fail("nodes", "wanted exactly one output, at the end")
        if ops.count("placeholder") != inputs:
            raise _fail(
                "signature", f"{inputs} inputs, but {ops.count('placeholder')} placeholders"
            )
        results = entries[-1].get("args", [])
        leaves = results[0] if results and isinstance(results[0], list) else results
        if len(leaves) != outputs:
            raise _fail("signature", f"{outputs} outputs, but the graph returns {len(leaves)}")

    def _root(self, entries: list[dict[str, Any]]) -> nn.Module:
        root = nn.Module()
        for target in dict.fromkeys(e["target"] for e in entries if e["op"] == "get_attr"):
            module = root
            *parents, leaf = target.split(".")
            for part in parents:
                child = module._modules.get(part)
                if child is None:
                    if hasattr(module, part):
                        raise _fail(target, "clashes with another name")
                    child = nn.Module()
                    module.add_module(part, child)
                module = child
            if hasattr(module, leaf):
                raise _fail(target, "clashes with another name")
            module.register_buffer(leaf, self._tensors[target])
        return root

    def _add(self, entry: dict[str, Any]) -> None:
        name, op = entry["name"], entry["op"]
        args = tuple(self._value(name, v, 0) for v in entry.get("args", []))
        kwargs = {
            _identifier(k, name): self._value(name, v, 0)
            for k, v in entry.get("kwargs", {}).items()
        }
        target: Any = name if op == "placeholder" else "output"
        if op == "call_function":
            target = OPERATORS[entry["target"]]
        elif op == "get_attr":
            target = entry["target"]
        node = self._graph.create_node(op, target, args, kwargs, name)
        if node.name != name:
            raise _fail(name, "is not a name a graph may use")
        if "layer" in entry:
            node.meta["layer"] = entry["layer"]
        self._nodes[name] = node

    def _value(self, where: str, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _fail(where, "arguments are nested too deeply")
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise _fail(where, "a number that is not finite")
            return value
        if isinstance(value, str):
            # Strings reach the generated source quoted by repr; only short plain words are used.
            if not re.fullmatch(r"[A-Za-z0-9_,.> -]{0,200}", value):
                raise _fail(where, f"the string {value[:40]!r} is not allowed")
            return value
        if isinstance(value, list):
            return [self._value(where, v, depth + 1) for v in value]
        if isinstance(value, dict) and len(value) == 1:
            return self._tagged(where, *next(iter(value.items())), depth)
        raise _fail(where, "an argument is malformed")

    def _tagged(self, where: str, tag: str, value: Any, depth: int) -> Any:
        if tag == "node" and isinstance(value, str) and value in self._nodes:
            return self._nodes[value]
        if tag == "dtype" and isinstance(value, str) and value in _DTYPES:
            return _DTYPES[value]
        if tag == "memory_format" and isinstance(value, str) and value in _FORMATS:
            return _FORMATS[value]
        if tag == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if tag == "slice" and isinstance(value, list) and len(value) == 3:
            return slice(*(self._value(where, v, depth + 1) for v in value))
        raise _fail(where, f"the argument {tag}: {str(value)[:60]!r} is not known")

    def _info(self, value: Any) -> GraphInfo:
        fields = {f.name for f in dataclasses.fields(GraphInfo)}
        entry = dict(_object(value, "info", fields))
        blocks = entry["blocks"]
        if not isinstance(blocks, list):
            raise _fail("info", "blocks: wanted a list")
        for block in blocks:
            _object(block, "info blocks", {"name", "input", "output"})
            if not all(isinstance(v, str) and len(v) <= MAX_TEXT for v in block.values()):
                raise _fail("info", "blocks: wanted strings")
        entry["blocks"] = [Block(**block) for block in blocks]
        kinds = {"passes": list, "compensations": dict, "layers": dict, "config": dict}
        for key, kind in kinds.items():
            if not isinstance(entry[key], kind):
                raise _fail("info", f"{key}: wanted a {kind.__name__}")
        if entry["unstorable"] is not None:
            raise _fail("info", "the graph is marked as one that cannot be stored")
        return GraphInfo(**entry)

    def _check_blocks(self, info: GraphInfo) -> None:
        for block in info.blocks:
            for name in (block.input, block.output):
                if name not in self._nodes:
                    raise _fail("info", f"block {block.name[:80]}: there is no node {name[:80]!r}")


def tensors_of(gm: GraphModule) -> dict[str, Tensor]:
    """The tensors a graph reads, by the path it reads them at, in order."""
    found: dict[str, Tensor] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = get_attr(gm, str(node.target))
        if not isinstance(value, Tensor):
            raise _fail(node.name, f"reads {node.target}, a {type(value).__name__}, not a tensor")
        found[str(node.target)] = value
    return found
