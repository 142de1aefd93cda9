from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stored_graphs import (
    CODE,
    assert_same,
    captured,
    converted,
    inputs,
    mutate,
    restored_tensors,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from qwt_fx.artifact.allowed_operators import OPERATORS
from qwt_fx.artifact.graph_json import graph_from_json, graph_to_json, why_not_storable
from qwt_fx.capture.capture import capture
from qwt_fx.errors import ArtifactError, QwtError
from qwt_fx.graph.graph_info import GraphInfo, graph_info

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    return converted()


@pytest.fixture
def document(graph: GraphModule) -> dict[str, Any]:
    return json.loads(json.dumps(graph_to_json(graph)))


@pytest.fixture
def load(graph: GraphModule) -> Callable[[Any], GraphModule]:
    tensors = restored_tensors(graph, graph_to_json(graph))
    return lambda document: graph_from_json(document, tensors)


def node_of(document: dict[str, Any], op: str, target: str | None = None) -> dict[str, Any]:
    return next(n for n in document["nodes"] if n["op"] == op and target in (None, n.get("target")))


# -- what survives -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [captured, converted])
@pytest.mark.parametrize("batch", [1, 6])
def test_results_structure_and_source_survive(build: Callable[[], GraphModule], batch: int) -> None:
    gm = build()
    document = json.loads(json.dumps(graph_to_json(gm)))
    back = graph_from_json(document, restored_tensors(gm, document))
    assert_same(gm, back, batch)
    assert back.code == gm.code
    assert [n.name for n in back.graph.nodes] == [n.name for n in gm.graph.nodes]
    assert [n.meta.get("layer") for n in back.graph.nodes] == [
        n.meta.get("layer") for n in gm.graph.nodes
    ]
    assert graph_to_json(back) == document


def test_records_survive(graph: GraphModule, document: Any, load: Any) -> None:
    info, back = graph_info(graph), graph_info(load(document))
    assert math.isnan(back.compensations["blocks.0"].pop("r2"))
    wanted = copy.deepcopy(info.compensations["blocks.0"])
    del wanted["r2"]
    assert back.compensations["blocks.0"] == wanted
    assert (back.blocks, back.config) == (info.blocks, info.config)


def test_a_loaded_graph_is_a_plain_graph_module(document: Any, load: Any) -> None:
    gm = load(document)
    args, kwargs = inputs()
    assert_same(gm, copy.deepcopy(gm))
    exported = torch.export.export(gm, args, kwargs).module()
    assert torch.equal(exported(*args, **kwargs)["out"], gm(*args, **kwargs)["out"])
    gm.load_state_dict(gm.state_dict())
    assert gm.to(torch.float64) is gm and not gm.training


def test_parameters_buffers_and_ties_survive() -> None:
    gm = captured()
    back = graph_from_json(graph_to_json(gm), restored_tensors(gm, graph_to_json(gm)))
    weight = back.get_parameter("blocks.0.weight")
    assert back.get_parameter("blocks.1.weight") is weight and weight.requires_grad
    assert "mask" in back.state_dict() and "hidden" not in back.state_dict()
    assert back.get_buffer("hidden").stride() == gm.get_buffer("hidden").stride() == (1, 5)
    assert set(dict(back.named_parameters())) == set(dict(gm.named_parameters()))


def test_tied_codes_are_stored_once(document: Any) -> None:
    entries = [e["tensor"] for p, e in document["attributes"].items() if "_codes" in p]
    assert len(entries) == 3 and len(set(entries)) == 2
    assert {document["tensors"][e]["bits"] for e in entries} == {4}


def test_codes_that_do_not_fit_are_stored_as_they_are() -> None:
    gm = converted()
    name = next(n for n, _ in gm.named_buffers() if n.endswith("_codes"))
    gm.get_buffer(name)[0, 0] = 16
    document = graph_to_json(gm)
    assert "bits" not in document["tensors"][name]
    assert_same(gm, graph_from_json(document, restored_tensors(gm, document)))


def test_a_model_output_of_a_library_survives() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    gm = capture(transformers.ViTModel(config), (x,))
    document = graph_to_json(gm)
    back = graph_from_json(document, restored_tensors(gm, document))
    assert type(back(x)) is type(gm(x))
    assert torch.equal(back(x).last_hidden_state, gm(x).last_hidden_state)
    text = json.dumps(document).replace("BaseModelOutputWithPooling", "OutputOfNobody")
    with pytest.raises(ArtifactError, match=r"OutputOfNobody' is not registered: import"):
        graph_from_json(json.loads(text), restored_tensors(gm, document))


# -- what is refused when writing ----------------------------------------------------------------


def test_a_module_call_is_refused_by_name() -> None:
    gm = captured()
    gm.add_module("probe", nn.Identity())
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_module("probe", (next(iter(gm.graph.nodes)),)).name = "the_probe"
    with pytest.raises(ArtifactError, match=r"node the_probe: call_module probe .*convert"):
        graph_to_json(gm)


def with_call(target: Any, *args: Any, **kwargs: Any) -> GraphModule:
    gm = captured()
    with gm.graph.inserting_before(gm.graph.output_node()):
        x = gm.graph.find_nodes(op="placeholder")[0]
        node = gm.graph.call_function(target, (x, *args), kwargs)
        node.name = "culprit"
    return gm


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (torch.ops.aten.add_.Tensor, (1,), "not on the list"),
        (torch.ops.aten.set_.source_Tensor, (1,), "not on the list"),
        (torch.ops.aten.bernoulli.default, (), "not on the list"),
        (torch.sin, (), "not on the list"),
        (eval, (), "not on the list"),
        (torch.ops.aten.add.Tensor, (object(),), "argument of type object"),
        (torch.ops.aten.add.Tensor, (torch.device("cpu"),), "argument of type device"),
        (torch.ops.aten.add.Tensor, (2**70,), "does not fit 64 bits"),
        (torch.ops.aten.add.Tensor, (1, 2, 3, 4), "takes at most 2"),
        (torch.ops.aten.add.Tensor, (), "needs other"),
        (torch.ops.aten.to.dtype, ("float32",), "dtype of aten.to.dtype"),
        (torch.ops.aten.to.dtype, (torch.complex64,), "not known"),
        (torch.ops.aten.einsum.default, ("a'b",), "the string"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_node(
    target: Any, args: tuple[Any, ...], reason: str
) -> None:
    with pytest.raises(ArtifactError, match=f"node culprit.*{reason}"):
        graph_to_json(with_call(target, *args))


def test_a_literal_device_is_refused_and_none_is_not() -> None:
    zeros = torch.ops.aten.zeros_like.default
    graph_to_json(with_call(zeros, device=None))
    with pytest.raises(ArtifactError, match=r"node culprit.*device"):
        graph_to_json(with_call(zeros, device=torch.device("cpu")))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        3,
    ],
)
def test_other_tensors_are_refused_by_path(value: Any) -> None:
    gm = captured()
    gm.odd = value
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.create_node("get_attr", "odd")
    with pytest.raises(ArtifactError, match="odd: a"):
        graph_to_json(gm)


