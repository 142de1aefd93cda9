"""Runs exported ONNX models in OpenVINO, and tells which layers it computes from integers.

Export with `--pack int8`: OpenVINO computes from integers where weights are int8 with zero point 0.
Its CPU plugin, too, adds uint8 x int8 products in pairs as int16 where the CPU has no VNNI, so 8-bit
weights lose accuracy there.

Two defaults of OpenVINO change numbers, so they are set here unless `as_it_comes` is asked for:

* on CPUs with avx512_bf16 or AMX it computes what is left in floating point in bfloat16
  (INFERENCE_PRECISION_HINT);
* where weights alone are quantized, it rounds the activations beside them to 8 bits
  (DYNAMIC_QUANTIZATION_GROUP_SIZE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qwt_fx.backends.onnx.onnx_runtime import import_extra, layer_reasons
from qwt_fx.backends.widening import as_float32
from qwt_fx.errors import ArtifactError, first_line
from qwt_fx.measure.kernel_audit import LayerKernel

if TYPE_CHECKING:
    import openvino

_EXACT: dict[str, object] = {
    "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0
}  # fmt: skip
# Operators that OpenVINO's CPU plugin computes as another function where attributes have these values.
_WRONG: dict[str, dict[str, int]] = {
    "Resize": {"antialias": 1},
    "AveragePool": {"ceil_mode": 1, "count_include_pad": 1},
}
_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention"})


@dataclass(frozen=True)
class OpenVinoModel:
    """An exported tower, compiled by OpenVINO: called with a tensor of its one input."""

    compiled: openvino.CompiledModel
    layers: dict[str, str | None]

    @property
    def floats(self) -> str:
        """What it computes in where it does not compute in integers: "f32", "bf16" or "f16"."""
        return str(self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def __call__(self, inputs: Tensor) -> Tensor:
        """Features (n, e) float32 of images or token ids."""
        return torch.from_numpy(np.array(self.compiled(as_float32(inputs).numpy())[0]))

    def audit(self) -> list[LayerKernel]:
        """What computes each layer, read from the compiled graph."""
        kernels: dict[str, str] = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = _reader(node.get_rt_info())
            if info("layerType") in _PRODUCTS:
                for name in info("originalLayersNames").split(","):
                    kernels[name] = f"{info('layerType')} {info('primitiveType')}"
        return [_kernel(name, reason, kernels.get(name)) for name, reason in self.layers.items()]


def openvino_model(
    path: Path, *, threads: int | None = None, as_it_comes: bool = False
) -> OpenVinoModel:
    """Compile an exported model for the CPU, its floating-point part in float32.

    Args:
        path: what `qwt-fx export --format onnx --pack int8` wrote for one tower.
        threads: OpenVINO's choice by default.
        as_it_comes: leave OpenVINO's own precision, which is bfloat16 on some CPUs.

    Raises `MissingExtraError` without the extra `openvino`, `ArtifactError` for a file it cannot
    compile, that it would compute wrongly, or that qwt-fx did not write.
    """
    openvino = import_extra("openvino", "openvino", "running in OpenVINO")
    import onnx  # the extra brings it

    options = {} if as_it_comes else dict(_EXACT)
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO cannot compile it: {first_line(error)}") from error
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        given = {a.name: a.i for a in node.attribute}
        wrong = _WRONG.get(node.op_type, {})
        if wrong and all(given.get(name) == value for name, value in wrong.items()):
            what = ", ".join(f"{name}={value}" for name, value in wrong.items())
            raise ArtifactError(
                f"{path}: OpenVINO computes {node.op_type} with {what} wrongly (node {node.name!r}): "
                "export the file again with this version of qwt-fx, or run it in ONNX Runtime"
            )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return OpenVinoModel(compiled, layer_reasons(metadata, path))


def _reader(info: Mapping[str, object]) -> Callable[[str], str]:
    def read(key: str) -> str:
        value = info[key]
        return str(getattr(value, "value", value))

    return read


def _kernel(name: str, reason: str | None, kernel: str | None) -> LayerKernel:
    if kernel is None:
        return LayerKernel(name, False, "not identified", reason or "fused into something else")
    if kernel.lower().endswith("i8"):
        return LayerKernel(name, True, kernel)
    default = f"OpenVINO computes it in floating point ({kernel})"
    return LayerKernel(name, False, kernel, reason or default)
