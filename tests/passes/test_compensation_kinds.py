from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_clip import small_model
from toys import WIDTH, Block, Tower, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node, layer_name, weight_layers
from qwt_fx.graph.runner import Subgraph, start
from qwt_fx.inspect.report import block_rows
from qwt_fx.numerics.hold_out import held_out_samples
from qwt_fx.passes import InsertCompensation
from qwt_fx.quant.fake_quant import fake_quant_nodes, fake_quant_of, is_fake_quant
from qwt_fx.quant.quantizers import compensation_bytes

KINDS = ("qwt", "lowrank:4", "int8", "affine")
LAYERS = 2
BATCHES = [tokens(32, 6, seed=10 + i) for i in range(4)]
FRESH = tokens(64, 6, seed=99)


def _quantized(
    config: QuantConfig | None = None,
    model: torch.nn.Module | None = None,
    batches: list[torch.Tensor] = BATCHES,
):
    """Coarse weights, and last linears whose scales are wrong: every kind finds something to do."""
    reference = qwt_fx.capture(model or randomize(Tower(LAYERS)), (batches[0],))
    q = observe(qwt_fx.prepare(reference, config or QuantConfig(3, 8)), batches)
    for node in fake_quant_nodes(q):
        module = fake_quant_of(q, node)
        if module.name.endswith(("fc2.weight", "c_proj.weight")):
            module.set_qparams(0.7 * module.scale, module.zero_point)
    return reference, q


@pytest.fixture(scope="module")
def quantized():
    return _quantized()


def _compensated(quantized, kind: str, **settings):
    reference, q = quantized[0], copy.deepcopy(quantized[1])
    return q, InsertCompensation(reference, BATCHES, kind=kind, **settings)(q)


