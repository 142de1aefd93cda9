"""Small captured and hand-converted graphs, artifacts of them, and ways to damage both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwt_fx.artifact.artifact_index import file_entry
from qwt_fx.artifact.graph_document import parse_document
from qwt_fx.artifact.graph_tensors import file_tensors, restore
from qwt_fx.artifact.json_values import digest, dumps
from qwt_fx.capture.capture import capture
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.graph_info import GraphInfo, graph_info
from qwt_fx.graph.nodes import tensor_of
from qwt_fx.quant import torch_ao


class Tiny(nn.Module):
    """(n, 5, 8) -> {"out": (n, 5, 8), "pooled": (n, 8)}: a tied weight, a buffer, an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.blocks[1].weight = self.blocks[0].weight
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, 8, bias=False)
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).triu(1))
        self.register_buffer("hidden", torch.randn(8, 5).t(), persistent=False)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.blocks[1](torch.nn.functional.gelu(self.blocks[0](x), approximate="tanh"))
        y = self.ln(y) * scale + self.hidden
        scores = (y @ y.transpose(1, 2)).masked_fill(self.mask, float("-inf"))
        y = torch.softmax(scores, -1, dtype=torch.float32) @ y
        return {"out": self.head(y), "pooled": y.reshape(x.shape[0], 40)[:, :8]}


def inputs(batch: int = 3) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, 8, generator=generator)
    return (x,), {"scale": torch.rand(batch, 1, 1, generator=generator)}


def captured() -> GraphModule:
    torch.manual_seed(0)
    args, kwargs = inputs()
    gm = capture(Tiny(), args, kwargs)
    # Export reads tied parameters under one name; other sources keep both.
    first = next(n for n in gm.graph.nodes if n.target is LINEAR)
    read = str(first.args[1].target)
    other = read.replace(".0.", ".2.").replace(".1.", ".0.").replace(".2.", ".1.")
    module = gm.get_submodule(other.rpartition(".")[0])
    module.weight = gm.get_parameter(read)
    with gm.graph.inserting_before(first):
        first.update_arg(1, gm.graph.get_attr(other))
    gm.recompile()
    return gm


def converted(bits: int = 4, *, tied: bool = True) -> GraphModule:
    """`captured` with integer weights and one activation behind q/dq, converted by hand."""
    gm = captured()
    codes_nodes: dict[Tensor, Tensor] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not LINEAR:
            continue
        weight = tensor_of(gm, node.args[1])
        assert weight is not None
        with gm.graph.inserting_before(node):
            scale = weight.abs().amax(1).detach() / (2 ** (bits - 1) - 1)
            zero = torch.full((8,), 2 ** (bits - 1), dtype=torch.int64)
            limits = (0, 2**bits - 1, torch.uint8)
            codes = torch_ao.QUANTIZE_PER_CHANNEL(weight.detach(), scale, zero, 0, *limits)
            codes = codes_nodes.setdefault(weight, codes) if tied else codes
            name = str(node.args[1].target)
            read = [add_tensor(gm, f"{name}_{k}", v) for k, v in
                    (("codes", codes), ("scale", scale), ("zero_point", zero))]  # fmt: skip
            weight_node = gm.graph.call_function(
                torch_ao.DEQUANTIZE_PER_CHANNEL, (*read, 0, *limits)
            )
            qparams = (0.1 + 0.2, 7, 0, 255, torch.uint8)
            x = gm.graph.call_function(torch_ao.QUANTIZE_PER_TENSOR, (node.args[0], *qparams))
            x = gm.graph.call_function(torch_ao.DEQUANTIZE_PER_TENSOR, (x, *qparams))
        node.args = (x, weight_node, *node.args[2:])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    info = graph_info(gm)
    info.compensations["blocks.0"] = {"r2": float("nan"), "scale": 0.1 + 0.2, "applied": True}
    info.config.update({"w_bits": bits})
    return gm


