"""What the lowerings share: weights as signed matrices, layers as rows, why not, the audit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends.lowering import (
    LAYERS,
    LayerRewriter,
    audit_graph,
    check_converted,
    float_reason,
    integer_layers,
    signed_matrix,
    why_no_row_product,
)
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.nodes import compute_nodes
from qwt_fx.quant.integer_layers import IntegerWeight

aten = torch.ops.aten


def quantized(model: nn.Module, x: Tensor) -> GraphModule:
    return qwt_fx.quantize(model.eval(), (x,), [(x,)], QuantConfig(recipe="repq-vit"))


class Convolution(nn.Module):
    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, **({"kernel_size": (4, 2)} | fields))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def images() -> Tensor:
    return torch.randn(2, 3, 11, 9, generator=torch.Generator().manual_seed(0))


def weight(zero_points: list[int], bits: int = 8) -> IntegerWeight:
    codes = torch.arange(2**bits).to(torch.uint8).repeat(len(zero_points), 1)
    return IntegerWeight(codes, torch.ones(len(zero_points)), torch.tensor(zero_points), bits)


@pytest.mark.parametrize(("zero_points", "corrected"), [([128, 128], False), ([128, 3, 255], True)])
def test_a_signed_matrix_is_the_weight(zero_points: list[int], corrected: bool) -> None:
    given = weight(zero_points)
    matrix, shift = signed_matrix(given)
    assert matrix.dtype is torch.int8
    assert (shift is not None) is corrected
    got = matrix.long() - (0 if shift is None else shift.long()[:, None])
    assert torch.equal(got, given.codes.long() - given.zero_point.long()[:, None])


def test_few_bits_need_no_correction_and_a_convolution_is_a_matrix() -> None:
    matrix, shift = signed_matrix(weight([0, 15, 7], bits=4))
    assert shift is None
    assert matrix.shape == (3, 16)
    four = weight([0, 15], bits=4)
    kernel = IntegerWeight(four.codes.reshape(2, 4, 2, 2), four.scale, four.zero_point, 4)
    assert torch.equal(signed_matrix(kernel)[0], matrix[:2])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stride": (4, 2)}, None),
        ({"stride": (4, 2), "padding": "valid"}, None),
        ({"stride": 2}, "windows overlap"),
        ({"stride": (4, 2), "padding": (0, 1)}, "windows overlap"),
        ({"kernel_size": 3, "padding": "same"}, "windows overlap"),
        ({"stride": (4, 2), "dilation": 2}, "windows overlap"),
    ],
)
def test_windows_side_by_side_are_rows(fields: dict[str, object], reason: str | None) -> None:
    q = quantized(Convolution(**fields), images())
    layers = integer_layers(q, why_no_row_product)
    (node,) = compute_nodes(q)
    assert [layer.node for layer in layers] == ([node] if reason is None else [])
    assert float_reason(node) is None if reason is None else reason in str(float_reason(node))


def test_rows_times_the_matrix_are_the_convolution() -> None:
    """In integers, with rows and columns at the edges that no window covers."""
    q = quantized(Convolution(stride=(4, 2)), images())
    (layer,) = integer_layers(q, why_no_row_product)
    codes = torch.randint(0, 256, (2, 3, 11, 9), generator=torch.Generator().manual_seed(1))
    matrix = torch.randint(-128, 128, (5, 24), generator=torch.Generator().manual_seed(2))
    expected = nn.functional.conv2d(
        codes.double(), matrix.reshape(5, 3, 4, 2).double(), stride=(4, 2)
    )
    rewriter = LayerRewriter(GraphModule(nn.Module(), torch.fx.Graph()))
    graph = rewriter.gm.graph
    x, w = graph.placeholder("x"), graph.placeholder("w")
    product = rewriter.call(aten.linear.default, rewriter.rows(layer, x), w)
    graph.output(rewriter.result(layer, product))
    rewriter.gm.recompile()
    assert torch.equal(rewriter.gm(codes.double(), matrix.double()), expected)


def test_readers_of_one_moved_value_share_its_codes() -> None:
    """q, k and v behind transposes of their own, between the dequantized value and the product."""
    q = quantized(randomize(Tower(1)), tokens(4, 9))
    for layer in integer_layers(q, why_no_row_product)[:3]:
        with q.graph.inserting_before(layer.node):
            arguments = (layer.node.args[0], 0, 1)
            moved = q.graph.call_function(aten.transpose.int, arguments)
        layer.node.args = (moved, *layer.node.args[1:])
    layers = integer_layers(q, why_no_row_product)[:4]
    assert [len(layer.input.moved_by) for layer in layers] == [1, 1, 1, 0]
    codes, rewriter = layers[0].input.codes, LayerRewriter(q)
    rows = []
    for layer in layers:
        with q.graph.inserting_before(layer.node):
            rows.append(rewriter.rows(layer, codes))
    assert rows[0] is rows[1] is rows[2]
    assert (rows[0].target, rows[0].args) == (aten.transpose.int, (codes, 0, 1))
    assert rows[3] is codes


def test_the_audit_names_layers_of_a_product_and_why_others_float() -> None:
    q = quantized(randomize(Tower(1)), tokens())
    integer, other, *_ = integer_layers(q, lambda layer: "no" if "fc" in layer.name else None)
    integer.node.meta[LAYERS] = ["one", "two"]
    integer.node.target = aten.mm.default
    kernels = audit_graph(q, {aten.mm.default}, lambda node: f"kernel of {node.name}", "toy")
    assert [(k.name, k.kernel) for k in kernels if k.integer] == [
        (name, f"kernel of {integer.node.name}") for name in ("one", "two")
    ]
    reasons = {k.name: k.reason for k in kernels if not k.integer}
    assert reasons["blocks.0.fc1"] == reasons["blocks.0.fc2"] == "no"
    assert reasons[other.name] == "the graph was not lowered by the toy backend"


def test_graphs_that_are_not_converted_are_refused_by_what_was_asked() -> None:
    x = tokens()
    prepared = qwt_fx.prepare(qwt_fx.capture(randomize(Tower(1)), (x,)), QuantConfig())
    with pytest.raises(PreconditionError, match="not converted"):
        check_converted(prepared, "lower")
    published = QuantConfig(recipe="repq-vit", compat="original")
    q = qwt_fx.quantize(randomize(Tower(1)), (x,), [(x,)], published)
    for verb in ("lower", "export"):
        with pytest.raises(PreconditionError, match=f"cannot {verb}: "):
            check_converted(q, verb)
