"""What backends lower is found in converted graphs, and the identity they rely on holds."""

from __future__ import annotations

import pytest
import torch
from small_clip import small_model

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.runner import execute
from qwt_fx.measure.kernel_audit import LayerKernel, refuse_if_float
from qwt_fx.quant.integer_layers import FloatLayer, IntegerLayer, layers_to_lower


def _quantized(**fields: object) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(3)
    batch = torch.randn(4, 3, 16, 24)
    config = QuantConfig(**fields)  # type: ignore[arg-type]
    return qwt_fx.quantize(small_model().visual, (batch,), [(batch,)], config), batch


@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_layer_of_a_tower_is_found_and_equals_its_integer_product(
    recipe: str, bits: int
) -> None:
    q, batch = _quantized(recipe=recipe, w_bits=bits, a_bits=bits)
    q.requires_grad_(False)
    env: dict[torch.fx.Node, object] = {}
    for node in q.graph.nodes:
        if node.op == "placeholder":
            env[node] = batch
        elif node.op != "output":
            env[node] = execute(q, node, env)
    layers = [la for la in layers_to_lower(q) if isinstance(la, IntegerLayer)]
    assert {la.name.rsplit(".", 1)[-1] for la in layers} == {
        "conv1", "in_proj", "out_proj", "c_fc", "c_proj"
    }  # fmt: skip
    for layer in (la for la in layers if not la.name.endswith("conv1")):
        codes = env[layer.input.codes]
        for node in layer.input.moved_by:
            codes = node.target(codes, *[env.get(a, a) for a in node.args[1:]])  # type: ignore
        weight = layer.weight
        difference = weight.codes.double() - weight.zero_point.double()[:, None]
        product = (codes.double() - layer.input.zero_point) @ difference.T
        expected = layer.input.scale * weight.scale.double() * product
        if layer.bias is not None:
            expected = expected + env[layer.bias]
        if layer.input.token_scale is None:
            torch.testing.assert_close(
                env[layer.node],
                expected.float(),
                rtol=1e-4,
                atol=1e-4 * float(expected.abs().max()),
            )


def test_symmetric_weights_fit_int8_and_asymmetric_ones_say_that_they_do_not() -> None:
    best, _ = _quantized(recipe="best")
    published, _ = _quantized(recipe="repq-vit")
    signed = [la.weight.signed() for la in layers_to_lower(best) if isinstance(la, IntegerLayer)]
    assert all(s is not None and s.dtype is torch.int8 for s in signed)
    others = [
        la.weight.signed() for la in layers_to_lower(published) if isinstance(la, IntegerLayer)
    ]
    assert any(s is None for s in others)


def test_products_left_in_floating_point_have_a_reason() -> None:
    q, _ = _quantized(recipe="best", overrides={"*.0.mlp.c_fc": "skip", "*.1.mlp.c_fc": "w8a16"})
    reasons = {la.name: la.reason for la in layers_to_lower(q) if isinstance(la, FloatLayer)}
    assert reasons["transformer.resblocks.0.mlp.c_fc"] == "it is not quantized"
    assert "input is not quantized" in reasons["transformer.resblocks.1.mlp.c_fc"]
    assert reasons["proj"] == "its parameter is not quantized"
    assert "product of activations" in reasons["transformer.resblocks.0.attn"]


def test_a_model_without_integer_kernels_is_not_called_one() -> None:
    refuse_if_float([LayerKernel("a", True, "k"), LayerKernel("b", False, "k", "no")], "m")
    with pytest.raises(PreconditionError, match=r"m: no layer runs in an integer kernel .*no"):
        refuse_if_float([LayerKernel("b", False, "k", "no")], "m")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"overrides": {"*": "skip"}}, "it is not quantized"),
        ({"w_bits": 32}, "its weight is not quantized"),
        ({"a_bits": 32}, "its input is not quantized"),
    ],
)
def test_what_a_layer_lacks_is_said(fields: dict[str, object], said: str) -> None:
    q, _ = _quantized(recipe="repq-vit", **fields)
    reasons = {la.name: la.reason for la in layers_to_lower(q) if isinstance(la, FloatLayer)}
    assert {r for name, r in reasons.items() if "mlp" in name or "conv1" in name} == {said}
