from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import WIDTH, Sequence, Tower, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx import api
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.layer_settings import LayerSettings
from qwt_fx.config.settings import settings_of
from qwt_fx.errors import DataError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.passes import CalibrateLayers, InsertObservers
from qwt_fx.quant.fake_quant import fake_quant_nodes, fake_quant_of

BATCHES = [tokens(16, 9, seed=s) for s in range(4)]
EVALUATION = tokens(64, 9, seed=99)
BEST = LayerSettings()
_TOWER = randomize(Tower(2))
WIDE = 128


def _calibrated(
    model: nn.Module, settings: LayerSettings = BEST, bits: int = 4, batches: Any = BATCHES
) -> GraphModule:
    reference = _captured(model, batches[0])
    gm = copy.deepcopy(reference)
    InsertObservers(QuantConfig(bits, bits))(gm)
    CalibrateLayers(reference, batches, settings)(gm)
    return gm


_GRAPHS: dict[int, tuple[nn.Module, GraphModule]] = {}


def _captured(model: nn.Module, x: Tensor) -> GraphModule:
    """The model's graph, captured once; the model is kept, so that its id stays its own."""
    if id(model) not in _GRAPHS:
        _GRAPHS[id(model)] = model, qwt_fx.capture(model, (x,))
    return _GRAPHS[id(model)][1]


def _sqnr(gm: GraphModule, model: nn.Module, x: Tensor = EVALUATION) -> float:
    with torch.no_grad():
        return sqnr_db(model(x), gm(x))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_output_is_closer_than_the_published_procedures(bits: int) -> None:
    model = _TOWER
    graph = _captured(model, BATCHES[0])
    published = api.quantize(graph, (), BATCHES, QuantConfig(bits, bits, recipe="repq-vit"))
    ours = _calibrated(model, bits=bits)
    assert _sqnr(ours, model) > _sqnr(published, model) + 1.0


def test_every_quantizer_is_calibrated_per_tensor_and_storable() -> None:
    gm = _calibrated(_TOWER)
    for node in fake_quant_nodes(gm):
        module = fake_quant_of(gm, node)
        assert module.calibrated
        is_weight = module.name.endswith(".weight")
        assert module.spec.ch_axis == (0 if is_weight else None)
        zero = module.zero_point
        assert torch.equal(zero, zero.round())
        assert bool((zero >= 0).all() and (zero <= module.spec.quant_max).all())
        if is_weight:
            assert bool((zero == 8).all())  # symmetric, as integer kernels want it


def test_without_input_scales_only_quantizers_are_added_to_the_graph() -> None:
    model = _TOWER
    before = op_sequence(_captured(model, BATCHES[0]))
    calibrated = _calibrated(model, replace(BEST, input_scales=False))
    after = [name for name in op_sequence(calibrated) if name != "fake_quant"]
    assert after == before


def _moved_alone(model: nn.Module, batches: list[Tensor], bits: int) -> GraphModule:
    """All of the channels' differences moved, nothing else done; the quantizers taken out again."""
    moves = replace(BEST, refit=False, bias_correction=False, reparameterization=1.0)
    reference = _captured(model, batches[0])
    gm = copy.deepcopy(reference)
    InsertObservers(QuantConfig(16, bits))(gm)
    CalibrateLayers(reference, batches, moves)(gm)
    for node in fake_quant_nodes(gm):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    gm.recompile()
    return gm


def test_rescales_alone_leave_the_float_function_as_it_was() -> None:
    """Weights of 16 bits, nothing refitted: what is left is the error of 8-bit activations."""
    model = randomize(Tower(2)).double()
    gm = _moved_alone(model, [b.double() for b in BATCHES], bits=8)
    x = EVALUATION.double()
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch_size", [8, 4, 1])
def test_few_samples_do_not_clip_others(batch_size: int) -> None:
    model = Tower(1, WIDE)
    randomize(model, seed=3)
    for block in model.blocks:
        block.k.weight.data *= 1e-3  # all keys alike: outputs hardly differ within a sample
    batches = list(torch.split(tokens(8, 50, WIDE, seed=1), batch_size))
    evaluation = tokens(64, 50, WIDE, seed=2)
    moved = _calibrated(model, bits=8, batches=batches)
    in_place = _calibrated(model, replace(BEST, fold_values=False), 8, batches)
    assert _sqnr(moved, model, evaluation) > _sqnr(in_place, model, evaluation) - 0.5


