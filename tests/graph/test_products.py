"""Every overload of a product is one: quantized, or named with its reason; never passed over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qwt_fx
from qwt_fx.capture.capture import capture
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.nodes import compute_nodes
from qwt_fx.inspect.report import layer_rows

SIDES = (8, 6, 4)  # of maps


def _module(
    kind: Callable[..., nn.Module], sizes: int, **options: object
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return kind(3, 4, 3, **options).eval(), torch.randn(2, 3, *SIDES[:sizes])


@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_convolutions_with_padding_by_name(sizes: int, padding: str | int) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[sizes - 1]
    model, x = _module(kind, sizes, padding=padding)
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig(8, 8, recipe="repq-vit"))
    (row,) = layer_rows(q, "model")
    assert (row["w_bits"], row["a_bits"]) == ((8, 8) if sizes < 3 else (None, None))
    assert row["reason"] if sizes == 3 else row["reason"] is None
    torch.testing.assert_close(q(x), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_transposed_convolutions_are_listed(sizes: int) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[sizes - 1]
    model, x = _module(kind, sizes)
    assert len(list(compute_nodes(capture(model, (x,))))) == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_norms_behind_convolutions_padded_by_name_are_folded(norm: type[nn.Module]) -> None:
    sizes = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d).index(norm) + 1
    model, x = _module((nn.Conv1d, nn.Conv2d, nn.Conv3d)[sizes - 1], sizes, padding="same")
    gm = capture(nn.Sequential(model, norm(4)).eval(), (x,))
    assert [n.op for n in gm.graph.nodes].count("call_function") == 1
