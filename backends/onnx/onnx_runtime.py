"""Runs exported ONNX models in ONNX Runtime, and tells which layers it computes from integers.

Only numpy and onnxruntime are needed to run; the audit reads ONNX Runtime's optimized graph with onnx.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwt_fx.backends.widening import as_float32
from qwt_fx.errors import ArtifactError, MissingExtraError, first_line
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.measure.machine import sums_byte_products_exactly

if TYPE_CHECKING:
    import onnxruntime

Images = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]
LAYERS_KEY = "qwt_fx.layers"  # metadata: a JSON object, layer -> why it is not integer, or null

_INTEGER = frozenset(
    {
        "MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "MatMulInteger",
        "ConvInteger", "DynamicQuantizeMatMul",
    }
)  # fmt: skip
_FLOAT = frozenset(
    {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "ConvTranspose", "Einsum",
     "MatMulNBits", "Attention", "MultiHeadAttention"}
)  # fmt: skip


def import_extra(package: str, extra: str, purpose: str) -> ModuleType:
    """A package of an extra. Raises `MissingExtraError` where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {error.name}: pip install 'qwt-fx[{extra}]'"
        ) from error


def layer_reasons(metadata: Mapping[str, str], path: Path) -> dict[str, str | None]:
    """Layer -> why it is not computed from integers, as an exported model's metadata says.

    Raises `ArtifactError` for a model that qwt-fx did not write.
    """
    if LAYERS_KEY not in metadata:
        raise ArtifactError(f"{path}: it was not exported by qwt-fx: its metadata names no layers")
    reasons: dict[str, str | None] = json.loads(metadata[LAYERS_KEY])
    return reasons


@dataclass(frozen=True)
class OnnxRuntimeSession:
    """An exported tower in ONNX Runtime: called with a tensor, or an array, of its one input."""

    session: onnxruntime.InferenceSession
    input_name: str

    def run(self, inputs: Images | TokenIds) -> npt.NDArray[np.float32]:
        """Features (n, e) float32 of images (n, 3, h, w) float32 or token ids (n, length) int64."""
        features: npt.NDArray[np.float32] = self.session.run(None, {self.input_name: inputs})[0]
        return features

    def __call__(self, inputs: Tensor) -> Tensor:
        """The same for tensors; floating-point ones are read as float32."""
        return torch.from_numpy(self.run(as_float32(inputs).numpy()))


def onnx_runtime_session(path: Path, *, threads: int | None = None) -> OnnxRuntimeSession:
    """Open an exported model in ONNX Runtime on the CPU.

    Args:
        path: what `qwt-fx export --format onnx` wrote for one tower.
        threads: of one product; ONNX Runtime's choice by default.

    Raises `MissingExtraError` without onnxruntime, `ArtifactError` for a file it cannot open.
    """
    return _session(path, threads, None)


def check_opens(path: Path) -> None:
    """Open an exported model as its users would, with what is installed of onnx and onnxruntime.

    Raises onnx's own errors for a model that breaks the standard (types, shapes), `ArtifactError` for
    one that ONNX Runtime cannot open.
    """
    with contextlib.suppress(MissingExtraError):
        import_extra("onnx", "onnx", "checking").checker.check_model(str(path), full_check=True)
    with contextlib.suppress(MissingExtraError):
        _session(path, 1, None)


def _session(path: Path, threads: int | None, optimized: Path | None) -> OnnxRuntimeSession:
    onnxruntime = import_extra("onnxruntime", "onnx", "running ONNX models")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Weights alone quantized: by default ONNX Runtime rounds the activations beside them to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    if not sums_byte_products_exactly():
        # uint8 x int8 computed as uint8 x uint8: exact, and slower.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's errors have no common base
        raise ArtifactError(f"{path}: ONNX Runtime cannot open it: {first_line(error)}") from error
    return OnnxRuntimeSession(session, session.get_inputs()[0].name)


def audit(path: Path) -> list[LayerKernel]:
    """What computes each layer of an exported model, read from ONNX Runtime's optimized graph.

    Raises `MissingExtraError` without the extra `onnx`, `ArtifactError` for another model.
    """
    onnx = import_extra("onnx", "onnx", "the audit")
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = _session(path, 1, optimized).session
        graph = onnx.load(str(optimized), load_external_data=False).graph
    kernels: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        if node.op_type in _INTEGER | _FLOAT:
            # A fusion adds its own name behind a slash.
            kernels[node.name.partition("/")[0]].append(node.op_type)
    reasons = layer_reasons(session.get_modelmeta().custom_metadata_map, path)
    return [_kernel(name, reason, kernels.get(name, [])) for name, reason in reasons.items()]


def _kernel(name: str, reason: str | None, operators: list[str]) -> LayerKernel:
    kernel = " + ".join(dict.fromkeys(operators)) or "not identified"
    if operators and all(operator in _INTEGER for operator in operators):
        return LayerKernel(name, True, kernel)
    default = f"ONNX Runtime computes it in floating point ({kernel})"
    if not operators:
        default = "ONNX Runtime's graph does not name it"
    return LayerKernel(name, False, kernel, reason or default)
