"""Ranges of whole groups against the best of a fine grid, by brute force on every calibration value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibrate_watch import calibrated, linear, run_to, settings
from torch import Tensor, nn
from toys import Sequence, Tower, randomize, tokens

from qwt_fx.config.layer_settings import STRENGTHS
from qwt_fx.errors import DataError
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_of

LEVELS = 15  # 4 bits


class Normed(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def _input(gm: torch.fx.GraphModule, name: str, x: Tensor) -> tuple[FakeQuant, np.ndarray]:
    """The quantizer a linear reads, and the values it reads, (tokens, channels)."""
    node = linear(gm, name).args[0]
    value = run_to(gm, node.args[0], x).detach()
    return fake_quant_of(gm, node), value.double().reshape(-1, value.shape[-1]).numpy()


def _error(x: np.ndarray, scale: float, zero: float, weight: np.ndarray) -> float:
    """Squared error of rounding, each channel's as often as it weighs."""
    rounded = scale * (np.clip(np.round(x / scale) + zero, 0, LEVELS) - zero)
    return float((((rounded - x) ** 2) * weight).sum())


def _best(x: np.ndarray, weight: np.ndarray) -> float:
    """The least error of ranges that reach parts of the extremes, zero among the codes."""
    errors = []
    for low in np.linspace(0.0, 1.0, 26) * min(x.min(), 0.0):
        for high in np.linspace(0.0, 1.0, 26) * max(x.max(), 0.0):
            if high > low:
                scale = (high - low) / LEVELS
                errors.append(_error(x, scale, np.clip(np.round(-low / scale), 0, LEVELS), weight))
    return min(errors)


def _heavy_tailed(seed: int) -> Tensor:
    x = (1.5 * tokens(8, 6, seed=seed)).sinh()
    x[..., :2] *= 8.0
    return x


def _columns(weight: Tensor) -> np.ndarray:
    return weight.detach().double().square().sum(dim=0).numpy()


@pytest.mark.parametrize("output", [False, True])
def test_a_range_is_the_best_for_the_tensor_or_for_the_layers_output(output: bool) -> None:
    model = nn.Linear(16, 8).eval()
    model.weight.data[:, :2] *= 1e-3  # the large channels are hardly read
    batches = [_heavy_tailed(s) for s in range(3)]
    gm = calibrated(
        nn.Sequential(model), batches, settings(ranges="output" if output else "tensor")
    )
    module, x = _input(gm, "0", torch.cat(batches))
    ones, read = np.ones(16), _columns(model.weight)
    weight, other = (read, ones) if output else (ones, read)
    found = float(module.scale), float(module.zero_point)
    assert _error(x, *found, weight) <= 1.03 * _best(x, weight)
    assert _error(x, *found, other) > 1.2 * _best(x, other)  # the two are not alike
    assert module.spec.ch_axis is None


def test_layers_that_read_one_value_share_the_range_that_serves_them_together() -> None:
    class Two(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.other(x)

    model = randomize(Two())
    model.linear.weight.data[:, :2] *= 1e-3
    model.other.weight.data[:, 2:] *= 1e-2
    batches = [_heavy_tailed(s) for s in range(2)]
    gm = calibrated(model, batches, settings(ranges="output"))
    module, x = _input(gm, "linear", torch.cat(batches))
    assert _input(gm, "other", batches[0])[0] is module
    weight = _columns(model.linear.weight) + _columns(model.other.weight)
    assert _error(x, float(module.scale), float(module.zero_point), weight) <= 1.03 * _best(
        x, weight
    )


def test_every_batch_has_a_part_in_a_range() -> None:
    batches = [tokens(4, 6, seed=s) for s in range(3)]
    batches[2] = 20.0 * batches[2].abs()
    gm = calibrated(nn.Sequential(nn.Linear(16, 8)).eval(), batches, settings(), (16, 8))
    module = fake_quant_of(gm, linear(gm, "0").args[0])
    low, high = min(float(b.min()) for b in batches), max(float(b.max()) for b in batches)
    reached = float(module.scale) * (255.0 - float(module.zero_point))
    assert 0.5 * high < reached <= 1.3 * high
    assert -float(module.scale) * float(module.zero_point) <= 0.3 * low


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_as_much_of_the_channels_differences_moves_into_the_norm_as_is_said(
    strength: float,
) -> None:
    model = randomize(Normed())
    batches = [tokens(64, 9, seed=s) for s in range(2)]
    x = torch.cat(batches)
    gm = calibrated(model, batches, settings(reparameterization=strength))
    module, moved = _input(gm, "linear", x)
    plain = model.norm(x).detach().double().reshape(-1, 16).numpy()
    width, before = (np.log(np.ptp(v, axis=0)) for v in (moved, plain))
    # The widths' logarithms keep 1 - strength of what sets them apart; widths are known to a bit.
    spread = (width - width.mean()) - (1.0 - strength) * (before - before.mean())
    assert np.abs(spread).max() < (1e-5 if strength == 0.0 else 0.45)
    assert np.std(before) > 0.6
    weight = np.ones(16)
    assert _error(moved, float(module.scale), float(module.zero_point), weight) <= 1.06 * _best(
        moved, weight
    )


def test_the_strength_chosen_leaves_the_least_error_of_the_output() -> None:
    model = randomize(Normed())
    model.norm.bias.data.mul_(4.0)
    batches = [tokens(64, 9, seed=s) for s in range(2)]
    x = torch.cat(batches)

    def left(strength: float | str) -> float:
        gm = calibrated(model, batches, settings(reparameterization=strength, ranges="output"))
        with torch.no_grad():
            return float((gm(x) - model(x)).square().sum())

    alone = [left(s) for s in STRENGTHS]
    assert max(alone) > 1.5 * min(alone)
    assert left("search") <= 1.05 * min(alone)


def test_a_value_that_something_else_reads_is_not_moved() -> None:
    class Shared(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            return self.linear(n) + n

    model = randomize(Shared())
    batches = [tokens(16, 9, seed=s) for s in range(2)]
    gm = calibrated(model, batches, settings(reparameterization=1.0))
    _module, x = _input(gm, "linear", batches[0])
    np.testing.assert_allclose(x, model.norm(batches[0]).detach().reshape(-1, 16), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN or infinite values in the tensor to quantize"),
        (float("inf"), "NaN or infinite values in the tensor to quantize"),
        (2.0**25, r"values up to 3\.35544e\+07 in the tensor to quantize, wanted at most 2\^24"),
    ],
)
def test_values_that_no_range_can_hold_are_refused(value: float, words: str) -> None:
    batches = [tokens(4, 6, seed=s) for s in range(2)]
    batches[1][2, 3, 4] = value
    with pytest.raises(DataError, match=f"0.input: {words}"):
        calibrated(nn.Sequential(nn.Linear(16, 8)).eval(), batches, settings())


def test_the_values_of_attention_are_moved_where_that_is_asked_for() -> None:
    model = randomize(Tower(1))
    scale = torch.exp(2.0 * torch.randn(16, generator=torch.Generator().manual_seed(0)))
    model.blocks[0].v.weight.data *= scale[:, None]
    model.blocks[0].v.bias.data *= scale
    model.blocks[0].out.weight.data /= scale
    batches = [tokens(32, 9, seed=s) for s in range(2)]
    widths = {}
    for fold in (False, True):
        gm = calibrated(model, batches, settings(reparameterization=1.0, fold_values=fold))
        _, x = _input(gm, "blocks.0.out", torch.cat(batches))
        widths[fold] = np.std(np.log(np.ptp(x, axis=0)))
    assert widths[False] > 1.2
    assert widths[True] < 0.35