def test_a_graph_that_was_taken_apart_is_refused_by_path(graph: GraphModule) -> None:
    """As torchao's `convert_pt2e` leaves the prepared graph behind."""
    gm = copy.deepcopy(graph)
    path = str(gm.graph.find_nodes(op="get_attr")[0].target)
    owner, _, name = path.rpartition(".")
    delattr(gm.get_submodule(owner), name)
    with pytest.raises(ArtifactError, match=f"{path}: read by the graph, but not an attribute"):
        graph_to_json(gm)
    assert path in (why_not_storable(gm) or "")


def test_a_graph_marked_unstorable_is_refused_with_the_reason() -> None:
    gm = captured()
    graph_info(gm).unstorable = "its zero points are not integers"
    with pytest.raises(ArtifactError, match="its zero points are not integers"):
        graph_to_json(gm)


def test_records_that_json_cannot_hold_are_refused_with_their_place() -> None:
    gm = captured()
    graph_info(gm).layers["a"] = {"scale": torch.ones(1)}
    with pytest.raises(ArtifactError, match=r"info\.layers\.a\.scale: a value of type Tensor"):
        graph_to_json(gm)


def test_a_graph_without_export_signature_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"not captured by qwt_fx\.capture"):
        graph_to_json(torch.fx.symbolic_trace(nn.ReLU()))


