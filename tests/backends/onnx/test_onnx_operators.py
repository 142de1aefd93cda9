"""Our ONNX translations give the codes that PyTorch's operators give, saturated inputs included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qwt_fx.numerics.qparams import quantize_log_sqrt2
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao

onnxruntime = pytest.importorskip("onnxruntime")
from qwt_fx.backends.onnx.operators import OPSET, translations  # noqa: E402


class PerTensor(nn.Module):
    def __init__(self, scale: float, zero_point: int, bits: int) -> None:
        super().__init__()
        self.qparams = (scale, zero_point, 0, 2**bits - 1, torch.uint8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch_ao.QUANTIZE_PER_TENSOR(x, *self.qparams)
        return codes, torch_ao.DEQUANTIZE_PER_TENSOR(codes, *self.qparams)


class PerChannel(nn.Module):
    def __init__(self, scales: Tensor, zero_points: Tensor, axis: int, bits: int) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)
        self.axis, self.limits = axis, (0, 2**bits - 1, torch.uint8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        qparams = (self.scales, self.zero_points, self.axis, *self.limits)
        codes = torch_ao.QUANTIZE_PER_CHANNEL(x, *qparams)
        return codes, torch_ao.DEQUANTIZE_PER_CHANNEL(codes, *qparams)


class LogSqrt2(nn.Module):
    def __init__(self, scale: float, bits: int) -> None:
        super().__init__()
        self.scale, self.bits = scale, bits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ops.QUANTIZE_LOG_SQRT2(x, self.scale, self.bits)
        return codes, ops.DEQUANTIZE_LOG_SQRT2(codes, self.scale, self.bits)


def run(model: nn.Module, x: Tensor, folder: Path) -> list[np.ndarray[Any, Any]]:
    """The model's outputs in ONNX Runtime, without its own rewrites."""
    program = torch.onnx.export(
        torch.export.export(model, (x,)),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        custom_translation_table=translations(OPSET),
    )
    path = folder / "model.onnx"
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray[Any, Any]] = session.run(
        None, {session.get_inputs()[0].name: x.numpy()}
    )
    return outputs


def wide(rows: int = 64, columns: int = 96, spread: float = 3.0) -> Tensor:
    """Values of which many lie far outside of any range used here, and 0."""
    x = spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    x[0, :4] = torch.tensor([0.0, 1e9, -1e9, -0.0])
    return x


@pytest.mark.parametrize(("bits", "place"), [(8, 0.5), (6, 0.0), (6, 0.3), (4, 1.0)])
def test_codes_are_pytorchs_and_saturate_at_the_limits_of_the_bits(
    bits: int, place: float, tmp_path: Path
) -> None:
    last = 2**bits - 1
    scale, zero_point = 2.1 / last, round(place * last)
    x = wide()
    codes, values = run(PerTensor(scale, zero_point, bits), x, tmp_path)
    # By the definition, in float64; where x / s lies next to .5, either neighbour is right.
    exact = x.double().numpy() / np.float32(scale).astype(np.float64)
    tie = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 1e-4
    expected = np.clip(np.round(exact) + zero_point, 0, last)
    assert (codes == expected)[~tie].all()
    assert tie.mean() < 0.01
    # What PyTorch's own exporter gets wrong: it would use all of uint8.
    assert (codes.min(), codes.max()) == (0, last)
    np.testing.assert_array_equal(
        values, (codes.astype(np.float32) - zero_point) * np.float32(scale)
    )


@pytest.mark.parametrize(("bits", "axis"), [(8, 0), (4, 1)])
def test_quantizers_per_channel(bits: int, axis: int, tmp_path: Path) -> None:
    x = wide(16, 24)
    channels = x.shape[axis]
    generator = torch.Generator().manual_seed(bits)
    scales = 0.01 + 0.1 * torch.rand(channels, generator=generator)
    zeros = torch.randint(0, 2**bits, (channels,), generator=generator)
    model = PerChannel(scales, zeros, axis, bits)
    codes, values = run(model, x, tmp_path)
    expected_codes, expected = model(x)
    assert (codes != expected_codes.numpy()).mean() < 0.005  # ties
    same = codes == expected_codes.numpy()
    np.testing.assert_array_equal(values[same], expected.numpy()[same])


@pytest.mark.parametrize("bits", [8, 4])
def test_log_sqrt2_gives_the_same_codes_and_values(bits: int, tmp_path: Path) -> None:
    x = torch.softmax(wide(spread=4.0).clamp(-60, 60), dim=-1)
    x[1, :3] = torch.tensor([0.0, 1.0, 1e-30])
    codes, values = run(LogSqrt2(0.61, bits), x, tmp_path)
    expected = quantize_log_sqrt2(x, 0.61, bits).numpy()
    difference = np.abs(codes.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert codes[1, 0] == 2**bits - 1
    steps = np.arange(2**bits)
    table = 0.61 * 2.0 ** (-steps / 2.0)
    table[-1] = 0.0
    np.testing.assert_allclose(values, table[codes], rtol=1e-6)