def _codes(gm, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of a layer's weight in a converted graph."""
    (node,) = [n for n in weight_layers(gm) if layer_name(n) == layer]
    return tuple(getattr(gm, str(a.target)) for a in node.args[1].args[:2])


@pytest.mark.parametrize("target", ["local", "fp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_lowers_the_error_on_fresh_data(quantized, kind: str, target: str) -> None:
    exact = quantized[0](FRESH)
    before = (quantized[1](FRESH) - exact).norm()
    q, result = _compensated(quantized, kind, target=target)
    assert len(result.changes) == LAYERS
    assert (q(FRESH) - exact).norm() < 0.95 * before
    for record in graph_info(q).compensations.values():
        assert record["kind"] == kind
        assert record["r2_held_out"] > 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_no_kind_raises_a_block_error_on_held_out_samples(kind: str, seed: int) -> None:
    batches = [tokens(6, 3, seed=50 + 2 * seed + i) for i in range(2)]  # few tokens: some overfit
    reference, q = _quantized(QuantConfig(5, 5), randomize(Tower(1), seed), batches)
    x = torch.cat(batches)[held_out_samples(12, 0.2)]
    norm = randomize(Tower(1), seed).norm_pre

    def block(gm) -> torch.Tensor:
        (record,) = graph_info(gm).blocks
        part = Subgraph(gm, find_node(gm, record.input), find_node(gm, record.output))
        return part(start(gm, x), norm(x))

    exact = block(reference)
    before = (block(q) - exact).norm()
    InsertCompensation(reference, batches, kind=kind)(q)
    assert (block(q) - exact).norm() <= before


@pytest.mark.parametrize("kind", KINDS)
def test_converted_saved_and_loaded_results_are_bit_identical(
    quantized, kind: str, tmp_path: Path
) -> None:
    q, _ = _compensated(quantized, kind)
    converted = qwt_fx.convert(q)
    qwt_fx.save(converted, tmp_path / "artifact")
    loaded = qwt_fx.load(tmp_path / "artifact")
    assert torch.equal(converted(FRESH), q(FRESH))
    assert torch.equal(loaded(FRESH), q(FRESH))
    ours, theirs = qwt_fx.compensations(q), qwt_fx.compensations(loaded)
    assert list(ours) == list(theirs) == ["blocks.0", "blocks.1"]
    for name, entry in ours.items():
        assert entry["kind"] == theirs[name]["kind"] == kind
        if kind == "affine":
            assert entry["W"] is entry["b"] is None
        else:
            assert torch.equal(entry["W"], theirs[name]["W"])
            assert torch.equal(entry["b"], theirs[name]["b"])


@pytest.mark.parametrize(
    ("kind", "parameters", "macs", "stored"),
    [
        ("qwt", 272, 256, 2 * 256 + 4 * 16),  # W half, b float32
        ("lowrank:4", 144, 128, 2 * 128 + 4 * 16),
        ("int8", 272, 256, 256 + 16 * (4 + 8) + 4 * 16),  # codes, scale, int64 zero point, b
        ("affine", 0, 0, 0),
    ],
)
def test_costs_are_counted(quantized, kind: str, parameters: int, macs: int, stored: int) -> None:
    q, _ = _compensated(quantized, kind)
    for row in block_rows(q, "model"):
        assert row["applied"]
        assert (row["parameters"], row["macs"]) == (parameters, macs)
    converted = qwt_fx.convert(q)
    assert compensation_bytes(converted) == LAYERS * stored
    assert qwt_fx.report(converted)["size"]["compensation_bytes"] == LAYERS * stored


def test_full_rank_equals_the_dense_linear(quantized) -> None:
    dense, _ = _compensated(quantized, "qwt", half=False)
    factored, _ = _compensated(quantized, f"lowrank:{WIDTH + 5}", half=False)
    for name, entry in qwt_fx.compensations(dense).items():
        torch.testing.assert_close(
            qwt_fx.compensations(factored)[name]["W"], entry["W"], rtol=1e-3, atol=1e-5
        )


def test_low_rank_has_that_rank_and_explains_more_the_higher_it_is(quantized) -> None:
    explained = []
    for rank in (1, 4, 12):
        q, _ = _compensated(quantized, f"lowrank:{rank}", half=False, hold_out=0.0)
        first = qwt_fx.compensations(q)["blocks.0"]
        assert int(torch.linalg.matrix_rank(first["W"])) == rank
        explained.append(first["r2"])
    assert explained == sorted(explained)


def test_affine_adds_no_operator_and_moves_no_code(quantized) -> None:
    before = qwt_fx.convert(quantized[1])
    q, _ = _compensated(quantized, "affine")
    after = qwt_fx.convert(q)
    # A new weight stands next to its linear, so the order may differ.
    assert sorted(op_sequence(after)) == sorted(op_sequence(before))
    layers = [layer_name(n) for n in weight_layers(before)]
    assert [layer_name(n) for n in weight_layers(after)] == layers
    for name in layers:
        (old, old_scale), (new, new_scale) = _codes(before, name), _codes(after, name)
        assert torch.equal(old, new), name
        assert torch.equal(old_scale, new_scale) != name.endswith("fc2"), name
        assert bool((new_scale > 0).all())


def test_affine_folds_into_a_weight_in_floating_point() -> None:
    reference, q = _quantized(QuantConfig(16, 3))
    weights = {n: p.clone() for n, p in q.named_parameters()}
    before = (q(FRESH) - reference(FRESH)).norm()
    sequence = op_sequence(q)
    result = InsertCompensation(reference, BATCHES, kind="affine")(q)
    assert result.modified
    assert op_sequence(q) == sequence
    assert (q(FRESH) - reference(FRESH)).norm() < before
    changed = {n for n, _ in q.named_parameters()} - set(weights)
    assert changed
    assert all("fc2" in n for n in changed)


class Scaled(Block):
    """A block whose second branch passes a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm1(x)
        a = torch.nn.functional.scaled_dot_product_attention(self.q(n), self.k(n), self.v(n))
        x = x + self.out(a)
        return x + self.gamma * self.fc2(torch.nn.functional.gelu(self.fc1(self.norm2(x))))


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("affine", QuantConfig(3, 8), "its output is not the sum of one linear and something else"),
        (
            "int8",
            QuantConfig(3, 16),
            "no quantized linear reads all tokens of its input, or of the norm of it",
        ),
    ],
)
def test_a_block_without_a_site_is_left_alone(kind: str, config: QuantConfig, reason: str) -> None:
    model = Tower(1)
    model.blocks[0] = Scaled()
    reference, q = _quantized(config, randomize(model))
    code = q.code
    result = InsertCompensation(reference, BATCHES, kind=kind)(q)
    assert [s.reason for s in result.skips] == [reason]
    assert q.code == code
    assert qwt_fx.compensations(q) == {}


def test_integer_regressor_is_what_the_first_linears_read(quantized) -> None:
    q, _ = _compensated(quantized, "int8")
    layers = {layer_name(n): n for n in weight_layers(q)}
    for block in ("blocks.0", "blocks.1"):
        added = layers[f"{block}.compensation"]
        assert added.args[0] is layers[f"{block}.q"].args[0]
        assert is_fake_quant(q, added.args[0])
        spec = fake_quant_of(q, added.args[1]).spec
        assert (spec.bits, spec.ch_axis) == (8, 0)
    rows = {r["name"]: r for r in qwt_fx.report(qwt_fx.convert(q))["layers"]}
    assert (rows["blocks.0.compensation"]["w_bits"], rows["blocks.0.compensation"]["a_bits"]) == (
        8,
        8,
    )


def test_integer_regressor_is_turned_back_where_attention_wants_the_sequence_first() -> None:
    images = [
        torch.randn(48, 3, 16, 24, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    model = small_model().visual
    reference, q = _quantized(QuantConfig(3, 8), model, images)
    fresh = torch.randn(64, 3, 16, 24, generator=torch.Generator().manual_seed(9))
    before = (q(fresh) - reference(fresh)).norm()
    result = InsertCompensation(reference, images, kind="int8", target="fp")(q)
    assert result.modified
    added = [n for n in weight_layers(q) if layer_name(n).endswith(".compensation")]
    assert all("transpose" in user.name for n in added for user in n.users)
    assert (q(fresh) - reference(fresh)).norm() < before


@pytest.fixture(scope="module")
def in_bfloat16():
    batches = [b.bfloat16() for b in BATCHES]
    model = randomize(Tower(LAYERS)).bfloat16()
    return batches, *_quantized(QuantConfig(3, 8), model, batches)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_blocks_are_compensated_in_bfloat16(in_bfloat16, kind: str) -> None:
    batches, reference, q = in_bfloat16[0], in_bfloat16[1], copy.deepcopy(in_bfloat16[2])
    InsertCompensation(reference, batches, kind=kind)(q)
    assert all(r["applied"] for r in graph_info(q).compensations.values())
    assert q(batches[0]).dtype is torch.bfloat16
    assert torch.equal(qwt_fx.convert(q)(batches[0]), q(batches[0]))