@pytest.mark.parametrize(
    ("without", "gain"),
    [
        ({"refit": False, "bias_correction": False}, 0.3),
        ({"rounding": "nearest", "refit": False}, 0.3),
        ({"reparameterization": 0.0, "fold_values": False}, 1.0),
    ],
)
def test_each_remedy_earns_its_place(without: dict[str, Any], gain: float) -> None:
    model = randomize(Tower(3), seed=5)
    assert (
        _sqnr(_calibrated(model), model)
        > _sqnr(_calibrated(model, replace(BEST, **without)), model) + gain
    )


def test_ill_conditioned_values_are_undone() -> None:
    model = randomize(Tower(2))
    scale = torch.exp(2.0 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    for block in model.blocks:
        block.v.weight.data *= scale[:, None]
        block.v.bias.data *= scale
        block.out.weight.data /= scale
    folded = _calibrated(model, replace(BEST, input_scales=False))
    plain = _calibrated(model, replace(BEST, input_scales=False, fold_values=False))
    assert _sqnr(folded, model) > _sqnr(plain, model) + 3.0
    changes = dict(graph_info(folded).passes[-1]["changes"])
    assert "moved into the values" in changes["blocks.0.out.input"]


def _uneven_hidden_channels() -> nn.Module:
    """A tower a few of whose hidden channels are far larger than the rest."""
    model = randomize(Tower(2))
    for block in model.blocks:
        block.fc1.weight.data[:8] *= 30.0
        block.fc1.bias.data[:8] *= 30.0
        block.fc2.weight.data[:, :8] /= 30.0
    return model


def test_uneven_channels_behind_no_norm_are_evened_out_by_a_product() -> None:
    model = _uneven_hidden_channels()
    scaled = _calibrated(model)
    plain = _calibrated(model, replace(BEST, input_scales=False))
    assert _sqnr(scaled, model) > _sqnr(plain, model) + 1.5
    changes = dict(graph_info(scaled).passes[-1]["changes"])
    assert "product of the input" in changes["blocks.0.fc2.input"]
    assert torch.equal(api.convert(scaled)(EVALUATION), scaled(EVALUATION))


def test_products_of_inputs_leave_the_float_function_as_it_was() -> None:
    model = _uneven_hidden_channels().double()
    batches = [b.double() for b in BATCHES]
    gm = _moved_alone(model, batches, bits=4)
    changes = dict(graph_info(gm).passes[-1]["changes"])
    assert all("product of the input" in changes[f"blocks.{i}.fc2.input"] for i in (0, 1))
    before = op_sequence(_captured(model, batches[0]))
    after = [name for name in op_sequence(gm) if name != "fake_quant"]
    assert 0 < len(after) - len(before) <= 4  # a product, and a difference, for each block
    x = EVALUATION.double()
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)


def test_ranges_serve_the_output_rather_than_the_tensor() -> None:
    model = randomize(Tower(2))
    for block in model.blocks:  # hidden channels that are large and hardly read
        block.fc1.weight.data[:8] *= 100.0
        block.fc1.bias.data[:8] *= 100.0
        block.fc2.weight.data[:, :8] *= 1e-5
    served = _calibrated(model, replace(BEST, input_scales=False))
    plain = _calibrated(model, replace(BEST, input_scales=False, ranges="tensor"))
    assert _sqnr(served, model) > _sqnr(plain, model) + 3.0


def test_residual_stream_is_repaired() -> None:
    """Where the input of the stream was damaged, the next layer that adds to it makes up for it."""
    model = randomize(Tower(2), seed=3)
    local = _calibrated(model, replace(BEST, target="local"), bits=3)
    repaired = _calibrated(model, bits=3)
    assert _sqnr(repaired, model) > _sqnr(local, model)


def test_one_extreme_position_gets_a_scale_of_its_own() -> None:
    class Outlier(Tower):
        def __init__(self) -> None:
            super().__init__(1)
            factor = torch.ones(9, WIDTH)
            factor[0, :2] = 50.0
            self.register_buffer("factor", factor)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0].fc1(self.norm_pre(x) * self.factor)

    model = randomize(Outlier())
    without = replace(BEST, input_scales=False)
    ours = _calibrated(model, without, bits=8)
    plain = _calibrated(model, replace(without, token_scales=False), bits=8)
    scales = [fake_quant_of(ours, n).token_scale for n in fake_quant_nodes(ours)]
    (scale,) = [s for s in scales if s is not None]
    assert scale.shape == (9, 1)
    assert float(scale[0]) >= 4.0
    assert scale[1:].flatten().tolist() == [1.0] * 8
    with torch.no_grad():
        exact, a, b = model(EVALUATION), ours(EVALUATION), plain(EVALUATION)
    assert sqnr_db(exact[:, 1:], a[:, 1:]) > sqnr_db(exact[:, 1:], b[:, 1:]) + 10.0