# -- what is refused when reading ----------------------------------------------------------------


def _rename(op: str, name: Any) -> Edit:
    return lambda document: node_of(document, op).update(name=name)


BAD_NAMES = ["", "class", "None", "__import__", "__a", "a b", "a.b", "a;b", "a\n", "é", "1a", "self",
             "torch", "getattr", "pytree", f"a={CODE}", "a" * 999, None, 3, ["a"]]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("op", ["placeholder", "get_attr", "call_function"])
def test_names_that_could_be_code_are_refused(document: Any, load: Any, op: str, name: Any) -> None:
    _rename(op, name)(document)
    with pytest.raises(ArtifactError, match="not a name a graph may use"):
        load(document)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_argument_names_that_could_be_code_are_refused(document: Any, load: Any, name: Any) -> None:
    document["signature"]["arguments"][0] = name
    with pytest.raises(ArtifactError, match="not a name"):
        load(document)


@pytest.mark.parametrize("key", ["", "class", "__a", f"x': {CODE}, 'y", "é", "a b", 3, None])
def test_keyword_inputs_and_output_keys_that_could_be_code_are_refused(
    document: Any, load: Any, key: Any
) -> None:
    # torch.fx writes these names between quotes without escaping them.
    inputs_edited, outputs_edited = copy.deepcopy(document), copy.deepcopy(document)
    inputs_edited["signature"]["inputs"]["tuple"][1]["dict"][0][0] = key
    outputs_edited["signature"]["outputs"]["dict"][0][0] = key
    for side, edited in (("inputs", inputs_edited), ("outputs", outputs_edited)):
        with pytest.raises(ArtifactError, match=f"{side}.*not a name"):
            load(edited)


@pytest.mark.parametrize(
    "target",
    ["aten.add_.Tensor", "aten.set_.source_Tensor", "aten.from_file.default", "aten.bernoulli.default",
     "operator.setitem", "operator.methodcaller", "builtins.eval", "os.system", "aten.add",
     "aten.add.Tensor.__class__", "torch.load", CODE, "", None, 3, ["aten.add.Tensor"]],
)  # fmt: skip
def test_operators_not_on_the_list_are_refused(document: Any, load: Any, target: Any) -> None:
    node_of(document, "call_function")["target"] = target
    with pytest.raises(ArtifactError, match="not on the list"):
        load(document)


@pytest.mark.parametrize("op", ["call_module", "call_method", "root", "", None, ["output"]])
def test_other_kinds_of_nodes_are_refused(document: Any, load: Any, op: Any) -> None:
    node_of(document, "call_function")["op"] = op
    with pytest.raises(ArtifactError, match="an op of placeholder"):
        load(document)


@pytest.mark.parametrize(
    "path",
    ["__class__", "a.__dict__", "class", "a.in.b", "../weight", "/etc/passwd", "a..b", "a.", "a/b", "a b", "", "forward",  # noqa: E501
     "graph", "state_dict.x", "_parameters", "blocks", "code", f"a{CODE}", "a" * 999],
)  # fmt: skip
def test_unsafe_paths_of_tensors_are_refused(graph: Any, document: Any, path: str) -> None:
    tensors = restored_tensors(graph, document)
    old = next(iter(document["attributes"]))
    document["attributes"][path] = document["attributes"].pop(old)
    for node in document["nodes"]:
        if node.get("target") == old:
            node["target"] = path
    with pytest.raises(ArtifactError, match="attributes"):
        graph_from_json(document, tensors)


