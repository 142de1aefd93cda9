"""What each kind of compensation fits and adds, against numpy, on graphs of a few nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from built_graph import Built
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.calibrate.compensation_sites import NoSite
from qwt_fx.calibrate.compensators import Compensator, compensator
from qwt_fx.config.compensation_kind import parse_compensation
from qwt_fx.numerics.channel_affine import AffineFit
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.numerics.regression import Fit
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_nodes, fake_quant_of

aten = torch.ops.aten
BATCH, LENGTH, WIDTH = 3, 4, 2
X = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
W = np.array([[0.1, -2.0], [30.0, 0.7]])
BIAS = np.array([0.3, -5.0])


def _kind(name: str, *, half: bool = False) -> Compensator:
    return compensator(parse_compensation(name), half)


def _fit(*factors: np.ndarray) -> Fit:
    return Fit(tuple(map(torch.from_numpy, factors)), torch.from_numpy(BIAS), 0.5, 0.4, 0.1)


def _negative() -> tuple[GraphModule, Node, Node]:
    """The block computes -x; two nodes read it."""
    built = Built()
    result = built.graph.call_function(aten.neg.default, (built.x,))
    doubled = built.graph.call_function(aten.mul.Tensor, (result, 2.0))
    return built.done(doubled, result), built.x, result


def _run(gm: GraphModule, x: Tensor = X) -> list[np.ndarray]:
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        return [value.double().numpy() for value in gm(x)]


@pytest.mark.parametrize("half", [False, True])
def test_a_linear_of_the_blocks_input_is_added_for_every_reader(half: bool) -> None:
    gm, source, result = _negative()
    kind = _kind("qwt", half=half)
    site = kind.site(gm, "blocks.0", source, result)
    assert site.regressor is source
    inserted = kind.insert(gm, site, _fit(W))
    weight = W.astype(np.float16 if half else np.float32).astype(np.float64)
    wanted = -X.double().numpy() + X.double().numpy() @ weight + BIAS
    doubled, plain = _run(gm)
    np.testing.assert_allclose(plain, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(doubled, 2 * wanted, rtol=1e-5, atol=1e-5)
    assert (inserted.parameters, inserted.macs) == (4 + 2, 4)
    assert gm.blocks_0_compensation_weight.dtype == (torch.float16 if half else torch.float32)
    # Half's 11 bits of 0.1 would show at these tolerances.
    assert half == (abs(weight[0, 0] - 0.1) > 1e-5)


def test_a_weight_beyond_halfs_range_stays_in_single_precision() -> None:
    gm, source, result = _negative()
    kind = _kind("qwt", half=True)
    kind.insert(gm, kind.site(gm, "b", source, result), _fit(np.array([[1e5, 0.1], [0.0, 1.0]])))
    assert gm.b_compensation_weight.dtype == torch.float32
    _, plain = _run(gm)
    x = X.double().numpy()
    np.testing.assert_allclose(plain[..., 0], 1e5 * x[..., 0] - x[..., 0] + 0.3, rtol=1e-5)


def test_two_factors_are_two_products() -> None:
    gm, source, result = _negative()
    kind = _kind("lowrank:1")
    down, up = np.array([[2.0], [-1.0]]), np.array([[0.5, 3.0]])
    inserted = kind.insert(gm, kind.site(gm, "b", source, result), _fit(down, up))
    x = X.double().numpy()
    hidden = 2.0 * x[..., :1] - x[..., 1:]
    wanted = -x + np.concatenate([0.5 * hidden, 3.0 * hidden], axis=-1) + BIAS
    np.testing.assert_allclose(_run(gm)[1], wanted, rtol=1e-5, atol=1e-6)
    assert (inserted.parameters, inserted.macs) == (4 + 2, 4)


def _problem(outputs: int) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Inputs of unlike size, outputs with an offset and noise; as arrays and as tensors."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 4)) * [1.0, 5.0, 0.2, 1.0] + 1.0
    y = x @ generator.standard_normal((4, outputs)) + generator.standard_normal((200, outputs))
    return x, y, torch.from_numpy(x), torch.from_numpy(y)


def test_low_rank_leaves_no_more_error_than_the_best_matrix_of_that_rank() -> None:
    x, y, *sums = _problem(3)
    kind = _kind("lowrank:1")
    train = kind.empty(4, 3, torch.device("cpu"))
    train.merge(train.part(*sums))
    fit = kind.fit(train, None)
    centred = x - x.mean(axis=0)
    full = np.linalg.lstsq(centred, y - y.mean(axis=0), rcond=None)[0]
    left, singular, right = np.linalg.svd(centred @ full, full_matrices=False)
    best = singular[0] * np.outer(left[:, 0], right[0])  # Eckart and Young
    assert [tuple(f.shape) for f in fit.factors] == [(4, 1), (1, 3)]
    found = x @ fit.weight.numpy() + fit.bias.numpy()
    np.testing.assert_allclose(found, best + y.mean(axis=0), atol=1e-8)


@pytest.mark.parametrize("name", ["qwt", "int8"])
def test_without_held_out_tokens_a_fit_is_least_squares_as_it_is_stored(name: str) -> None:
    x, y, *sums = _problem(3)
    kind = _kind(name)
    train = kind.empty(4, 3, torch.device("cpu"))
    train.merge(train.part(*sums))
    fit = kind.fit(train, None)
    weight = np.linalg.lstsq(x - x.mean(axis=0), y - y.mean(axis=0), rcond=None)[0]
    if name == "int8":
        step = (np.abs(weight).max(axis=0) / 127).astype(np.float32).astype(np.float64)
        weight = np.round(weight / step) * step
    bias = y.mean(axis=0) - x.mean(axis=0) @ weight
    np.testing.assert_allclose(fit.weight.numpy(), weight, atol=1e-9)
    np.testing.assert_allclose(fit.bias.numpy(), bias, atol=1e-9)
    left = y - x @ weight - bias
    r2 = 1.0 - (left**2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
    assert fit.r2 == pytest.approx(r2, abs=1e-9)
    assert fit.r2_held_out is None


def _input_quantizer() -> FakeQuant:
    module = FakeQuant(QuantSpec(8), "fc.input")
    module.set_qparams(torch.tensor(0.25), torch.tensor(100.0))
    return module


@pytest.mark.parametrize("turned", [False, True])
def test_an_integer_linear_reads_the_codes_that_the_block_has(turned: bool) -> None:
    """turned: the block works on (length, batch, width) and turns its output back."""
    built = Built()
    call = built.graph.call_function
    value = built.x
    if turned:
        value = call(aten.transpose.int, (value, 0, 1))
        value.meta["val"] = X.transpose(0, 1)
    rounded = built.quantizer("q", value, _input_quantizer())
    result = built.linear(rounded, built.tensor("w", torch.eye(2)))
    if turned:
        result = call(aten.transpose.int, (result, 0, 1))
    gm = built.done(call(aten.mul.Tensor, (result, 2.0)), result)
    kind = _kind("int8")
    site = kind.site(gm, "blocks.0", built.x, result)
    assert site.regressor is rounded
    inserted = kind.insert(gm, site, _fit(W))
    x = np.round(X.double().numpy() / 0.25) * 0.25  # in range, all of them
    step = np.array([30.0, 2.0]) / 127
    weight = np.round(W / step) * step
    assert weight[0, 0] == 0.0  # 0.1 beside 30
    wanted = x + x @ weight + BIAS
    doubled, plain = _run(gm)
    np.testing.assert_allclose(plain, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(doubled, 2 * wanted, rtol=1e-5, atol=1e-5)
    assert (inserted.parameters, inserted.macs) == (4 + 2, 4)
    weights = [fake_quant_of(gm, n) for n in fake_quant_nodes(gm) if n is not rounded]
    assert [m.zero_point.tolist() for m in weights] == [[128, 128]]  # symmetric


def test_a_block_without_integers_has_no_place_for_an_integer_linear() -> None:
    gm, source, result = _negative()
    with pytest.raises(NoSite, match="no quantized linear reads all tokens of its input"):
        _kind("int8").site(gm, "b", source, result)


A, C = np.array([1.3, 0.4]), np.array([2.0, -1.0])
LINEAR_WEIGHT = [[1.5, -2.2], [0.24, 0.9]]


def _residual(*, quantized: bool, bias: bool) -> tuple[GraphModule, Node, Node]:
    """x + W x + b; the weight in steps of 1 and 0.1, codes 0..15 around 8."""
    built = Built()
    weight = built.tensor("w", LINEAR_WEIGHT)
    if quantized:
        module = FakeQuant(QuantSpec(4, ch_axis=0), "fc.weight")
        module.set_qparams(torch.tensor([1.0, 0.1]), torch.tensor([8.0, 8.0]))
        weight = built.quantizer("q", weight, module)
    linear = built.linear(built.x, weight, built.tensor("b", [0.5, 0.25]) if bias else None)
    result = built.graph.call_function(aten.add.Tensor, (built.x, linear))
    return built.done(result), built.x, result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_scale_and_a_shift_are_folded_into_the_last_linear(quantized: bool, bias: bool) -> None:
    gm, source, result = _residual(quantized=quantized, bias=bias)
    nodes = len(gm.graph.nodes)
    kind = _kind("affine")
    site = kind.site(gm, "b", source, result)
    fit = AffineFit(torch.from_numpy(A), torch.from_numpy(C), 0.5, None, None)
    inserted = kind.insert(gm, site, fit)
    # 1.5 is rounded to 2 (half to even), and stays code 10 whatever its scale becomes.
    weight = np.array([[2.0, -2.0], [0.2, 0.7]] if quantized else LINEAR_WEIGHT)
    x = X.double().numpy()
    before = x @ weight.T + ([0.5, 0.25] if bias else [0.0, 0.0])
    whole = np.stack(_run(gm))  # sample by sample
    np.testing.assert_allclose(whole, x + A * before + C, rtol=1e-5, atol=1e-5)
    assert inserted.output is result
    assert (inserted.parameters, inserted.macs) == (0 if bias else 2, 0)
    assert len(gm.graph.nodes) == nodes + (not bias)
    correction = fit.correction(torch.from_numpy(before))
    np.testing.assert_allclose(before + correction.numpy(), A * before + C)
    if quantized:
        (module,) = (fake_quant_of(gm, n) for n in fake_quant_nodes(gm))
        assert module.scale.tolist() == pytest.approx([1.3, 0.04])
        assert module.zero_point.tolist() == [8.0, 8.0]


def test_the_scale_and_shift_are_each_channels_own_line() -> None:
    generator = np.random.default_rng(1)
    output = generator.standard_normal((100, 2)) * [1.0, 20.0] + [3.0, 0.0]
    error = (A - 1.0) * output + C + 0.1 * generator.standard_normal((100, 2))
    kind = _kind("affine")
    train = kind.empty(2, 2, torch.device("cpu"))
    for rows in (slice(0, 30), slice(30, 100)):
        train.merge(train.part(torch.from_numpy(output[rows]), torch.from_numpy(error[rows])))
    fit = kind.fit(train, None)
    lines = [np.polyfit(output[:, c], error[:, c], 1) for c in range(2)]
    np.testing.assert_allclose(fit.scale.numpy(), [1.0 + slope for slope, _ in lines], atol=1e-9)
    np.testing.assert_allclose(fit.shift.numpy(), [offset for _, offset in lines], atol=1e-9)


def test_a_block_that_ends_otherwise_has_no_place_for_a_scale() -> None:
    gm, source, result = _negative()
    with pytest.raises(NoSite, match="not the sum of one linear and something else"):
        _kind("affine").site(gm, "b", source, result)
    built = Built()
    linear = built.linear(built.x, built.tensor("w", LINEAR_WEIGHT))
    result = built.graph.call_function(aten.add.Tensor, (built.x, linear))
    gm = built.done(result, built.graph.call_function(aten.relu.default, (linear,)))
    with pytest.raises(NoSite, match="its last linear has other readers"):
        _kind("affine").site(gm, "b", built.x, result)
