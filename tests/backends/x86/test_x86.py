"""The x86 backend against the q/dq graph: layers of odd sizes, fused operators, whole towers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from small_clip import small_config, small_model
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends.compiled import compile_graph
from qwt_fx.backends.x86 import saturation
from qwt_fx.backends.x86.saturation import QLINEAR
from qwt_fx.clip.towers import TextTower
from qwt_fx.errors import ConfigError, PreconditionError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import is_call
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.quant.integer_layers import IntegerLayer, layers_to_lower

BITS = [(8, 8), (6, 6), (4, 4)]
RECIPES = ["best", "repq-vit"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
}


class Mlp(nn.Module):
    """Norm, linear, activation, linear, of the sizes given."""

    def __init__(self, inner: int, middle: int, outer: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inner)
        self.fc1 = nn.Linear(inner, middle, bias=bias)
        self.fc2 = nn.Linear(middle, outer, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(self.norm(x))))


def quantized(model: nn.Module, x: Tensor, **fields: object) -> GraphModule:
    return qwt_fx.quantize(model, (x,), [x], QuantConfig(**fields))  # type: ignore[arg-type]


@torch.no_grad()
def parity(q: GraphModule, lowered: GraphModule, *inputs: Tensor) -> float:
    """The least SQNR in dB over random and saturating inputs."""
    scaled = [x * factor for x in inputs for factor in (1.0, 30.0)]
    return min(sqnr_db(q(x), lowered(x)) for x in scaled)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def texts(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 49000, (batch, 12), generator=generator)
    ids[:, -3], ids[:, -2:] = 49407, 0
    return ids


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_fused_operator_of_odd_sizes_equals_eager(
    activation: str, bits: tuple[int, int], recipe: str
) -> None:
    x = tokens(width=13)
    model = randomize(Mlp(13, 27, 5, activation, bias=True))
    # input_scales multiplies between activation and quantizer, where nothing is fused.
    q = quantized(model, x, recipe=recipe, w_bits=bits[0], a_bits=bits[1], input_scales=False)
    lowered = qwt_fx.lower(q, "x86")
    kernels = {k.name: k for k in qwt_fx.kernel_audit(lowered)}
    assert all(k.integer for k in kernels.values())
    if bits[0] < 8 or (not saturation.saturates() and recipe == "best"):
        assert kernels["fc1"].kernel.endswith(f"{activation} + quantize")
    assert parity(q, lowered, x, tokens(1, 5, 13, seed=5), tokens(7, 5, 13, seed=6)) >= 40


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("a_bits", [8, 6])
def test_a_fused_operator_writes_the_codes_that_eager_quantizes(
    activation: str, a_bits: int
) -> None:
    x = tokens(8, 7, 24)
    model = randomize(Mlp(24, 48, 8, activation, bias=True))
    q = quantized(model, x, w_bits=6, a_bits=a_bits, input_scales=False)
    (second,) = (
        la for la in layers_to_lower(q) if isinstance(la, IntegerLayer) and la.name == "fc2"
    )
    lowered = qwt_fx.lower(q, "x86")
    first, last = (n for n in lowered.graph.nodes if is_call(n, {QLINEAR}))

    def values(gm: GraphModule, node: torch.fx.Node, batch: Tensor) -> Tensor:
        cut = GraphModule(gm, copy.deepcopy(gm.graph))
        (end,) = cut.graph.find_nodes(op="output")
        end.args = ((next(n for n in cut.graph.nodes if n.name == node.name),),)
        cut.graph.eliminate_dead_code()
        cut.recompile()
        result = cut(batch)
        return result[0] if isinstance(result, tuple) else result

    with torch.no_grad():
        for batch in (x, 40 * x):
            expected = values(q, second.input.codes, batch).int()
            got = values(lowered, last.args[0], batch).int()
            assert int(expected.max()) <= 2**a_bits - 1
            # Equal but where the float value lies on the border between two codes.
            difference = (expected - got).abs()
            assert int(difference.max()) <= 1
            assert float(difference.float().mean()) < 1e-3
    assert first.args[9] is torch.uint8


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_whole_towers_keep_parity(quick_gelu: bool, bits: tuple[int, int], recipe: str) -> None:
    model = small_model(small_config(quick_gelu=quick_gelu))
    fields = {"recipe": recipe, "w_bits": bits[0], "a_bits": bits[1], "compensation": "qwt"}
    q = quantized(model.visual, images(), **fields)
    lowered = qwt_fx.lower(q, "x86")
    assert parity(q, lowered, images(), images(1), images(9)) >= 40
    # 2 blocks of 4 linears, and the patch embedding
    assert sum(k.integer for k in qwt_fx.kernel_audit(lowered)) == 9
    assert graph_info(lowered).blocks == graph_info(q).blocks

    text = quantized(TextTower(model), texts(), **fields)
    lowered = qwt_fx.lower(text, "x86")
    with torch.no_grad():
        for ids in (texts(), texts(1)):
            assert sqnr_db(text(ids), lowered(ids)) >= 40


def test_int8_compensation_runs_in_integers() -> None:
    fields = {"w_bits": 4, "a_bits": 4, "compensation": "int8", "hold_out": 0.0}
    q = quantized(small_model().visual, images(24), **fields)
    assert qwt_fx.compensations(q)
    lowered = qwt_fx.lower(q, "x86")
    found = [k for k in qwt_fx.kernel_audit(lowered) if ".compensation" in k.name]
    assert found and all(k.integer for k in found)
    assert parity(q, lowered, images(16)) >= 40


def test_layers_that_read_one_value_alike_read_the_same_codes() -> None:
    q = quantized(randomize(Tower(1)), tokens(), recipe="best")  # q, k and v read one norm
    lowered = qwt_fx.lower(q, "x86")
    codes = {
        n.meta["layer"]: n.args[0]
        for n in lowered.graph.nodes
        if n.meta.get("layer") in ("blocks.0.q", "blocks.0.k", "blocks.0.v")
    }
    assert len(codes) == 3 and len(set(codes.values())) == 1
    assert parity(q, lowered, tokens()) >= 40


@pytest.mark.parametrize("recipe", RECIPES)
def test_positions_with_scales_of_their_own(recipe: str) -> None:
    """A token scale divides before the quantizer and multiplies the product instead of the codes."""
    x = tokens(4, 5)
    x[:, 0] *= 40.0
    q = quantized(randomize(Mlp(16, 20, 7, "gelu", bias=True)), x, recipe=recipe)
    scales = torch.tensor([40.0, 1.0, 0.5, 2.0, 1.0]).reshape(5, 1)
    q.register_buffer("inverse", 1 / scales)
    q.register_buffer("factor", scales)
    (layer,) = (la for la in layers_to_lower(q) if la.name == "fc1")
    assert isinstance(layer, IntegerLayer)
    codes, value = layer.input.codes, layer.node.args[0]
    multiply = torch.ops.aten.mul.Tensor
    with q.graph.inserting_before(codes):
        inverse = q.graph.get_attr("inverse")
        divided = q.graph.call_function(multiply, (codes.args[0], inverse))
        factor = q.graph.get_attr("factor")
    codes.replace_input_with(codes.args[0], divided)
    divided.args = (layer.input.source, inverse)
    with q.graph.inserting_before(layer.node):
        multiplied = q.graph.call_function(multiply, (value, factor))
    layer.node.replace_input_with(value, multiplied)
    q.graph.lint()
    q.recompile()
    lowered = qwt_fx.lower(q, "x86")
    assert next(k for k in qwt_fx.kernel_audit(lowered) if k.name == "fc1").integer
    assert parity(q, lowered, x) >= 40


def test_a_half_precision_tower_is_lowered_and_keeps_its_type() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = tokens(4, 5)
        model = randomize(Mlp(16, 20, 7, "gelu", bias=True)).to(dtype)
        q = quantized(model, x.to(dtype), w_bits=6, a_bits=8, compensation="none")
        lowered = qwt_fx.lower(q, "x86")
        assert all(k.integer for k in qwt_fx.kernel_audit(lowered))
        with torch.no_grad():
            expected, got = q(x.to(dtype)), lowered(x.to(dtype))
        assert got.dtype is dtype
        assert sqnr_db(expected.float(), got.float()) >= 25  # bfloat16 rounds in between


def test_the_audit_lists_what_stays_in_floating_point_and_why() -> None:
    config = {"overrides": {"*.0.mlp.c_fc": "skip", "*.1.mlp.c_fc": "w8a16"}}
    q = quantized(small_model().visual, images(), **config)
    lowered = qwt_fx.lower(q, "x86")
    kernels = {k.name: k for k in qwt_fx.kernel_audit(lowered)}
    block = "transformer.resblocks"
    assert not kernels[f"{block}.0.mlp.c_fc"].integer
    assert str(kernels[f"{block}.0.mlp.c_fc"].reason) == "it is not quantized"
    assert "input is not quantized" in str(kernels[f"{block}.1.mlp.c_fc"].reason)
    assert "product of activations" in str(kernels[f"{block}.0.attn"].reason)
    assert kernels[f"{block}.0.mlp.c_proj"].integer and kernels["conv1"].integer
    assert parity(q, lowered, images()) >= 40
    # What the audit calls an integer layer has no float twin left in the graph.
    floating = {
        n.meta.get("layer")
        for n in lowered.graph.nodes
        if is_call(n, {torch.ops.aten.linear.default})
    }
    assert not floating & {name for name, k in kernels.items() if k.integer}
    # An eager graph claims nothing.
    assert not any(k.integer for k in qwt_fx.kernel_audit(qwt_fx.lower(q)))


class Convolution(nn.Module):
    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, **fields)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_patch_embedding_is_a_matmul_and_cuts_what_is_left_at_the_edge(recipe: str) -> None:
    x = torch.randn(3, 3, 14, 9, generator=torch.Generator().manual_seed(0))
    q = quantized(Convolution(stride=4), x, recipe=recipe)
    lowered = qwt_fx.lower(q, "x86")
    assert [k.integer for k in qwt_fx.kernel_audit(lowered)] == [True]
    assert parity(q, lowered, x) >= 40


@pytest.mark.parametrize("fields", [{"stride": 2}, {"stride": 4, "padding": 1}])
def test_another_convolution_stays_as_it_is(fields: dict[str, object]) -> None:
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    q = quantized(Convolution(**fields), x)
    lowered = qwt_fx.lower(q, "x86")
    (kernel,) = qwt_fx.kernel_audit(lowered)
    assert not kernel.integer and "windows overlap" in str(kernel.reason)
    with torch.no_grad():
        torch.testing.assert_close(q(x), lowered(x))


@pytest.mark.parametrize("pretend", [True, False])
def test_eight_bits_take_two_products_only_where_the_cpu_saturates(
    pretend: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saturation, "saturates", lambda: pretend)
    x = tokens(width=32)
    q = quantized(randomize(Mlp(32, 40, 8, "gelu", bias=True)), x, recipe="best")
    kernels = qwt_fx.kernel_audit(lowered := qwt_fx.lower(q, "x86"))
    assert all(("2 exact products" in k.kernel) is pretend for k in kernels)
    if pretend:
        assert parity(q, lowered, x) >= 40


def test_a_lowered_graph_copies_saves_its_state_and_is_not_lowered_again() -> None:
    x = tokens()
    q = quantized(randomize(Tower(1)), x)
    lowered = qwt_fx.lower(q, "x86")
    with torch.no_grad():
        expected = lowered(x)
        torch.testing.assert_close(copy.deepcopy(lowered)(x), expected, rtol=0, atol=0)
    assert any(t.dtype is torch.int8 for t in lowered.state_dict().values())
    with pytest.raises(PreconditionError, match="not converted"):
        qwt_fx.lower(lowered, "x86")
    with pytest.raises(PreconditionError, match="was not lowered"):
        qwt_fx.kernel_audit(q)
    with pytest.raises(ConfigError, match="got option 'speed'"):
        qwt_fx.lower(q, "x86", speed=1)


def test_a_model_with_non_integer_zero_points_is_refused() -> None:
    q = quantized(small_model().visual, images(), recipe="repq-vit", compat="original")
    with pytest.raises(PreconditionError, match="cannot lower"):
        qwt_fx.lower(q, "x86")


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"w_bits": 6, "a_bits": 6}, {"recipe": "repq-vit"}])
def test_a_compiled_graph_keeps_parity(fields: dict[str, object]) -> None:
    x = tokens(width=13)
    q = quantized(randomize(Mlp(13, 27, 5, "quick_gelu", bias=True)), x, **fields)
    compiled = compile_graph(qwt_fx.lower(q, "x86"))
    with torch.no_grad():
        for batch in (x, 30 * x, tokens(1, 5, 13, seed=8)):
            assert sqnr_db(q(batch), compiled(batch)) >= 40
