"""What depends on parameters alone is computed once; what is stored small stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qwt_fx
from qwt_fx.backends.constant_folding import fold_constants


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 3, 9, 9))
        self.table = nn.Parameter(torch.randn(5))
        self.register_buffer("pairs", torch.arange(4 * 9 * 9) % 5)
        self.stored_half = nn.Parameter(torch.randn(9).half())

    def forward(self, x: Tensor) -> Tensor:
        size = [4, 4]
        grid = nn.functional.interpolate(self.positions, size=size, mode="bicubic")
        low, high = (self.positions * 2.0).chunk(2, dim=2)  # several tensors of one constant
        x = x + grid.repeat(1, 1, 2, 2) + low[:, :, :1, :1].sum() - high.sum()
        moved = self.positions.transpose(2, 3)[:, :, :8, :8] + x
        return moved + self.stored_half.float()[:8]


def test_constants_are_folded_and_what_is_stored_small_is_not() -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 3, 8, 8)
    gm = qwt_fx.capture(model, (x,))
    expected = gm(x)
    assert fold_constants(gm)
    assert torch.equal(gm(x), expected)
    left = {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}
    assert not any(word in name for name in left for word in ("upsample", "repeat", "chunk", "sum"))
    assert {"aten.transpose.int", "aten.to.dtype"} <= left
    assert any(tensor.dtype is torch.float16 for tensor in gm.state_dict().values())
    assert fold_constants(gm) == []


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))
        self.register_buffer("index", torch.arange(4) % 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[self.index].repeat(500)


def test_what_would_be_stored_far_larger_is_computed_each_time() -> None:
    x = torch.randn(2, 2000)
    gm = qwt_fx.capture(Pairs().eval(), (x,))
    assert fold_constants(gm) == []
