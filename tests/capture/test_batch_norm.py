"""Batch norms of evaluation mode go; the function and the names of layers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from toys import op_sequence

import qwt_fx
from qwt_fx.graph.nodes import layer_name, weight_layers


def settled(model: nn.Module) -> nn.Module:
    """Norms with statistics and gains that are not the identity's; in float64."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        tensors = {**module._parameters, **module._buffers}
        for name in ("weight", "bias", "running_mean", "running_var"):
            if "Norm" in type(module).__name__ and tensors.get(name) is not None:
                tensors[name].data.uniform_(0.5, 2.0, generator=generator)
    return model.double().eval()


def checked(model: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """(operators, layers) of the captured model, which computes what the model does."""
    model, x = settled(model), x.double()
    before = copy.deepcopy(model.state_dict())
    gm = qwt_fx.capture(model, (x,))
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not [k for k in gm.state_dict() if "running" in k or "num_batches" in k]
    assert not any("batch_norm" in name for name in op_sequence(gm))
    return op_sequence(gm), [layer_name(n) for n in weight_layers(gm)]


X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
NORMS = [nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, affine=False), FrozenBatchNorm2d]


@pytest.mark.parametrize("norm", NORMS, ids=["plain", "no affine", "frozen"])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"bias": False, "padding": "same"}])
def test_goes_into_the_convolution_before(norm: type, options: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, **options), norm(8), nn.ReLU())
    assert checked(model, X) == (["conv2d", "relu"], ["0"])


def test_goes_into_the_linear_before_also_through_moves() -> None:
    class Linears(nn.Module):
        """As LeViT has them: the norm over (tokens, channels)."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5, bias=False), nn.Linear(5, 7)
            self.norm_a, self.norm_b = nn.BatchNorm1d(5), nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = self.norm_a(x.flatten(0, 1)).reshape_as(x)
            return self.norm_b(self.b(x).transpose(1, 2))

    operators, layers = checked(Linears(), X[:, 0])
    assert "addcmul" not in operators
    assert layers == ["a", "b"]


def test_tokens_in_dimension_1_are_not_the_channels_of_a_linear() -> None:
    operators, _ = checked(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), X[:, 0, :4])
    assert operators == ["linear", "addcmul"]


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_goes_into_the_convolution_behind_where_no_zeros_are_padded(
    padding: int, groups: int
) -> None:
    behind = nn.Conv2d(4, 6, 3, padding=padding, groups=groups)
    operators, layers = checked(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), behind), X)
    assert operators == (["relu", "addcmul", "conv2d"] if padding else ["relu", "conv2d"])
    assert layers == ["2"]


def test_parallel_branches_stay_and_one_without_a_layer_becomes_an_affine() -> None:
    class RepVgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.three, self.one = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            return self.norms[0](self.three(x)) + self.norms[1](self.one(x)) + self.norms[2](x)

    model = RepVgg()
    operators, layers = checked(model, X)
    assert operators == ["relu", "conv2d", "conv2d", "add", "addcmul", "add"]
    assert layers == ["three", "one"]
    state = qwt_fx.capture(model, (X.double(),)).state_dict()
    assert {"three.weight", "three.bias", "one.weight", "one.bias"} <= state.keys()


def test_a_layer_with_other_readers_or_called_twice_keeps_what_they_read() -> None:
    class Shared(nn.Module):
        """One convolution, a norm for each level, as detectors have; and one that is read raw."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.raw = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            raw = self.raw(x)
            return (
                self.norms[0](self.conv(x)) + self.norms[1](self.conv(x)) + self.norms[2](raw) * raw
            )

    operators, layers = checked(Shared(), X)
    assert operators.count("addcmul") == 1
    assert layers == ["raw", "conv", "conv@1"]


def test_a_norm_of_the_batchs_own_statistics_stays() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    gm = qwt_fx.capture(nn.Sequential(nn.Conv2d(4, 4, 1), norm).eval(), (X,))
    assert any("batch_norm" in name for name in op_sequence(gm))


def test_bfloat16_keeps_its_type() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    gm = qwt_fx.capture(model.bfloat16().eval(), (X.bfloat16(),))
    assert {v.dtype for v in gm.state_dict().values()} == {torch.bfloat16}
    assert gm(X.bfloat16()).dtype is torch.bfloat16