def _set(*keys: Any, value: Any) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return edit


def _forward_reference(document: dict[str, Any]) -> None:
    node_of(document, "call_function")["args"][0] = {"node": document["nodes"][-2]["name"]}


def _self_reference(document: dict[str, Any]) -> None:
    node = node_of(document, "call_function")
    node["args"][0] = {"node": node["name"]}


def _deep(document: dict[str, Any]) -> None:
    value: Any = 1
    for _ in range(40):
        value = [value]
    node_of(document, "call_function")["args"][0] = value


def _same_name(document: dict[str, Any]) -> None:
    document["nodes"][1]["name"] = document["nodes"][0]["name"]


def _drop_argument(document: dict[str, Any]) -> None:
    node_of(document, "call_function", "aten.layer_norm.default")["args"] = []


def _keyword(document: dict[str, Any]) -> None:
    node_of(document, "call_function")["kwargs"] = {f"a={CODE}": 1}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_set("schema", value=2), "newer than this qwt-fx reads .*upgrade"),
        (_set("schema", value="1"), "schema '1' is not known"),
        (_set("schema", value=True), "schema True is not known"),
        (_set("more", value=1), "unknown key 'more'"),
        (_set("nodes", value=[]), "wanted a list"),
        (_set("nodes", 0, "more", value=1), "unknown key 'more'"),
        (_set("info", "more", value=1), "unknown key 'more': a newer qwt-fx"),
        (_set("info", "blocks", value={}), "blocks: got .* wanted a list"),
        (_set("info", "blocks", value=[{"name": 1}]), "blocks: got"),
        (_set("info", "unstorable", value="x"), "cannot be stored"),
        (_set("signature", "inputs", value="*"), "a tuple of a tuple and a dict"),
        (_set("signature", "outputs", value={"tuple": ["*"]}), "1 outputs, 2 returned"),
        (_set("signature", "outputs", value={"set": ["*"]}), "malformed"),
        (_set("signature", "outputs", value={"registered": ["torch.Size", []]}), "not registered"),
        (lambda d: d["nodes"].pop(), "exactly one output"),
        (lambda d: d["nodes"].append(dict(d["nodes"][-1], name="o2")), "exactly one output"),
        (_forward_reference, "not an earlier node"),
        (_self_reference, "not an earlier node"),
        (_deep, "nested deeper"),
        (_same_name, "occurs twice"),
        (_drop_argument, "needs input"),
        (_keyword, "not a name"),
        (lambda d: node_of(d, "placeholder").update(args=[1]), "unknown key 'args'"),
        (lambda d: node_of(d, "call_function").update(layer="a\nb"), "layer"),
        (lambda d: d["attributes"].popitem(), "which is not stored|used by nothing"),
        (lambda d: d["tensors"].popitem(), "is not stored"),
        (_set("tensors", "x", value={"dtype": "float32", "shape": []}), "x is used by nothing"),
    ],
)
def test_malformed_documents_are_refused(document: Any, load: Any, edit: Edit, reason: str) -> None:
    edit(document)
    with pytest.raises(ArtifactError, match=reason):
        load(document)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "complex64", "shape": [2]},
        {"dtype": "object", "shape": [2]},
        {"dtype": ["uint8"], "shape": [2]},
        {"dtype": "float32", "shape": [-1]},
        {"dtype": "float32", "shape": [2**50, 2**50]},
        {"dtype": "float32", "shape": [True]},
        {"dtype": "float32", "shape": [2], "bits": 4},
        {"dtype": "uint8", "shape": [2], "bits": 8},
        {"dtype": "uint8", "shape": [2], "bits": None},
        {"dtype": "uint8", "shape": [2, 2], "stride": [0, 0]},
        {"dtype": "uint8", "shape": [2, 2], "stride": [1, 3]},
        {"dtype": "uint8", "shape": [2, 2], "stride": [1]},
    ],
)
def test_malformed_tensor_entries_are_refused(document: Any, load: Any, entry: Any) -> None:
    name = next(iter(document["tensors"]))
    document["tensors"][name] = entry
    with pytest.raises(ArtifactError, match="tensors: "):
        load(document)


