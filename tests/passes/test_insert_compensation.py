from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_clip import small_model
from toys import WIDTH, Tower, randomize, tokens

import qwt_fx
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError, DataError, PreconditionError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node
from qwt_fx.graph.runner import Subgraph, run_all, start
from qwt_fx.numerics.hold_out import held_out_samples
from qwt_fx.passes import InsertCompensation

CONFIG = QuantConfig(3, 8, compensation="none")  # coarse weights: an error linear in x


def _quantized(batches: list[torch.Tensor], layers: int = 2):
    reference = qwt_fx.capture(randomize(Tower(layers)), (batches[0],))
    q = qwt_fx.prepare(reference, CONFIG)
    return reference, observe(q, batches)


def _batches(count: int = 4, samples: int = 32) -> list[torch.Tensor]:
    return [tokens(samples, 6, seed=10 + i) for i in range(count)]


def _value(gm, name: str, x: torch.Tensor) -> torch.Tensor:
    held = {}

    def visit(node: object, env: dict) -> None:
        held.update({n.name: v for n, v in env.items() if n.name == name})

    run_all(gm, x, visit)
    return held[name]


def _regression(
    reference, q, index: int, output: str, batches: list[torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """What a block reads, and what its quantized output misses of the exact block's on the same."""
    block, original = graph_info(q).blocks[index], graph_info(reference).blocks[index]
    part = Subgraph(
        reference, find_node(reference, original.input), find_node(reference, original.output)
    )
    read = [_value(q, block.input, b) for b in batches]
    missing = [
        part(start(reference, b), x) - _value(q, output, b)
        for x, b in zip(read, batches, strict=True)
    ]
    x, y = (torch.cat(v).reshape(-1, WIDTH).detach().double().numpy() for v in (read, missing))
    return x, y


def test_weights_equal_numpy_least_squares_on_a_well_posed_block() -> None:
    batches = _batches()
    reference, q = _quantized(batches)
    first = graph_info(q).blocks[0]
    InsertCompensation(reference, batches, hold_out=0.0, half=False)(q)
    block = graph_info(q).blocks[1]
    name = block.name
    partial = find_node(q, block.output).args[0].args[0].name  # type: ignore[union-attr]
    x, y = _regression(reference, q, 1, partial, batches)
    z = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    expected = np.linalg.lstsq(z, y, rcond=None)[0]
    found = qwt_fx.compensations(q)[name]
    np.testing.assert_allclose(found["W"].numpy(), expected[:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["b"].numpy(), expected[-1], rtol=1e-3, atol=1e-4)
    residual = y - z @ expected
    total = y - y.mean(axis=0)
    assert found["r2"] == pytest.approx(1 - (residual**2).sum() / (total**2).sum(), abs=1e-6)
    assert first.name == "blocks.0"


def test_singular_block_behind_a_norm_is_solved_alike_by_any_thread_count() -> None:
    batches = _batches()
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        reference, q = _quantized(batches)
        InsertCompensation(reference, batches)(q)
        torch.set_num_threads(before)
        found.append(graph_info(q).compensations["blocks.0"])
    assert found[0]["r2_held_out"] > 0.0
    # The published float32 inverse went from -0.1 with one thread to -5000 with two.
    assert found[0]["r2_held_out"] == pytest.approx(found[1]["r2_held_out"], abs=1e-3)


def test_block_error_falls_and_second_run_is_unmodified() -> None:
    batches = _batches()
    reference, q = _quantized(batches)
    exact = torch.cat([reference(b) for b in batches])
    before = torch.cat([q(b) for b in batches])
    result = InsertCompensation(reference, batches)(q)
    after = torch.cat([q(b) for b in batches])
    assert len(result.changes) == 2
    assert (after - exact).norm() < (before - exact).norm()
    again = InsertCompensation(reference, batches)(q)
    assert not again.modified
    assert {s.reason for s in again.skips} == {"compensated already"}


class SequenceFirst(torch.nn.Module):
    """A tower whose blocks pass (length, batch, width) on, as older transformers do."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.norm_pre = tower.norm_pre
        self.blocks = torch.nn.ModuleList(_Turned(b) for b in tower.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_pre(x).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x.transpose(0, 1)


class _Turned(torch.nn.Module):
    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.transpose(0, 1)).transpose(0, 1)


def test_whole_samples_are_held_out_whatever_the_layout() -> None:
    batches = _batches()
    found = []
    for turn in (False, True):
        tower = randomize(Tower(1))
        reference = qwt_fx.capture(SequenceFirst(tower) if turn else tower, (batches[0],))
        q = observe(qwt_fx.prepare(reference, CONFIG), batches)
        InsertCompensation(reference, batches)(q)
        (record,) = graph_info(q).compensations.values()
        found.append(record)
    plain, turned = found
    assert turned["r2_held_out"] == pytest.approx(plain["r2_held_out"], abs=1e-5)
    assert turned["r2"] == pytest.approx(plain["r2"], abs=1e-5)


@pytest.mark.parametrize("kind", ["qwt", "int8", "affine"])
def test_no_block_is_fitted_on_positions_behind_the_end_of_a_text(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    end = 49407  # the largest id ends a text, wherever it stands
    texts = torch.randint(1, 1000, (96, 12), generator=generator)
    ends = torch.randint(3, 9, (96,), generator=generator)
    texts[torch.arange(96), ends] = end
    behind = torch.arange(12) > ends[:, None]
    other = torch.where(behind, torch.randint(1, 1000, texts.shape, generator=generator), texts)
    model = Text(small_model())
    reference = qwt_fx.capture(model, (texts[:2],))
    q = observe(qwt_fx.prepare(reference, CONFIG), [texts])
    records = []
    for batch in (texts, other):
        copied = copy.deepcopy(q)
        InsertCompensation(reference, [batch], kind=kind)(copied)
        records.append(list(graph_info(copied).compensations.values()))
    assert any(r["applied"] for r in records[0][:-1]), "no block's input was renamed"
    for ours, theirs in zip(*records, strict=True):
        assert ours["r2"] == pytest.approx(theirs["r2"], abs=1e-4)
        assert ours["r2_held_out"] == pytest.approx(theirs["r2_held_out"], abs=1e-4)


class Text(torch.nn.Module):
    """The text tower of a CLIP."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_text(text)


def test_aiming_at_the_floating_point_path_repairs_errors_from_before_the_block() -> None:
    batches = _batches()
    fresh = tokens(64, 6, seed=99)
    left = {}
    for target in ("local", "fp"):
        reference, q = _quantized(batches)
        InsertCompensation(reference, batches, target=target)(q)
        left[target] = float((q(fresh) - reference(fresh)).detach().norm())
        records = graph_info(q).compensations.values()
        assert {(r["target"], r["applied"]) for r in records} == {(target, True)}
    assert left["fp"] < left["local"]


def test_noise_is_rejected_on_held_out_samples() -> None:
    """With fewer tokens than channels a fit explains the tokens that made it, and no others."""
    batches = [tokens(3, 2, seed=i) for i in range(2)]  # 12 tokens for 16 channels
    fresh = tokens(64, 2, seed=99)
    reference, q = _quantized(batches)
    code, before = q.code, q(fresh)
    result = InsertCompensation(reference, batches, half=False)(q)
    assert not result.modified
    assert q.code == code and torch.equal(q(fresh), before)
    records = list(graph_info(q).compensations.values())
    assert [r["applied"] for r in records] == [False, False]
    held = np.arange(12) // 2 == 4  # the fifth of six samples, two tokens each
    for index, (record, skip) in enumerate(zip(records, result.skips, strict=True)):
        output = graph_info(q).blocks[index].output
        x, y = _regression(reference, q, index, output, batches)
        mean_x, mean_y = x[~held].mean(axis=0), y[~held].mean(axis=0)
        gram = (x[~held] - mean_x).T @ (x[~held] - mean_x)
        gram += record["ridge"] * np.trace(gram) / WIDTH * np.eye(WIDTH)
        weight = np.linalg.pinv(gram) @ (x[~held] - mean_x).T @ (y[~held] - mean_y)
        left = y[held] - mean_y - (x[held] - mean_x) @ weight
        wanted = 1.0 - (left**2).sum() / ((y[held] - y[held].mean(axis=0)) ** 2).sum()
        assert wanted < -1.0 and record["r2"] > 0.2
        assert record["r2_held_out"] == pytest.approx(wanted, rel=1e-6)
        assert skip.reason == f"R^2 {record['r2_held_out']:.4g} is not positive"


def test_held_out_samples_are_spread_and_never_none_or_all() -> None:
    assert held_out_samples(10, 0.2).nonzero().flatten().tolist() == [4, 9]
    assert held_out_samples(3, 0.2).tolist() == [False, False, True]
    assert not held_out_samples(5, 0.0).any()


def test_one_sample_cannot_be_held_out() -> None:
    batches = [tokens(1, 6)]
    reference, q = _quantized(batches)
    (skip,) = InsertCompensation(reference, batches)(q).skips
    assert skip.reason == "one calibration sample: none can be held out"


def test_bad_arguments_are_refused() -> None:
    batches = _batches(1)
    reference, q = _quantized(batches)
    with pytest.raises(
        ConfigError, match="got 'magic', wanted one of none, qwt, affine, lowrank:R"
    ):
        InsertCompensation(reference, batches, kind="magic")
    with pytest.raises(ConfigError, match="leave the pass out instead"):
        InsertCompensation(reference, batches, kind="none")
    with pytest.raises(ConfigError, match="got 'far', wanted one of local, fp"):
        InsertCompensation(reference, batches, target="far")
    with pytest.raises(DataError, match="got a generator"):
        InsertCompensation(reference, (b for b in batches))
    other = qwt_fx.capture(randomize(Tower(1)), (batches[0],))
    with pytest.raises(PreconditionError, match="give the graph"):
        InsertCompensation(other, batches)(q)
    with pytest.raises(PreconditionError, match="has not been observed"):
        InsertCompensation(reference, batches)(qwt_fx.prepare(reference, CONFIG))


def test_graph_without_blocks_is_skipped() -> None:
    model = torch.nn.Linear(WIDTH, WIDTH)
    x = tokens()
    reference = qwt_fx.capture(model, (x,))
    q = observe(qwt_fx.prepare(reference, CONFIG), [x])
    (skip,) = InsertCompensation(reference, [x])(q).skips
    assert skip.reason.startswith("no block was found (residual sums of at least two linears")