def test_a_position_scale_survives_conversion_saving_and_loading(tmp_path: Path) -> None:
    model = randomize(Tower(1))
    gm = _calibrated(model)
    module = fake_quant_of(gm, fake_quant_nodes(gm)[0])
    module.token_scale = torch.tensor([4.0] + [1.0] * 8)[:, None]
    q = api.convert(gm)
    assert torch.equal(q(EVALUATION), gm(EVALUATION))
    api.save(q, tmp_path / "a")
    assert torch.equal(api.load(tmp_path / "a")(EVALUATION), q(EVALUATION))
    assert set(api.qparams(q)) == {f"blocks.0.{n}" for n in ("q", "k", "v", "out", "fc1", "fc2")}


def test_calibration_is_deterministic() -> None:
    model = _TOWER
    first, second = (_calibrated(model).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def _random_weights(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.2, 0.2, generator=generator)
    return model.eval()


def _images(samples: int, channels: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, channels, size, size, generator=generator)


def test_convolution_is_fitted_on_its_patches() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, WIDTH, 4, stride=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(2).transpose(1, 2)

    model = _random_weights(Patches())
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    images = [torch.einsum("ij,njhw->nihw", mix, _images(8, 3, 16, seed=s)) for s in range(4)]
    gptq = _calibrated(model, bits=3, batches=images)
    nearest = _calibrated(model, replace(BEST, rounding="nearest", refit=False), 3, images)
    with torch.no_grad():
        exact = model(images[0])
        assert sqnr_db(exact, gptq(images[0])) > sqnr_db(exact, nearest(images[0]))


def test_grouped_convolution_is_rounded_to_nearest() -> None:
    model = _random_weights(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)))
    images = [_images(4, 4, 8, seed=s) for s in range(2)]
    gm = _calibrated(model, batches=images)
    changes = dict(graph_info(gm).passes[-1]["changes"])
    assert changes["0"] == "weight rounded to nearest: no rows to fit it on"
    assert bool(torch.isfinite(gm(images[0])).all())


def test_values_that_are_not_finite_are_named() -> None:
    bad = [BATCHES[0].clone()]
    bad[0][0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite values"):
        _calibrated(randomize(Tower(1)), batches=bad)


def test_a_single_token_and_constant_inputs_are_survived() -> None:
    model = randomize(Tower(1))
    one = [tokens(1, 1)]
    assert bool(torch.isfinite(_calibrated(model, batches=one)(one[0])).all())
    model, constant = randomize(Tower(1)), [torch.ones(4, 3, WIDTH)]
    assert bool(torch.isfinite(_calibrated(model, batches=constant)(constant[0])).all())


def test_norm_shared_with_something_else_is_left_alone() -> None:
    class Model(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            return n + self.linear(n)

    model = randomize(Model())
    gm = _calibrated(model)
    changes = dict(graph_info(gm).passes[-1]["changes"])
    assert "norm" not in changes["linear.input"]
    norm = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)[0]
    assert str(norm.args[2].target) == "norm.weight"


def test_recipe_fields_reach_the_pass() -> None:
    layers = settings_of(QuantConfig(rounding="nearest", reparameterization=0.5)).layers
    assert layers is not None
    assert (layers.rounding, layers.strengths) == ("nearest", (0.5,))
    assert settings_of(QuantConfig(recipe="repq-vit")).layers is None
    alone = settings_of(QuantConfig(recipe="repq-vit", fold_values=True)).layers
    assert alone is not None
    assert alone.fold_values
    assert not alone.refit
    searched = settings_of(QuantConfig(recipe="repq-vit", ranges="tensor")).layers
    assert searched is not None
    assert searched.ranges == "tensor"


def test_a_module_called_twice_gets_a_weight_for_each_call(tmp_path: Path) -> None:
    model = randomize(Tower(layers=2))
    model.blocks[1] = model.blocks[0]
    x = tokens(6)
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig())
    with torch.no_grad():
        assert sqnr_db(model(x), q(x)) > 30.0
        qwt_fx.save(q, tmp_path / "a")
        assert torch.equal(qwt_fx.load(tmp_path / "a")(x), q(x))
