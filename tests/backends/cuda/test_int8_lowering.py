"""Layers that read the same codes are one product: its weight is theirs, rows one below the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends.cuda.int8_gemm import INT8_LINEAR
from qwt_fx.backends.cuda.int8_lowering import Int8Lowering, groups_of, why_not
from qwt_fx.backends.lowering import integer_layers
from qwt_fx.graph.nodes import tensor_of


class Two(nn.Module):
    """The first weight spans more than int8 around its zero point, the second is symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 3), nn.Linear(16, 2, bias=False)
        values = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(0))
        values[:, 0], values[:, 1] = 0, 255
        with torch.no_grad():
            self.a.weight.copy_(values[:3] / 100)
            self.b.weight.copy_((values[3:] - 128) / 100)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def test_weights_with_and_without_a_correction_are_stacked() -> None:
    x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(1))
    q = qwt_fx.quantize(Two(), (x,), [(x,)], QuantConfig(recipe="repq-vit"))
    with torch.no_grad():
        expected = q(x)
    (group,) = groups_of(q, integer_layers(q, why_not))
    assert [layer.weight.signed() is None for layer in group] == [True, False]
    exact = torch.cat(
        [layer.weight.codes.long() - layer.weight.zero_point.long()[:, None] for layer in group]
    )
    Int8Lowering(q, "triton").lower(group)
    (product,) = q.graph.find_nodes(op="call_function", target=INT8_LINEAR)
    weight, shift = (tensor_of(q, product.args[i]) for i in (1, 6))
    assert weight is not None
    assert shift is not None
    assert torch.equal(weight.long() - shift.long()[:, None], exact)
    assert shift[3:].tolist() == [0, 0]
    q.graph.eliminate_dead_code()
    q.recompile()
    with torch.no_grad():
        torch.testing.assert_close(q(x), expected, rtol=1e-5, atol=1e-5)
