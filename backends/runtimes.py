"""What runs a tower, by the names of `qwt-fx bench`: a registry of factories.

A runtime is added by one entry in `RUNTIMES`: a function of a `Source` that returns a `Prepared`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwt_fx.backends import audit_of, lower_to
from qwt_fx.backends.compiled import compile_graph
from qwt_fx.backends.exports import SUFFIXES, export_graph, runner_of
from qwt_fx.backends.lowering import floating_kernels
from qwt_fx.backends.onnx.onnx_runtime import audit, onnx_runtime_session
from qwt_fx.backends.onnx.openvino_runtime import openvino_model
from qwt_fx.errors import ConfigError, PreconditionError
from qwt_fx.measure.kernel_audit import LayerKernel

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """A tower to run.

    Attributes:
        tower: "image" or "text".
        quantized: the converted graph, on the CPU.
        floating: the same tower in FP32, on the CPU.
        example: a batch of its inputs, texts of full length: what runtimes of files export with.
    """

    tower: str
    quantized: GraphModule
    floating: nn.Module
    example: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """A tower, ready to run.

    Attributes:
        run: one batch (n, ...) to its embeddings; returns when they are there. The first call with
            a new shape may compile.
        kernels: what computes each layer.
        weight_bytes: of the tensors it holds.
        floats: what is computed in where no integers are: "float32", "float16" or "bfloat16".
    """

    run: Run
    kernels: list[LayerKernel]
    weight_bytes: int
    floats: str = "float32"


_OPENVINO_TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
Factory = Callable[[Source], Prepared]


def _bytes(module: nn.Module) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def _floats(module: nn.Module) -> str:
    """What a graph computes in that no runtime changes; a compensation is stored in half precision."""
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if not kinds or torch.float32 in kinds:
        return "float32"
    return "+".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def _no_grad(module: nn.Module) -> Run:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = module(x)
        return features

    return run


def _floating_kernels(source: Source) -> list[LayerKernel]:
    return floating_kernels(source.quantized, "a floating-point runtime")


def _fp32_eager(source: Source) -> Prepared:
    module = source.floating
    kernels = _floating_kernels(source)
    return Prepared(_no_grad(module), kernels, _bytes(module), _floats(module))


def _fp32_compile(source: Source) -> Prepared:
    module = source.floating
    kernels = _floating_kernels(source)
    return Prepared(compile_graph(module), kernels, _bytes(module), _floats(module))


def _bf16_compile(source: Source) -> Prepared:
    """By autocast: products in bfloat16, norms and softmax in float32."""
    compiled = compile_graph(source.floating)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            features: Tensor = compiled(x)
        return features

    return Prepared(run, _floating_kernels(source), _bytes(source.floating), "bfloat16")


def _eager(source: Source) -> Prepared:
    lowered = lower_to(source.quantized, "eager")
    return Prepared(_no_grad(lowered), audit_of(lowered), _bytes(lowered), _floats(lowered))


def _x86(source: Source) -> Prepared:
    lowered = lower_to(source.quantized, "x86")
    return Prepared(compile_graph(lowered), audit_of(lowered), _bytes(lowered), _floats(lowered))


def _cuda(source: Source) -> Prepared:
    if not torch.cuda.is_available():
        raise PreconditionError("runtime cuda: this process sees no CUDA device")
    lowered = lower_to(source.quantized.to("cuda"), "cuda")
    source.quantized.to("cpu")
    compiled = torch.compile(lowered, mode="max-autotune", dynamic=False)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = compiled(x.to("cuda"))
        torch.cuda.synchronize()
        return features

    floats = _floats(source.quantized)
    # The backend's own choice on a GPU for a float32 graph.
    floats = "float16" if floats == "float32" else floats
    return Prepared(run, audit_of(lowered), _bytes(lowered), floats)


def _exported(source: Source, folder: str, format: str, pack: str) -> Path:
    if source.example is None:
        raise PreconditionError("a runtime of exported files needs Source.example")
    path = Path(folder) / f"{source.tower}{SUFFIXES[format]}"
    export_graph(source.quantized, path, (source.example,), format=format, pack=pack)
    return path


def _onnxruntime(source: Source) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(source, folder, "onnx", "auto")
        session = onnx_runtime_session(path, threads=torch.get_num_threads())
        return Prepared(session, audit(path), path.stat().st_size)


def _openvino(source: Source, *, as_it_comes: bool = False) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(source, folder, "onnx", "int8")
        threads = torch.get_num_threads()
        model = openvino_model(path, threads=threads, as_it_comes=as_it_comes)
        floats = _OPENVINO_TYPES.get(model.floats, model.floats)
        return Prepared(model, model.audit(), path.stat().st_size, floats)


def _openvino_as_it_comes(source: Source) -> Prepared:
    """Floats in the precision OpenVINO chooses for this CPU, which is faster and not the graph's."""
    return _openvino(source, as_it_comes=True)


def _aoti(source: Source) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(source, folder, "aoti", "auto")
        reason = "AOTInductor compiles q/dq operators and floating-point products"
        kernels = floating_kernels(source.quantized, reason)
        floats = _floats(source.quantized)
        return Prepared(runner_of(path, "aoti"), kernels, path.stat().st_size, floats)


RUNTIMES: dict[str, Factory] = {
    "fp32-eager": _fp32_eager,
    "fp32-compile": _fp32_compile,
    "bf16-compile": _bf16_compile,
    "eager": _eager,
    "x86": _x86,
    "cuda": _cuda,
    "aoti": _aoti,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino-default": _openvino_as_it_comes,
}
# Those that claim to compute in integers: one where nothing is an integer is refused.
INTEGER = frozenset({"x86", "cuda", "onnxruntime", "openvino", "openvino-default"})


def runtime_for(name: str) -> Factory:
    """The runtime with this name. Raises `ConfigError` for an unknown one."""
    if name not in RUNTIMES:
        raise ConfigError(f"runtime: got {name!r}, wanted one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]
