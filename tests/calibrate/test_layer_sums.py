"""Sums over what each layer reads and misses, against numpy on values of runs from the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calibrate_watch import calibrated, linear, run_to, settings, watch
from toys import Tower, randomize, tokens

SAMPLES, LENGTH = 10, 5
BATCHES = [tokens(4, LENGTH, seed=0), tokens(6, LENGTH, seed=1)]
X = torch.cat(BATCHES)
HELD_OUT = np.repeat(np.arange(SAMPLES) % 5 == 4, LENGTH)  # the fifth and the tenth sample
LAYERS = ["q", "k", "v", "out", "fc1", "fc2"]


def _rows(value: torch.Tensor) -> np.ndarray:
    return value.detach().double().reshape(-1, value.shape[-1]).numpy()


def _missing(walk: Any, layer: Any, local: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a layer reads, rounded, and what its output misses, (tokens, channels) each."""
    quantizer = layer.args[0]
    read, rounded = (_rows(run_to(walk.gm, n, X)) for n in (quantizer.args[0], quantizer))
    weight = layer.args[1].args[0] if layer.args[1].op == "call_module" else layer.args[1]
    weight = _rows(run_to(walk.gm, weight, X))
    bias = 0.0
    if len(layer.args) > 2 and layer.args[2] is not None:
        bias = run_to(walk.gm, layer.args[2], X).detach().double().numpy()
    if local:
        return rounded, (read - rounded) @ weight.T
    twin = linear(walk.reference, layer.meta["layer"])
    wanted = _rows(run_to(walk.reference, twin, X))
    if twin.meta["layer"].rpartition(".")[2] in ("out", "fc2"):  # they add to the residual stream
        for graph, node, sign in ((walk.reference, twin, 1.0), (walk.gm, layer, -1.0)):
            (total,) = node.users
            (residual,) = (a for a in total.args if a is not node)
            wanted = wanted + sign * _rows(run_to(graph, residual, X))
    return rounded, wanted - rounded @ weight.T - bias


@pytest.mark.parametrize("local", [True, False])
def test_sums_are_those_of_what_is_read_rounded_and_what_is_missed(
    local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def compare(walk: Any, group: Any, layers: Any, sums: Any) -> None:
        for layer in layers:
            names.append(layer.meta["layer"])
            x, t = _missing(walk, layer, local)
            for which, rows in zip(sums[layer], (~HELD_OUT, HELD_OUT), strict=True):
                assert which.count == int(rows.sum())
                for found, wanted in (
                    (which.gram, x[rows].T @ x[rows]),
                    (which.cross, x[rows].T @ t[rows]),
                    (which.x, x[rows].sum(axis=0)),
                    (which.t, t[rows].sum(axis=0)),
                ):
                    scale = np.abs(wanted).max()
                    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4 * scale)
                assert which.square == pytest.approx((t[rows] ** 2).sum(), rel=1e-4)

    watch(monkeypatch, compare)
    model = randomize(Tower(1 if local else 2))
    # Rescales and new weights in front of a layer must not change what its own sums are of.
    chosen = settings(
        target="local" if local else "fp", reparameterization=0.5, refit=True, bias_correction=True
    )
    calibrated(model, BATCHES, chosen, (4, 4))
    assert names == [f"blocks.{i}.{n}" for i in range(1 if local else 2) for n in LAYERS]


def test_nothing_is_held_out_where_no_sample_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[int, int]] = []

    def note(walk: Any, group: Any, layers: Any, sums: Any) -> None:
        counts.extend((sums[n][0].count, sums[n][1].count) for n in layers)

    watch(monkeypatch, note)
    calibrated(randomize(Tower(1)), BATCHES, settings(hold_out=0.0))
    assert counts == [(SAMPLES * LENGTH, 0)] * 6


def test_a_layer_with_more_inputs_than_outputs_sums_a_fixed_part_of_the_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At least 4,096 tokens and tokens_per_input for each input, the same part of every batch."""
    counts: dict[str, tuple[int, int]] = {}
    grams: list[torch.Tensor] = []

    def note(walk: Any, group: Any, layers: Any, sums: Any) -> None:
        for layer in layers:
            fit, judge = sums[layer]
            counts[layer.meta["layer"]] = (fit.count, judge.count)
            if layer.meta["layer"] == "1":
                grams.append(fit.gram + judge.gram)

    watch(monkeypatch, note)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)).eval()
    batches = [tokens(32, 80, 4, seed=s) for s in (0, 1)]  # 2,560 each
    for _ in range(2):
        calibrated(model, batches, settings())
    assert sum(counts["0"]) == 5120 and counts["0"][1] == 12 * 80
    assert sum(counts["1"]) == 4096 and 0 < counts["1"][1] < 12 * 80
    assert torch.equal(*grams)
    calibrated(model, batches, settings(tokens_per_input=600))  # 8 inputs
    assert sum(counts["1"]) == 4800
