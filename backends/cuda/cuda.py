"""The CUDA backend: int8 x int8 products with fused epilogues, the rest for torch.compile.

Linears and patch embeddings become `qwt_fx::int8_linear`; norms, attention and residual sums stay
ATen operators, which `torch.compile(lowered, mode="max-autotune")` fuses (quantizers into the norms
before them) and records into CUDA graphs. The lowered graph runs on the device of its tensors: on a
CPU it computes the same integers by `torch._int_mm`, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from qwt_fx.backends.cuda.float_precision import cast_floating
from qwt_fx.backends.cuda.int8_gemm import GEMMS, INT8_LINEAR, INT_MM, INT_MM_ROWS, TRITON
from qwt_fx.backends.cuda.int8_lowering import Int8Lowering, fuse_quantizers, groups_of, why_not
from qwt_fx.backends.eager import Eager
from qwt_fx.backends.lowering import audit_graph, integer_layers
from qwt_fx.backends.token_quantizers import write_out_token_quantizers
from qwt_fx.errors import ConfigError
from qwt_fx.graph.dead_code import remove_dead_nodes
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.measure.kernel_audit import LayerKernel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        lowering = Int8Lowering(gm, self.gemm)
        for group in groups_of(gm, integer_layers(gm, why_not)):
            lowering.lower(group)
        remove_dead_nodes(gm)
        fuse_quantizers(gm)
        dtype = self._precision(quantized)
        if dtype is not None:
            cast_floating(gm, dtype)
        write_out_token_quantizers(gm)  # last: their scales stay in float32
        clean_up(gm)
        return gm

    def audit(self, lowered: GraphModule) -> list[LayerKernel]:
        """What computes each layer of a graph this backend lowered, in graph order."""
        return audit_graph(lowered, {INT8_LINEAR}, _kernel, "cuda")

    def _precision(self, graph: GraphModule) -> torch.dtype | None:
        """What to cast to; `None` to leave the graph as it is."""
        dtypes = {p.dtype for p in graph.parameters() if p.is_floating_point()}
        if self.precision is not None:
            return _DTYPES[self.precision]
        on_gpu = any(t.is_cuda for t in graph.buffers())
        return torch.float16 if on_gpu and dtypes <= {torch.float32} else None


def _kernel(node: Node) -> str:
    activation, out_scale, gemm = node.args[9], node.args[10], node.args[-1]
    fused = [str(activation)] if activation != "none" else []
    fused += ["quantize"] if out_scale is not None else []
    name = "qwt_fx::int8_linear, " + (
        f"torch._int_mm (Triton up to {INT_MM_ROWS} rows)" if gemm == INT_MM else "Triton"
    )
    return " + ".join([name, *fused])