def test_a_tensor_that_is_not_as_recorded_is_refused(graph: Any, document: Any) -> None:
    tensors = restored_tensors(graph, document)
    name = next(iter(tensors))
    for wrong in (tensors[name].double(), tensors[name][..., None]):
        with pytest.raises(ArtifactError, match="not as recorded"):
            graph_from_json(document, tensors | {name: wrong})
    del tensors[name]
    with pytest.raises(ArtifactError, match="is missing"):
        graph_from_json(document, tensors)


# -- the list ------------------------------------------------------------------------------------


def test_every_listed_operator_is_functional_and_deterministic() -> None:
    may_draw = {"aten.scaled_dot_product_attention.default"}  # only with dropout_p > 0
    for name, target in OPERATORS.items():
        schema = getattr(target, "_schema", None)
        if schema is None:
            continue
        assert not schema.is_mutable, name
        assert not any(a.alias_info and a.alias_info.is_write for a in schema.arguments), name
        assert torch.Tag.nondeterministic_seeded not in target.tags or name in may_draw, name
        assert not name.split(".")[1].endswith("_"), name
        assert "empty" not in name and "file" not in name


LOWERED = {"int8_linear", "matmul_integer"}


def test_the_list_covers_every_operator_of_ours_that_has_codes() -> None:
    import qwt_fx.quant.operators  # noqa: F401 - registers them

    registered = {
        n.removeprefix("qwt_fx::")
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("qwt_fx::")
    }
    listed = {n.split(".")[1] for n in OPERATORS if n.startswith("qwt_fx.")}
    # Products of the backends stand in lowered graphs only, which are not stored.
    assert listed == {n for n in registered - LOWERED if not n.startswith("fake_quantize")}


# -- fuzz ----------------------------------------------------------------------------------------


def _assert_only_what_is_listed(gm: GraphModule, tensors: dict[str, Tensor], seed: int) -> None:
    stored = {tensor.data_ptr() for tensor in tensors.values()}
    for node in gm.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output"), seed
        assert node.op != "call_function" or node.target in OPERATORS.values(), seed
    for name, tensor in itertools.chain(gm.named_parameters(), gm.named_buffers()):
        assert tensor.data_ptr() in stored, f"{seed}: {name}"
    records = vars(graph_info(gm))
    assert records.keys() == vars(GraphInfo()).keys(), seed
    json.dumps(dataclasses.asdict(graph_info(gm)))  # plain values, no objects


def _fuzz(graph: GraphModule, cases: range) -> int:
    document = graph_to_json(graph)
    tensors: dict[str, Tensor] = restored_tensors(graph, document)
    os.environ.pop("QWT_FX_RAN", None)
    loaded = 0
    for seed in cases:
        mutated = mutate(document, random.Random(seed))
        try:
            gm = graph_from_json(mutated, tensors)
        except QwtError as error:
            assert str(error).isascii() and "\n" not in str(error), seed
            continue
        # What loads is a graph of listed operators over the stored tensors, whatever it computes.
        loaded += 1
        _assert_only_what_is_listed(gm, tensors, seed)
        assert "import" not in gm.code and "environ" not in gm.code, seed
        gm.graph.lint()
    assert "QWT_FX_RAN" not in os.environ
    return loaded


def test_mutated_documents_never_load_as_anything_else(graph: GraphModule) -> None:
    assert _fuzz(graph, range(300)) < 150


@pytest.mark.slow
def test_mutated_documents_never_load_as_anything_else_2000(graph: GraphModule) -> None:
    assert _fuzz(graph, range(1000, 3000)) < 1000
