from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import op_sequence, tokens

import qwt_fx


class _Written(nn.Module):
    """RMSNorm as Hugging Face's models write it; `kind` breaks or varies one thing."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "cast":
            h = x.to(torch.float32)
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * h.to(x.dtype)
        if self.kind == "gemma":
            n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return n * (1.0 + self.weight)
        if self.kind == "square":
            return x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * x * self.weight
        if self.kind == "product":
            return torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * x
        if self.kind == "tokens":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6))
        if self.kind == "cube":
            return self.weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6))
        if self.kind == "read twice":
            inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * (x * inverse) + inverse
        if self.kind == "other":
            return self.weight * (x.neg() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("kind", ["plain", "cast", "square", "product", "gemma"])
def test_written_out_norm_becomes_one_operator(kind: str) -> None:
    model, x = _Written(kind).double() if kind != "cast" else _Written(kind), tokens()
    x = x.to(model.weight.dtype)
    gm = qwt_fx.capture(model, (x,))
    expected = ["add", "rms_norm"] if kind == "gemma" else ["rms_norm"]
    assert op_sequence(gm) == expected
    tolerance = 1e-6 if kind == "cast" else 1e-12
    torch.testing.assert_close(gm(x), model(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["tokens", "cube", "read twice", "other"])
def test_what_only_resembles_one_stays(kind: str) -> None:
    model, x = _Written(kind), tokens()
    gm = qwt_fx.capture(model, (x,))
    assert "rms_norm" not in op_sequence(gm)
    assert "rsqrt" in op_sequence(gm)
    assert torch.equal(gm(x), model(x))


def test_weight_behind_a_cast_stays_outside() -> None:
    model, x = _Written("cast").to(torch.bfloat16), tokens().to(torch.bfloat16)
    gm = qwt_fx.capture(model, (x,))
    assert op_sequence(gm) == ["to", "rms_norm", "to", "mul"]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-2, atol=1e-2)
