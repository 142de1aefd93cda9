from __future__ import annotations

import torch
from torch import Tensor, nn

import qwt_fx
from qwt_fx.graph.nodes import weight_layers
from qwt_fx.graph.sample_ids import batch_axis, sample_ids
from qwt_fx.numerics.hold_out import held_out_samples


class _Flattened(nn.Module):
    """Rows in the order of `axis`: samples first, or positions first as attention modules have them."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1.0
        if self.turned:
            x = x.transpose(0, 1).contiguous()
        return self.linear(x.reshape(-1, 4))


def test_rows_of_both_orders_are_told_apart() -> None:
    for turned in (False, True):
        gm = qwt_fx.capture(_Flattened(turned), (torch.randn(2, 5, 4),))
        (layer,) = weight_layers(gm)
        ids = sample_ids(layer.args[0], (15, 4), 3)
        assert ids is not None
        expected = torch.arange(3).repeat(5) if turned else torch.arange(3).repeat_interleave(5)
        assert torch.equal(ids, expected)


def test_a_batch_dimension_is_found_wherever_it_is() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1) * 2.0

    gm = qwt_fx.capture(Model(), (torch.randn(2, 5, 4),))
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [batch_axis(n) for n in nodes] == [1, 1]
    ids = sample_ids(nodes[-1], (5, 3, 4), 3)
    assert ids is not None
    assert ids.tolist() == [0, 1, 2] * 5


def test_what_cannot_be_followed_is_unknown() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.reshape(-1, 4) * 2.0).reshape(-1, 4)

    gm = qwt_fx.capture(Model(), (torch.randn(2, 5, 4),))
    last = [n for n in gm.graph.nodes if n.op == "call_function"][-1]
    assert sample_ids(last, (15, 4), 3) is None


def test_held_out_samples_are_spread() -> None:
    assert held_out_samples(10, 0.2).nonzero().flatten().tolist() == [4, 9]
