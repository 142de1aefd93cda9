"""Quantizers that find the range of each token when they run: numerics, calibration, sharing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.errors import ConfigError, DataError, NotCalibratedError
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.numerics.qparams import LOG_SQRT2, QuantSpec, token_qparams
from qwt_fx.passes import FoldChannelWise, InsertObservers, ReparameterizeLayerNorm
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_nodes, fake_quant_of
from qwt_fx.quant.quantizers import quantizer_at

BITS = (8, 6, 4, 2)
SHAPES: dict[str, tuple[int, ...]] = {
    "2-d": (7, 33),
    "3-d": (3, 7, 33),
    "batch second, not contiguous": (7, 3, 33),
}


def values(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.randn(SHAPES[name], generator=generator)
        * torch.rand((*SHAPES[name][:-1], 1), generator=generator).mul(8).exp2()
    )
    return x.transpose(0, 1) if "second" in name else x


def exact(x: Tensor, bits: int) -> Tensor:
    """The definition, row by row, in float64."""
    rows = x.double().reshape(-1, x.shape[-1])
    result = torch.empty_like(rows)
    for row, out in zip(rows, result, strict=True):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        scale = (high - low) / (2**bits - 1) or 1.0
        zero = round(-low / scale)
        out.copy_(((row / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale))
    return result.reshape(x.shape)


def quantizer(bits: int) -> FakeQuant:
    return FakeQuant(QuantSpec(bits, dynamic=True), "x")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_is_quantized_by_its_own_extremes(shape: str, bits: int) -> None:
    x = values(shape)
    got, wanted = quantizer(bits).fake_quantize(x), exact(x, bits)
    steps = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / (2**bits - 1)
    off = (got.double() - wanted).abs() / steps[..., None]
    assert float((off > 1e-4).double().mean()) <= 0.005  # halves of a step may round to either side
    assert float(off.max()) < 1.001


@pytest.mark.parametrize("bits", BITS)
def test_a_part_of_the_rows_is_quantized_as_in_the_whole(bits: int) -> None:
    x, keep = values("3-d"), torch.tensor([1, 4])
    whole = quantizer(bits).fake_quantize(x)
    assert torch.equal(quantizer(bits).fake_quantize(x[:, keep]), whole[:, keep])
    assert torch.equal(quantizer(bits).fake_quantize(x[2]), whole[2])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_without_width_are_kept(bits: int, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0] * 5, [3.25] * 5, [-7.0] * 5, [1e-42] * 5]).to(dtype)
    got = quantizer(bits).fake_quantize(x)
    assert got.dtype is dtype
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-40)
    assert torch.equal(got[0], x[0])


def test_half_precision_is_quantized_in_float32() -> None:
    x = values("3-d").half()
    torch.testing.assert_close(
        quantizer(6).fake_quantize(x), quantizer(6).fake_quantize(x.float()).half(), rtol=0, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_no_other_changes(bad: float) -> None:
    x = values("2-d")
    good = quantizer(8).fake_quantize(x)
    x[3, 5] = bad
    got = quantizer(8).fake_quantize(x)
    assert not got[3].isfinite().any()
    rest = [i for i in range(len(x)) if i != 3]
    assert torch.equal(got[rest], good[rest])


def test_zero_points_are_codes() -> None:
    for bits in BITS:
        scale, zero = token_qparams(values("3-d"), 2**bits - 1)
        assert scale.shape == zero.shape == (3, 7, 1)
        assert (scale.dtype, zero.dtype) == (torch.float32, torch.int32)
        assert int(zero.min()) >= 0 and int(zero.max()) <= 2**bits - 1


@pytest.mark.parametrize(
    "wrong", [{"scheme": LOG_SQRT2}, {"symmetric": True}, {"include_zero": False},
              {"integer_zero_point": False}],
)  # fmt: skip
def test_a_specification_that_no_row_can_have_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a dynamic quantizer is affine"):
        QuantSpec(8, dynamic=True, **wrong)


def tower(width: int = 16) -> nn.Module:
    return randomize(Tower(2, width)).requires_grad_(False)


def quantized(model: nn.Module, x: Tensor, **fields: Any) -> GraphModule:
    return qwt_fx.quantize(model, (x,), [(x,), (tokens(seed=3),)], QuantConfig(**fields))


@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
def test_prepared_converted_and_loaded_agree(recipe: str, tmp_path: Any) -> None:
    x = tokens()
    graph = qwt_fx.capture(tower(), (x,))
    config = QuantConfig(recipe=recipe, activations="dynamic", overrides={"*.fc2": "w6a5s"})
    prepared = qwt_fx.calibrate(qwt_fx.prepare(graph, config), [(x,)])
    q = qwt_fx.convert(prepared)
    qwt_fx.save(q, tmp_path / "artifact")
    loaded = qwt_fx.load(tmp_path / "artifact")
    for batch in (x, tokens(1, seed=7)):
        assert torch.equal(prepared(batch), q(batch))
        assert torch.equal(loaded(batch), q(batch))
    assert qwt_fx.report(loaded)["activations"] == "dynamic"
    for gm in (prepared, q, loaded):
        kinds = {layer_name(n): quantizer_at(gm, n.args[0]) for n in weight_layers(gm)}
        assert {name for name, kind in kinds.items() if kind and not kind.dynamic} == {
            "blocks.0.fc2", "blocks.1.fc2"
        }  # fmt: skip
        assert sorted(qwt_fx.qparams(gm)["blocks.0.fc1"]) == ["weight"]
        assert sorted(qwt_fx.qparams(gm)["blocks.0.fc2"]) == ["input", "weight"]
    rows = {row["name"]: row for row in qwt_fx.report(q)["layers"]}
    assert rows["blocks.1.fc1"]["activations"] == "dynamic"
    assert rows["blocks.1.fc2"]["activations"] == "static"
    assert rows["blocks.1.fc1"]["a_bits"] == 8


@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_of_different_sizes_lose_less_than_under_one_range(recipe: str, bits: int) -> None:
    x = tokens(8, 5)
    x = x * torch.tensor([1.0, 20.0, 1.0, 5.0, 1.0])[:, None]  # the stream, not behind a norm

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc2(self.fc1(x).relu())
            return y / y.norm(dim=-1, keepdim=True)

    model = randomize(Mlp()).requires_grad_(False)
    got = {
        kind: sqnr_db(model(x), quantized(model, x, recipe=recipe, w_bits=8, a_bits=bits,
                                          activations=kind, token_scales=False)(x))
        for kind in ("static", "dynamic")
    }  # fmt: skip
    assert got["dynamic"] > got["static"] + 3.0


def test_layers_that_read_one_value_share_its_quantizer() -> None:
    graph = qwt_fx.capture(tower(), (tokens(),))
    prepared = qwt_fx.prepare(graph, QuantConfig(activations="dynamic"))
    inputs = [fake_quant_of(prepared, n) for n in fake_quant_nodes(prepared)]
    dynamic = [m.name for m in inputs if m.spec.dynamic]
    assert [name for name in dynamic if name.startswith("blocks.0")] == [
        "blocks.0.q.input", "blocks.0.out.input", "blocks.0.fc1.input", "blocks.0.fc2.input"
    ]  # fmt: skip


def test_convolutions_and_attention_stay_static() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.body = nn.Conv2d(3, 16, 4, 4), Tower(1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(self.conv(x).flatten(2).transpose(1, 2))
            return y

    x = torch.randn(4, 3, 8, 8)
    config = QuantConfig(recipe="repq-vit", activations="dynamic", attention="log2")
    q = qwt_fx.quantize(randomize(Patches()), (x,), [(x,)], config)
    kinds = {row["name"]: row["activations"] for row in qwt_fx.report(q)["layers"]}
    assert kinds["conv"] == "static"
    assert kinds["body.blocks.0.fc1"] == "dynamic"
    products = [name for name in kinds if "matmul" in name]
    assert len(products) == 2
    assert {kinds[name] for name in products} == {"static"}


@pytest.mark.parametrize("value", ["w6a4d", "w6a4:dynamic", "w6a4s", "w6a4:static", "w6a4"])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_overrides_say_dynamic_or_static_or_leave_it(value: str, activations: str) -> None:
    config = QuantConfig(activations=activations, overrides={"*.fc1": value})
    bits = config.bits_for("blocks.0.fc1")
    wanted = activations == "dynamic" if value == "w6a4" else value.endswith(("d", ":dynamic"))
    assert (bits.weight, bits.activation, bits.dynamic) == (6, 4, wanted)
    assert config.bits_for("blocks.0.fc2").dynamic is (activations == "dynamic")
    assert QuantConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activations": "rowwise"}, "activations: got 'rowwise', wanted one of static, dynamic"),
        ({"overrides": {"*": "w8a8x"}}, "override *=w8a8x: wanted wNaM such as w8a8, or skip"),
        (
            {"activations": "dynamic", "recipe": "repq-vit", "compat": "original"},
            "activations='dynamic' with compat='original': the published procedure has static",
        ),
        (
            {"overrides": {"*": "w8a8d"}, "recipe": "repq-vit", "compat": "original"},
            "override *=w8a8d with compat='original': the published procedure has static",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuantConfig(**fields)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
def test_calibration_refuses_what_is_not_finite(recipe: str) -> None:
    model = tower()
    x = tokens()
    x[2, 1, 3] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite values"):
        quantized(model, x, recipe=recipe, activations="dynamic")


def test_passes_alone_fold_a_norm_and_then_each_token_has_a_range() -> None:
    x, config = tokens(), QuantConfig(activations="dynamic")
    gm = qwt_fx.capture(tower(), (x,))
    float_output = gm(x)
    InsertObservers(config)(gm)
    observe(gm, [x])
    with pytest.raises(
        NotCalibratedError, match=r"blocks\.0\.q\.input is dynamic .* FoldChannelWise"
    ):
        qwt_fx.convert(gm)
    assert ReparameterizeLayerNorm()(gm).modified
    changes = {change.node: change.what for change in FoldChannelWise()(gm).changes}
    assert changes["blocks.0.q.input"] == "a range of each token"
    assert not FoldChannelWise()(gm).modified
    q = qwt_fx.convert(gm)
    assert torch.equal(q(x), gm(x))
    assert sqnr_db(float_output, q(x)) > 30.0
