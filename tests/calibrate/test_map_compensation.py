"""Blocks of convolutions: QwT's linear takes the channels of maps (n, c, h, w)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import Stages

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.channel_axis import channel_axes
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node
from qwt_fx.graph.runner import computed, evaluate, start
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.passes import InsertCompensation

X = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NAMES = ["stages.0.0", "stages.0.1", "stages.1.1"]


def _graph() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return qwt_fx.capture(Stages().eval(), (X[:2],))


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["repq-vit", "best"])
@pytest.mark.parametrize("kind", ["qwt", "lowrank:2"])
def test_maps_are_compensated_and_nearer_to_the_model(
    recipe: str, kind: str, tmp_path: Path
) -> None:
    gm = _graph()
    config = QuantConfig(2, 8, recipe=recipe, compensation=kind)
    q = qwt_fx.quantize(gm, (X,), [X[:12], X[12:]], config)
    applied = qwt_fx.compensations(q)
    assert applied.keys() <= set(NAMES)
    assert len(applied) >= (2 if recipe == "repq-vit" else 1)
    for name, found in applied.items():
        width = 8 if name.startswith("stages.0") else 16
        assert found["W"].shape == (width, width)
        assert found["b"].shape == (width,)
    if recipe == "repq-vit":
        without = qwt_fx.quantize(gm, (X,), [X], config.replace(compensation="none"))
        assert sqnr_db(gm(X), q(X)) > sqnr_db(gm(X), without(X)) + 0.2
    qwt_fx.save(q, tmp_path / "artifact")
    loaded = qwt_fx.load(tmp_path / "artifact")
    assert torch.equal(loaded(X), q(X))
    assert qwt_fx.compensations(loaded).keys() == applied.keys()
    assert sqnr_db(q(X), qwt_fx.lower(loaded, "x86")(X)) > 40.0


@torch.no_grad()
def test_the_fit_is_least_squares_over_the_pixels() -> None:
    """With nothing held out: the error left is orthogonal to the block's input, pixel by pixel."""
    gm = _graph()
    plain = qwt_fx.calibrate(qwt_fx.prepare(gm, QuantConfig(2, 8, recipe="repq-vit")), [X])
    (first, *_) = graph_info(gm).blocks

    def values(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
        blocks = graph_info(graph).blocks
        nodes = [find_node(graph, n) for n in (blocks[0].input, blocks[0].output)]
        env = evaluate(graph, computed(graph), start(graph, X), keep=set(nodes))
        return [env[n].movedim(1, -1).flatten(0, 2).double() for n in nodes]

    InsertCompensation(gm, [X], target="fp", hold_out=0.0, half=False)(plain)
    (x, y), (_, wanted) = values(plain), values(gm)
    left = wanted - y
    assert first.name == NAMES[0]
    assert float((x.T @ left).abs().max()) < 1e-4 * float((x.T @ wanted).abs().max())


@pytest.mark.parametrize("kind", ["int8", "affine"])
def test_kinds_for_linears_say_what_to_take_instead(kind: str) -> None:
    config = QuantConfig(4, 8, recipe="repq-vit", compensation=kind)
    why = r"channels in dimension 1, not in the last: compensate it by 'qwt' or 'lowrank:R' \(3\)"
    with pytest.warns(UserWarning, match=why):
        qwt_fx.quantize(_graph(), (X,), [X], config)


def test_channels_are_followed_through_moves() -> None:
    class Mixed(torch.nn.Module):
        """Maps to tokens, a norm and an MLP, and back."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 1), torch.nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            tokens = self.norm(x.flatten(2).transpose(1, 2))
            return x + tokens.transpose(1, 2).unflatten(2, (4, 4)).relu()

    gm = qwt_fx.capture(Mixed(), (X[:, :, :4, :4],))
    axes = [axis for _, axis in sorted(channel_axes(gm).items(), key=lambda item: item[0])]
    assert axes == [1, 1, 2, 2, 1, 1, 1, 1]
