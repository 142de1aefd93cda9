from __future__ import annotations

import torch
from torch import Tensor, nn
from toys import op_sequence, tokens

import qwt_fx
from qwt_fx.graph.constants import constant_tensor


class _Pads(nn.Module):
    def __init__(self, amount: int) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 0, 0, self.amount)) * 2


def test_pad_by_nothing_is_removed_and_a_real_one_stays() -> None:
    x = tokens()
    assert op_sequence(qwt_fx.capture(_Pads(0), (x,))) == ["mul"]
    gm = qwt_fx.capture(_Pads(2), (x,))
    assert op_sequence(gm) == ["pad", "mul"]
    assert torch.equal(gm(x), _Pads(2)(x))


class _Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1) + 1


def test_view_works_on_another_layout_of_the_same_values() -> None:
    """A kernel of another device may return a transposed layout, on which a view is illegal."""
    x = tokens()
    gm = qwt_fx.capture(_Views(), (x,))
    assert op_sequence(gm) == ["sym_size", "reshape", "add"]
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gm(transposed), x.flatten(1) + 1)


def test_constant_tensor_is_the_value_and_none_where_an_input_counts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(16.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.cat([self.weight[:8], -self.weight[8:]])

    model, x = Model(), tokens()
    gm = qwt_fx.capture(model, (x,))
    (product,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    value = constant_tensor(gm, product.args[1])
    assert value is not None
    assert value.tolist() == [*range(8), *(-n for n in range(8, 16))]
    assert not value.requires_grad
    assert constant_tensor(gm, product) is None
    assert constant_tensor(gm, 3.0) is None
