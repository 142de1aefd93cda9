"""The two graphs in step: what is held at a group is what a run from the inputs gives there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrate_watch import calibrated, linear, run_to, settings, watch
from torch import Tensor, nn
from toys import Block, Tower, randomize, tokens

from qwt_fx.config.compensation_kind import CompensationSettings

BATCHES = [tokens(12, 5, seed=s) for s in range(2)]


def _close(held: Tensor, fresh: Tensor) -> None:
    """To the rounding that a rescale of held values adds."""
    torch.testing.assert_close(held, fresh, rtol=1e-4, atol=1e-5 * float(fresh.abs().max()))


def _watch_values(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compare what both graphs hold with fresh runs at each group; the layers compared."""
    seen: list[str] = []

    def compare(walk: Any, group: Any, layers: Any, sums: Any) -> None:
        for index, x in enumerate(BATCHES):
            _close(walk.values(group.source)[index], run_to(walk.gm, group.source, x))
        for layer in layers:
            name = layer.meta["layer"]
            seen.append(name)
            twin = linear(walk.reference, name)
            assert walk.twin(layer) is twin
            # An input may have been divided meanwhile: it still stands for the same value.
            assert walk.twin(group.source) is twin.args[0]
            if walk.settings.target == "local":
                continue
            for index, x in enumerate(BATCHES):
                wanted = run_to(walk.reference, twin, x)
                missing = walk.missing_in_sum(layer, index)
                if missing is None:
                    _close(walk.floating_output(layer, index), wanted)
                else:
                    (total,), (ours,) = twin.users, layer.users
                    (residual,) = (a for a in ours.args if a is not layer)
                    sum_there = run_to(walk.reference, total, x)
                    _close(missing, sum_there - run_to(walk.gm, residual, x))

    watch(monkeypatch, compare)
    return seen


LAYERS = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("q", "k", "v", "out", "fc1", "fc2")]


@pytest.mark.parametrize("target", ["local", "fp"])
def test_values_held_are_those_of_a_run_from_the_inputs(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While scales move into norms and values, weights are refitted and rounded."""
    seen = _watch_values(monkeypatch)
    chosen = settings(
        target=target, reparameterization=0.75, fold_values=True, refit=True,
        bias_correction=True,
    )  # fmt: skip
    calibrated(randomize(Tower(2)), BATCHES, chosen, (4, 4))
    assert seen == LAYERS


def test_values_behind_a_product_put_into_the_graph_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = randomize(Tower(1))
    for block in model.blocks:
        block.fc1.weight.data[:8] *= 30.0
        block.fc1.bias.data[:8] *= 30.0
        block.fc2.weight.data[:, :8] /= 30.0
    seen = _watch_values(monkeypatch)
    gm = calibrated(
        model, BATCHES, settings(input_scales=True, reparameterization=1.0, target="fp")
    )
    products = list(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor))
    assert products
    assert seen == LAYERS[:6]


@pytest.mark.parametrize("kind", ["qwt", "affine"])
def test_values_behind_a_compensated_block_are_those_of_the_graph_with_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _watch_values(monkeypatch)
    gm = calibrated(
        randomize(Tower(2)), BATCHES, settings(target="fp"), (3, 8),
        compensation=CompensationSettings(kind, "fp"),
    )  # fmt: skip
    assert seen == LAYERS
    applied = [c["applied"] for c in gm.meta["qwt_fx"].compensations.values()]
    assert applied[0]  # the second block reads what the first one's compensation made


def test_both_graphs_let_go_of_everything_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Any] = []
    watch(monkeypatch, lambda walk, *rest: walks.append(walk))
    calibrated(randomize(Tower(1)), BATCHES, settings(target="fp"))
    first = walks[0]
    for runner in (first._quantized, first._floating):
        assert [len(held) for held in runner.envs] == [0, 0]


def test_a_value_is_held_no_longer_than_something_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stream, the value a group reads, and its copies of another shape: not a block's worth."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    held: list[int] = []
    watch(monkeypatch, lambda walk, *rest: held.append(len(walk._quantized.envs[0])))
    calibrated(randomize(Deep()), BATCHES, settings())
    assert len(held) == 3 * 4
    assert max(held) <= 3
