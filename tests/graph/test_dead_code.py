"""What nothing reads goes, whatever torch.fx takes for impure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.graph.nodes import compute_nodes, layer_name


class Earlier(nn.Module):
    """Reads the value before the last block, as `hidden_states[-2]` does."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        states = [self.tower.norm_pre(x)]
        for block in self.tower.blocks:
            states.append(block(states[-1]))
        return states[-2]


def test_layers_behind_what_is_read_are_neither_calibrated_nor_kept() -> None:
    tower, x = randomize(Tower(3)), tokens(4)
    gm = qwt_fx.capture(Earlier(tower), (x,))
    shorter = qwt_fx.capture(randomize(Tower(2)), (x,))
    assert len(list(compute_nodes(gm))) == len(list(compute_nodes(shorter))) == 14
    assert not any("blocks.2" in name for name in gm.state_dict())
    assert not any(layer_name(node).startswith("tower.blocks.2") for node in compute_nodes(gm))
    q = qwt_fx.quantize(gm, (x,), [x], QuantConfig(8, 8, recipe="repq-vit"))
    assert not any("blocks.2" in row["name"] for row in qwt_fx.report(q)["layers"])
    assert torch.equal(gm(x), Earlier(tower)(x))


DEAD: dict[str, Callable[[Tensor], object]] = {
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, False)[0],
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
    "random": torch.rand_like,
    "in place": lambda x: x.clone().add_(1),
    "copy": lambda x: torch.empty_like(x).copy_(x),
    "bernoulli": torch.bernoulli,
    "multihead": lambda x: F.softmax(x @ x.transpose(1, 2), -1) @ x,
}


@pytest.mark.parametrize("kind", DEAD)
def test_an_unused_value_of_every_kind_goes(kind: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            DEAD[kind](x.sigmoid())
            return x + 1

    gm = qwt_fx.capture(Model(), (tokens(),))
    calls = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.add.Tensor"]
