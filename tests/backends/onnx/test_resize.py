"""Resizing with antialiasing in exported files: PyTorch's own numbers in every runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import interpolate

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends.exports import runner_of
from qwt_fx.errors import ArtifactError
from qwt_fx.measure.measure import sqnr_db

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
X = torch.randn(3, 4, 13, 20, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "bilinear": {"size": (6, 8), "mode": "bilinear"},
    "bicubic": {"size": (6, 8), "mode": "bicubic"},
    "larger": {"size": (26, 33), "mode": "bicubic"},
    "factors": {"scale_factor": (0.46, 0.37), "mode": "bicubic"},
    "corners": {"size": (6, 8), "mode": "bicubic", "align_corners": True},
}


class Resized(nn.Module):
    """A linear of what was resized; of a table of its own as well."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how
        self.positions = nn.Parameter(torch.randn(1, 4, 33, 41))
        self.out = nn.Linear(self.resized(X).shape[-1], 5)

    def resized(self, x: Tensor) -> Tensor:
        return interpolate(x, antialias=True, **self.how)

    def forward(self, x: Tensor) -> Tensor:
        y = self.resized(x)
        size = [int(n) for n in y.shape[2:]]
        table = interpolate(self.positions, size=size, mode="bicubic", antialias=True)
        return self.out(y + table)


def _quantized(kind: str) -> GraphModule:
    config = QuantConfig(recipe="repq-vit", w_bits=7, a_bits=32)
    return qwt_fx.quantize(Resized(**KINDS[kind]).eval(), (X,), [X], config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_runtime_resizes_as_pytorch_does(kind: str, tmp_path: Path) -> None:
    q = _quantized(kind)
    path = tmp_path / "a.onnx"
    qwt_fx.export(q, path, X[:1], pack="int8")
    with torch.no_grad():
        expected = q(X)
    assert sqnr_db(expected, runner_of(path, "onnx")(X)) > 100.0
    operators = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "Resize" not in operators
    if importlib.util.find_spec("openvino") is not None:
        from qwt_fx.backends.onnx.openvino_runtime import openvino_model

        assert sqnr_db(expected, openvino_model(path, threads=1)(X)) > 100.0


def test_a_table_is_resized_once_in_every_lowering(tmp_path: Path) -> None:
    q = _quantized("bicubic")

    def resizes(gm: torch.nn.Module) -> int:
        assert isinstance(gm, GraphModule)
        calls = (n for n in gm.graph.nodes if n.op == "call_function")
        return sum("upsample" in str(node.target) for node in calls)

    assert resizes(q) == 2
    for backend in ("eager", "x86", "cuda"):
        lowered = qwt_fx.lower(q, backend)
        assert resizes(lowered) == 1
        with torch.no_grad():
            assert sqnr_db(q(X), lowered(X)) > 100.0
    assert torch.equal(qwt_fx.lower(q, "eager")(X), q(X))
    assert resizes(q) == 2  # a copy was lowered
    qwt_fx.export(q, tmp_path / "a.pt2", X[:1], format="pt2")
    assert resizes(torch.export.load(tmp_path / "a.pt2").module()) == 1


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Resize", {"antialias": 1, "mode": "linear"}),
        ("AveragePool", {"ceil_mode": 1, "count_include_pad": 1, "kernel_shape": [3, 3]}),
    ],
)
def test_what_openvino_computes_wrongly_is_refused(
    operator: str, attributes: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    from qwt_fx.backends.onnx.openvino_runtime import openvino_model

    path = tmp_path / "old.onnx"
    qwt_fx.export(_quantized("bicubic"), path, X[:1], pack="int8")
    openvino_model(path)
    model = onnx.load(str(path))
    image = model.graph.input[0].name
    sizes = onnx.helper.make_tensor("factors", onnx.TensorProto.FLOAT, [4], [1.0, 1.0, 0.5, 0.5])
    model.graph.initializer.append(sizes)
    inputs = [image, "", "factors"] if operator == "Resize" else [image]
    model.graph.node.append(
        onnx.helper.make_node(operator, inputs, ["other"], name="the_node", **attributes)
    )
    kind = onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None)
    model.graph.output.append(kind)
    onnx.save(model, str(path))
    with pytest.raises(
        ArtifactError, match=f"OpenVINO computes {operator} with .* wrongly.*the_node"
    ):
        openvino_model(path)
