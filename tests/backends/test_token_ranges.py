"""Dynamic activations in every backend against eager, and which layers are integers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends.compiled import compile_graph
from qwt_fx.backends.exports import runner_of
from qwt_fx.backends.x86 import saturation
from qwt_fx.graph.nodes import is_call
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao

KINDS: dict[str, dict[str, Any]] = {
    "static": {},
    "dynamic": {"activations": "dynamic"},
    "mixed": {"activations": "dynamic", "overrides": {"*.fc2": "w8a8s", "*.q": "w6a5d"}},
}
BACKENDS = ("x86", "cuda", "pt2", "onnx")
OURS = {ops.CHOOSE_QPARAMS_PER_TOKEN, torch_ao.QUANTIZE_PER_TOKEN, torch_ao.DEQUANTIZE_PER_TOKEN}
LAYERS = 6


@functools.cache
def quantized(kind: str, bits: int, recipe: str = "repq-vit", half: bool = False) -> GraphModule:
    # repq-vit has asymmetric weights, whose zero points every backend corrects for.
    x = tokens(4)
    model = randomize(Tower(1)).requires_grad_(False)
    if half:
        model, x = model.bfloat16(), x.bfloat16()
    config = QuantConfig(w_bits=bits, a_bits=bits, recipe=recipe, **KINDS[kind])
    return qwt_fx.quantize(model, (x,), [(x,)], config)


def lowered(
    q: GraphModule, backend: str, folder: Path, example: Tensor | None = None
) -> tuple[Callable[[Tensor], Tensor], int]:
    """What runs it, and how many linears are integers."""
    if backend in ("x86", "cuda"):
        gm = qwt_fx.lower(q, backend)
        assert not any(is_call(node, OURS) for node in gm.graph.nodes)
        return gm, sum(kernel.integer for kernel in qwt_fx.kernel_audit(gm))
    example = tokens(2) if example is None else example
    path = folder / ("q.onnx" if backend == "onnx" else "q.pt2")
    if backend == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        from qwt_fx.backends.onnx.onnx_runtime import audit

        qwt_fx.export(q, path, (example,))
        return runner_of(path, "onnx", 1), sum(kernel.integer for kernel in audit(path))
    qwt_fx.export(q, path, (example,), format=backend)
    return runner_of(path, backend), 0


def slow(backend: str, kind: str, bits: int) -> list[pytest.MarkDecorator]:
    """Exporting takes seconds, and static activations have tests of their own."""
    fast = backend in ("x86", "cuda") or (kind, bits) == ("mixed", 4)
    return [] if fast else [pytest.mark.slow]


CASES = [
    pytest.param(*case, marks=slow(*case)) for case in itertools.product(BACKENDS, KINDS, (8, 4))
]


@pytest.mark.parametrize(("backend", "kind", "bits"), CASES)
def test_every_backend_computes_what_eager_does(
    backend: str, kind: str, bits: int, tmp_path: Path
) -> None:
    q = quantized(kind, bits)
    run, integer = lowered(q, backend, tmp_path)
    assert integer == (0 if backend == "pt2" else LAYERS)
    with torch.no_grad():
        for x in (tokens(4), 30.0 * tokens(1, seed=5), tokens(3, seed=6) * 0.0):
            assert sqnr_db(q(x), run(x)) > (300.0 if backend == "pt2" else 60.0)


@pytest.mark.parametrize("backend", ["x86", "cuda"])
def test_a_model_in_half_precision(backend: str) -> None:
    q, x = quantized("dynamic", 8, half=True), tokens(4).bfloat16()
    with torch.no_grad():
        got = qwt_fx.lower(q, backend)(x)
        assert got.dtype is torch.bfloat16
        assert sqnr_db(q(x).float(), got.float()) > 30.0


@pytest.mark.parametrize("bits", [8, 4])
def test_where_byte_products_saturate_two_products_are_exact(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saturation, "saturates", lambda: True)
    q = quantized("dynamic", bits)
    gm = qwt_fx.lower(q, "x86")
    exact = [k.kernel for k in qwt_fx.kernel_audit(gm) if "2 exact products" in k.kernel]
    assert len(exact) == (LAYERS if bits == 8 else 0)
    with torch.no_grad():
        assert sqnr_db(q(tokens(3, seed=9)), gm(tokens(3, seed=9))) > 60.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "mixed"])
def test_compiled(kind: str) -> None:
    q, x = quantized(kind, 8), tokens(4)
    run = compile_graph(qwt_fx.lower(q, "x86"))
    with torch.no_grad():
        assert sqnr_db(q(x), run(x)) > 60.0


@pytest.mark.slow
def test_aoti(tmp_path: Path) -> None:
    q = quantized("mixed", 8)
    run, _ = lowered(q, "aoti", tmp_path)
    with torch.no_grad():
        assert sqnr_db(q(tokens(4)), run(tokens(4))) > 60.0


@pytest.mark.parametrize("pack", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_onnx_weights_in_other_types(pack: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from qwt_fx.backends.onnx.onnx_runtime import audit, onnx_runtime_session

    q, path = quantized("dynamic", 4, "best"), tmp_path / "q.onnx"
    qwt_fx.export(q, path, (tokens(2),), pack=pack)
    integer = [kernel.integer for kernel in audit(path)]
    assert sum(integer) == (LAYERS if pack == "int8" else 0)
    with torch.no_grad():
        x = tokens(3, seed=6)
        assert sqnr_db(q(x), onnx_runtime_session(path, threads=1)(x)) > 60.0


def test_a_linear_of_two_dimensions(tmp_path: Path) -> None:
    x = torch.randn(6, 16)
    model = randomize(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)))
    config = QuantConfig(recipe="repq-vit", activations="dynamic")
    q = qwt_fx.quantize(model.requires_grad_(False), (x,), [(x,)], config)
    for backend in ("x86", "cuda", "onnx"):
        run, integer = lowered(q, backend, tmp_path, x)
        assert integer == 2
        with torch.no_grad():
            assert sqnr_db(q(x), run(x)) > 60.0