def outputs(gm: GraphModule, batch: int = 3) -> dict[str, Tensor]:
    args, kwargs = inputs(batch)
    with torch.no_grad():
        result: dict[str, Tensor] = gm(*args, **kwargs)
    return result


def assert_same(one: GraphModule, other: GraphModule, batch: int = 3) -> None:
    """Bit-identical results, structure included."""
    left, right = outputs(one, batch), outputs(other, batch)
    assert type(left) is type(right) and list(left) == list(right)
    for key in left:
        assert left[key].dtype is right[key].dtype and left[key].stride() == right[key].stride()
        assert torch.equal(left[key], right[key])


def restored_tensors(gm: GraphModule, document: dict[str, Any]) -> dict[str, Tensor]:
    """The graph's tensors as a load would find them."""
    stored = parse_document(document).tensors
    return {k: restore(stored[k], v, k) for k, v in file_tensors(gm, stored).items()}


def records(gm: GraphModule) -> GraphInfo:
    return graph_info(gm)


# -- damage ----------------------------------------------------------------------------------

CODE = "__import__('os').environ.__setitem__('QWT_FX_RAN', '1')"
BAD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**200, 1e308, "", "x", "self", "torch", "class", "__class__",
    "__builtins__", "a.b", "../x", "x\n", "x;y", "x'y", CODE, f"x={CODE}", f"x': {CODE}, 'y", "é",
    "\ud800", "a" * 3000, "output", "aten.add.Tensor", "aten.set_.source_Tensor", "os.system",
    "aten.from_file.default", "builtins.eval", "call_module", "float32", "*", [], {}, [[]], [None],
    {"node": "x"}, {"node": CODE}, {"dtype": "float32"}, {"dtype": "torch.float32"},
    {"device": "cuda"}, {"tuple": [1]}, {"$float": "inf"}, {"$float": "1"}, {"slice": [1]},
    {"registered": ["torch.Size", []]}, {"registered": ["builtins.dict", []]},
    {"dict": [[CODE, "*"]]}, {"dict": [[f"x': {CODE}, 'y", "*"]]}, {"tuple": ["*"]},
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found, stack = [], [value]
    while stack:
        current = stack.pop()
        keys = list(current) if isinstance(current, dict) else range(len(current))
        for key in keys:
            found.append((current, key))
            if isinstance(current[key], dict | list):
                stack.append(current[key])
    return found


def mutate(document: Any, choose: random.Random) -> Any:
    """A copy of a JSON document with one to three random changes."""
    document = json.loads(json.dumps(document))
    for _ in range(choose.randint(1, 3)):
        places = _places(document)
        if not places:
            break
        container, key = choose.choice(places)
        other, other_key = choose.choice(places)
        action = choose.randrange(6)
        value = json.loads(json.dumps(choose.choice(BAD_VALUES)))
        if action == 0:
            del container[key]
        elif action == 1:  # move a value of the document to a wrong place
            container[key] = json.loads(json.dumps(other[other_key]))
        elif action == 2 and isinstance(container, dict):
            container[str(choose.choice(BAD_VALUES))] = container.pop(key)
        elif action == 3 and isinstance(container, list):
            container.insert(key, value)
        elif action == 4 and isinstance(container[key], int):
            container[key] = container[key] + choose.choice((-1, 1))
        else:
            container[key] = value
    return document


def reseal(directory: Path) -> None:
    """Make the index fit the files again: what an attacker would do."""
    path = directory / "artifact.json"
    index = json.loads(path.read_text())
    for name in index["files"]:
        if (directory / name).is_file():
            index["files"][name] = file_entry(directory / name)
    seal(directory, index)


def seal(directory: Path, index: dict[str, Any]) -> None:
    """Write an index with a digest that fits."""
    index.pop("sha256", None)
    (directory / "artifact.json").write_bytes(dumps(index | {"sha256": digest(index)}))
