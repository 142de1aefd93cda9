"""The CUDA backend: int8 x int8 products with fused epilogues, the rest for torch.compile.

Linears and patch embeddings become `qwt_fx::int8_linear`; norms, attention and residual sums stay
ATen operators, which `torch.compile(lowered, mode="max-autotune")` fuses (quantizers into the norms
before them) and records into CUDA graphs. The lowered graph runs on the device of its tensors: on a
CPU it computes the same integers by `torch._int_mm`, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qwt_fx.backends.cuda.int8_gemm import GEMMS, INT8_LINEAR, INT_MM, INT_MM_ROWS, TRITON
from qwt_fx.backends.eager import Eager
from qwt_fx.backends.float_precision import cast_floating
from qwt_fx.backends.int8_lowering import (
    LAYERS,
    Int8Lowering,
    fuse_quantizers,
    groups_of,
    why_not,
)
from qwt_fx.errors import ConfigError
from qwt_fx.graph.nodes import compute_nodes, is_call, layer_name, tensor_of
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.quant import torch_ao
from qwt_fx.quant.integer_layers import FloatLayer, IntegerLayer, layers_to_lower
from qwt_fx.text.text_length import uncut

aten = torch.ops.aten
_REASON = "float_reason"  # meta of a product left in floating point
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEQUANTIZE = frozenset({torch_ao.DEQUANTIZE_PER_TENSOR, torch_ao.DEQUANTIZE_PER_CHANNEL})


@dataclass(frozen=True)
class Cuda:
    """Lowers to int8 GEMMs.

    Attributes:
        precision: "fp32", "bf16" or "fp16": what is computed between the integer layers, attention
            included; inputs and outputs keep their dtypes. Default: fp16 for a float32 graph whose
            tensors are on a GPU, else the graph's own. bf16 has the wider range, fp16 is closer.
        gemm: "triton", one kernel a layer; or "int_mm", `torch._int_mm`, whose epilogue the
            compiler fuses. On CUDA it takes inner and outer sizes divisible by 8 and more than 16
            rows; Triton computes the rest.

    Raises `ConfigError` for other values.
    """

    precision: str | None = None
    gemm: str = TRITON

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in _DTYPES:
            wanted = ", ".join(_DTYPES)
            raise ConfigError(f"precision: got {self.precision!r}, wanted one of {wanted}")
        if self.gemm not in GEMMS:
            raise ConfigError(f"gemm: got {self.gemm!r}, wanted one of {', '.join(GEMMS)}")

    def lower(self, quantized: GraphModule) -> GraphModule:
        """A lowered copy. Raises `PreconditionError` for a graph not converted or not storable, and
        for a `precision` other than that of a graph that is not float32."""
        gm = Eager().lower(quantized)
        casts = _skip_casts(gm)
        integer: list[IntegerLayer] = []
        for layer in layers_to_lower(gm):
            reason = layer.reason if isinstance(layer, FloatLayer) else why_not(layer)
            if isinstance(layer, IntegerLayer) and reason is None:
                integer.append(layer)
            else:
                layer.node.meta[_REASON] = reason
        lowering = Int8Lowering(gm, self.gemm)
        for group in groups_of(gm, integer):
            lowering.lower(group, _result_dtype(group[0], casts))
        _restore_casts(casts)
        gm.graph.eliminate_dead_code()
        fuse_quantizers(gm)
        dtype = self._precision(quantized)
        if dtype is not None:
            cast_floating(gm, dtype)
        clean_up(gm)
        return gm

    def audit(self, lowered: GraphModule) -> list[LayerKernel]:
        """What computes each layer of a graph this backend lowered, in graph order."""
        found: list[LayerKernel] = []
        floating = set(compute_nodes(lowered))
        for node in lowered.graph.nodes:
            if is_call(node, {INT8_LINEAR}):
                kernel = _kernel(node)
                found += [LayerKernel(name, True, kernel) for name in node.meta[LAYERS]]
            elif node in floating:
                reason = node.meta.get(_REASON, "the graph was not lowered by the cuda backend")
                found.append(LayerKernel(layer_name(node), False, str(node.target), reason))
        return found

    def _precision(self, graph: GraphModule) -> torch.dtype | None:
        """What to cast to; `None` to leave the graph as it is."""
        dtypes = {p.dtype for p in graph.parameters() if p.is_floating_point()}
        if self.precision is not None:
            return _DTYPES[self.precision]
        on_gpu = any(t.is_cuda for t in graph.buffers())
        return torch.float16 if on_gpu and dtypes <= {torch.float32} else None


def _kernel(node: Node) -> str:
    activation, out_scale, gemm = node.args[8], node.args[9], node.args[-1]
    fused = [str(activation)] if activation != "none" else []
    fused += ["quantize"] if out_scale is not None else []
    name = "qwt_fx::int8_linear, " + (
        f"torch._int_mm (Triton up to {INT_MM_ROWS} rows)" if gemm == INT_MM else "Triton"
    )
    return " + ".join([name, *fused])


@dataclass(frozen=True)
class _Cast:
    """A dequantized value, its copy in half precision, and a node that read the copy."""

    value: Node
    cast: Node
    reader: Node


def _skip_casts(gm: GraphModule) -> list[_Cast]:
    """Let the readers of dequantized values in half precision read them uncast, for a while.

    In a graph of a half-precision model a cast stands behind each dequantize operator, where
    `layers_to_lower` does not look for one.
    """
    found: list[_Cast] = []
    for node in gm.graph.nodes:
        if is_call(node, {aten.to.dtype}) and _is_dequantized(gm, node.args[0]):
            value = node.args[0]
            found += [_Cast(value, node, reader) for reader in node.users]
    for cast in found:
        cast.reader.replace_input_with(cast.cast, cast.value)
    return found


def _is_dequantized(gm: GraphModule, node: Any) -> bool:
    if is_call(node, {aten.mul.Tensor}) and tensor_of(gm, uncut(node.args[1])) is not None:
        node = node.args[0]
    return is_call(node, _DEQUANTIZE)


def _restore_casts(casts: list[_Cast]) -> None:
    """Undo `_skip_casts` for the readers that are still there."""
    for cast in casts:
        if cast.reader.users:
            cast.reader.replace_input_with(cast.value, cast.cast)


def _result_dtype(layer: IntegerLayer, casts: list[_Cast]) -> torch.dtype:
    """What a layer computed in: that of the cast of its weight, else float32."""
    for cast in casts:
        if cast.reader is layer.node and cast.value is layer.node.args[1]:
            dtype = cast.cast.args[1]
            assert isinstance(dtype, torch.dtype)  # the second argument of to.dtype
            return dtype
    return torch.float32
