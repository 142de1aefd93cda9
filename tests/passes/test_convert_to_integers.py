from __future__ import annotations

import copy

import pytest
import torch
from torch.export import Dim
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import NotCalibratedError, PostconditionError
from qwt_fx.passes import ConvertToIntegers

CONFIGS = [
    QuantConfig(8, 8),
    QuantConfig(4, 6, recipe="repq-vit", compensation="qwt"),
    QuantConfig(6, 6, recipe="repq-vit", compat="original", compensation="qwt"),
    QuantConfig(4, 4, attention="log2"),
    QuantConfig(4, 4, attention="uniform"),
    QuantConfig(5, 32),
    QuantConfig(16, 5),
]


def _calibrated(config: QuantConfig):
    batches = [tokens(6, seed=i) for i in range(3)]
    graph = qwt_fx.capture(randomize(Tower()), (batches[0],))
    return graph, batches, qwt_fx.calibrate(qwt_fx.prepare(graph, config), batches)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_conversion_changes_no_bit_and_three_steps_equal_one(config: QuantConfig) -> None:
    graph, batches, calibrated = _calibrated(config)
    converted = qwt_fx.convert(calibrated)
    whole = qwt_fx.quantize(graph, (batches[0],), batches, config)
    for batch in (1, 7):
        x = tokens(batch, seed=99)
        assert torch.equal(converted(x), calibrated(x))
        assert torch.equal(converted(x), whole(x))
    assert not torch.equal(converted(x), graph(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["none", "uniform", "log2", "auto"])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_stays_half_precision(
    dtype: torch.dtype, attention: str, causal: bool
) -> None:
    """Nodes that decomposing attention puts in have no recorded dtype of their own."""
    x = tokens(4, seed=0).to(dtype)
    model = randomize(Tower(1, causal=causal)).to(dtype)
    config = QuantConfig(8, 8, recipe="repq-vit", attention=attention)
    calibrated = qwt_fx.calibrate(qwt_fx.prepare(qwt_fx.capture(model, (x,)), config), [x])
    converted = qwt_fx.convert(calibrated)
    assert converted(x).dtype is dtype
    assert torch.equal(converted(x), calibrated(x))


def test_weights_are_integers_and_zero_points_fit() -> None:
    _, _, calibrated = _calibrated(QuantConfig(4, 4))
    q = qwt_fx.convert(calibrated)
    codes = [v for n, v in q.named_buffers() if n.endswith("_codes")]
    assert len(codes) == 12
    assert all(c.dtype is torch.uint8 and int(c.max()) <= 15 for c in codes)
    for layer in qwt_fx.qparams(q).values():
        for scale, zero in layer.values():
            assert bool((scale > 0).all())
            assert bool(((zero >= 0) & (zero <= 15) & (zero == zero.round())).all())
    assert not any(n.op == "call_module" for n in q.graph.nodes)


def test_the_result_is_a_plain_graph_module() -> None:
    _, _, calibrated = _calibrated(QuantConfig(4, 4))
    q = qwt_fx.convert(calibrated)
    x = tokens()
    copied = copy.deepcopy(q)
    assert torch.equal(copied(x), q(x))
    other = copy.deepcopy(q)
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(x), q(x))
    program = torch.export.export(q, (x,), dynamic_shapes=({0: Dim("batch", min=1)},))
    assert torch.equal(program.module()(tokens(4)), q(tokens(4)))


def test_uncalibrated_graph_is_refused_and_second_run_is_unmodified() -> None:
    graph, _, calibrated = _calibrated(QuantConfig())
    with pytest.raises(NotCalibratedError, match="has no scale"):
        qwt_fx.convert(qwt_fx.prepare(graph, QuantConfig()))
    q = qwt_fx.convert(calibrated)
    assert not ConvertToIntegers()(q).modified


def test_a_module_that_is_no_quantizer_is_not_left_in_the_result() -> None:
    graph = qwt_fx.capture(randomize(Tower()), (tokens(2),))
    graph.add_submodule("other", torch.nn.Identity())
    (output,) = graph.graph.find_nodes(op="output")
    with graph.graph.inserting_before(output):
        call = graph.graph.call_module("other", (output.args[0][0],))
    output.args = ((call,),)
    with pytest.raises(PostconditionError, match=r"modules are left in the graph: \['other'\]"):
        ConvertToIntegers()(graph)


def test_original_model_is_refused_by_save_and_lower(tmp_path) -> None:
    _, _, calibrated = _calibrated(CONFIGS[2])
    q = qwt_fx.convert(calibrated)
    for refused in (lambda: qwt_fx.save(q, tmp_path / "a"), lambda: qwt_fx.lower(q)):
        with pytest.raises(qwt_fx.QwtError, match="no integer type can store"):
            refused()


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.compat == "none"], ids=str)
def test_save_and_load_change_no_bit(config: QuantConfig, tmp_path) -> None:
    _, _, calibrated = _calibrated(config)
    q = qwt_fx.convert(calibrated)
    qwt_fx.save(q, tmp_path / "a")
    loaded = qwt_fx.load(tmp_path / "a")
    x = tokens(5, seed=3)
    assert torch.equal(loaded(x), q(x))
    assert qwt_fx.qparams(loaded).keys() == qwt_fx.qparams(q).keys()
    assert qwt_fx.report(loaded)["blocks"] == qwt_fx.report(q)["blocks"]
    assert torch.equal(qwt_fx.lower(loaded, "eager")(x), q(x))


def test_a_last_linear_without_bias_is_saved(tmp_path) -> None:
    """Its weight stands next to the inputs, and no operator may come before these."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).eval()
    x = torch.randn(6, 8)
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig(recipe="repq-vit"))
    qwt_fx.save(q, tmp_path / "a")
    assert torch.equal(qwt_fx.load(tmp_path / "a")(x), q(x))
