"""The operator: exact by torch._int_mm, visible to compilers, the same on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from qwt_fx.backends.cuda.epilogue import ACTIVATIONS, Epilogue
from qwt_fx.backends.cuda.int8_gemm import INT8_LINEAR, by_int_mm
from qwt_fx.errors import PreconditionError

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def _operands(
    lead: tuple[int, ...] = (2, 19), columns: int = 37, inner: int = 45, device: str = "cpu"
) -> list[Any]:
    generator = torch.Generator().manual_seed(columns)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    values = [
        integers(-128, 128, *lead, inner).to(torch.int8),
        integers(-128, 128, columns, inner).to(torch.int8),
        integers(1, 100, columns) * 2e-4 / inner,
        integers(-9999, 9999, columns).int(),
        integers(-50, 50, columns) / 50,
        2.0 ** integers(-2, 3, lead[-1], 1),
        integers(-128, 128, columns).int(),
        integers(-128, 128, *lead, 1).int(),
    ]
    return [v.to(device) for v in values]


def _exact(
    codes: Tensor, weight: Tensor, scale: Tensor, offset: Tensor,
    bias: Tensor | None, rows: Tensor | None, shift: Tensor | None, zeros: Tensor | None,
) -> Tensor:  # fmt: skip
    """Before the activation, float64, with a loop over nothing but the formula."""
    difference = weight.long() - (0 if shift is None else shift.long()[:, None])
    offset = offset.long() * (1 if zeros is None else zeros.long())
    y = (codes.long() @ difference.T + offset).double() * scale.double()
    y = y * (1.0 if rows is None else rows.double())
    return y + (0.0 if bias is None else bias.double())


def _call(
    operands: list[Any],
    *,
    activation: str = "none",
    gemm: str = "triton",
    dtype: torch.dtype = torch.float32,
    quantizer: Any = (None, 0, -128, 127),
) -> Tensor:
    result: Tensor = INT8_LINEAR(*operands, dtype, activation, *quantizer, gemm)
    return result


def _activation(y: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    if name == "none":
        return y
    return nn.functional.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")


def _assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype
    last_bit = torch.finfo(dtype).eps / 2
    assert float((got.double() - exact).abs().max() / exact.abs().max()) < last_bit + 2e-6


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("absent", [(), (4,), (5,), (6,), (7,), (4, 5, 6, 7)])
def test_the_cpu_computes_the_formula(
    dtype: torch.dtype, activation: str, absent: tuple[int, ...]
) -> None:
    operands = [None if i in absent else v for i, v in enumerate(_operands())]
    got = _call(operands, activation=activation, dtype=dtype)
    _assert_close(got, _activation(_exact(*operands), activation), dtype)


def test_int_mm_is_exact_at_the_extremes() -> None:
    """Some CPUs add pairs of products in int16, which saturates."""
    for a in (-128, 127):
        for w in (-128, 127):
            codes = torch.full((3, 3072), a, dtype=torch.int8)
            weight = torch.full((5, 3072), w, dtype=torch.int8)
            assert torch._int_mm(codes, weight.t()).unique().tolist() == [3072 * a * w]


def test_quantized_results_are_those_of_the_quantize_operator() -> None:
    operands = _operands()
    floating = _call(operands, activation="quick_gelu")
    scale, limits = 0.005, (-100, -128, -65)
    expected = torch.ops.quantized_decomposed.quantize_per_tensor(
        floating, scale, *limits, torch.int8
    )
    got = _call(operands, activation="quick_gelu", dtype=torch.int8, quantizer=(scale, *limits))
    assert torch.equal(got, expected)
    assert {-128, -65} <= set(got.unique().tolist())


def test_an_unknown_activation_is_refused() -> None:
    operands = _operands(lead=(3,))
    operands[5] = operands[7] = None
    with pytest.raises(PreconditionError, match=r"activation 'swish', wanted one of none, gelu"):
        by_int_mm(*operands, Epilogue(torch.float32, "swish"))


def test_the_operator_is_well_formed_and_compilers_see_into_it() -> None:
    operands = _operands()
    torch.library.opcheck(
        INT8_LINEAR, (*operands, torch.float16, "gelu", None, 0, -128, 127, "triton")
    )

    def function(codes: Tensor) -> Tensor:
        return _call([codes, *operands[1:]], activation="quick_gelu")

    graphs: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(gm.graph))
        return gm

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    assert torch.equal(compiled(operands[0]), function(operands[0]))
    assert "_int_mm" in graphs[0]
    assert "int8_linear" not in graphs[0]


def test_fake_tensors_of_a_gpu_need_no_gpu() -> None:
    with FakeTensorMode():
        operands = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")
            for v in _operands()
        ]
        got = _call(operands, dtype=torch.bfloat16)
    assert (got.shape, got.dtype, got.device.type) == ((2, 19, 37), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("gemm", ["triton", "int_mm"])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(1,), (16,), (17,), (2, 50), (300,)])
def test_a_gpu_computes_the_formula(
    gemm: str, dtype: torch.dtype, activation: str, lead: tuple[int, ...]
) -> None:
    for columns, inner in ((40, 48), (768, 3072)):
        operands = _operands(lead, columns, inner, "cuda")
        got = _call(operands, activation=activation, gemm=gemm, dtype=dtype)
        exact = _activation(_exact(*(v.cpu() for v in operands)), activation)
        _assert_close(got.cpu(), exact, dtype)


@pytest.mark.gpu
def test_a_gpu_masks_odd_sizes_and_quantizes_like_the_operator() -> None:
    for lead, columns, inner in (((1,), 1, 1), ((19,), 37, 45), ((131,), 33, 131)):
        operands = _operands(lead, columns, inner, "cuda")
        _assert_close(_call(operands).cpu(), _exact(*(v.cpu() for v in operands)), torch.float32)
        scale, limits = 0.01, (-100, -128, -65)
        got = _call(operands, dtype=torch.int8, quantizer=(scale, *limits))
        expected = torch.ops.quantized_decomposed.quantize_per_tensor(
            _call(operands), scale, *limits, torch.int8
        )
        assert float((got != expected).float().mean()) <= 0.01
