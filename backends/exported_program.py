"""A converted graph as a `torch.export.ExportedProgram`: what pt2, AOTInductor and ONNX start from."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch._inductor
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule
from torch.utils._sympy.value_ranges import ValueRanges

from qwt_fx.backends.constant_folding import fold_constants
from qwt_fx.backends.lowering import check_converted
from qwt_fx.backends.token_quantizers import write_out_token_quantizers
from qwt_fx.errors import PreconditionError, first_line
from qwt_fx.graph.edits import add_tensor
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.graph_source import recompile
from qwt_fx.graph.input_check import MAX_BATCH
from qwt_fx.numerics.qparams import dequantize_log_sqrt2
from qwt_fx.quant import operators as ops

aten = torch.ops.aten


def check_exportable(quantized: GraphModule, example_inputs: tuple[Tensor, ...]) -> None:
    """Raise `PreconditionError` for a graph not converted, one no integer type can hold, or an
    example that is a shorter text than the graph takes."""
    check_converted(quantized, "export")
    context = graph_info(quantized).context_length
    lengths = [int(x.shape[1]) for x in example_inputs if context is not None]
    if any(length != context for length in lengths):
        raise PreconditionError(
            f"example_inputs: got texts of {lengths[0]} ids, wanted the whole context of {context}"
        )


def export_program(gm: GraphModule, example_inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Export with a dynamic batch, and a dynamic length where the graph takes shorter texts.

    Args:
        gm: a graph made by `qwt_fx.capture` and passes.
        example_inputs: tensors whose first dimension is the batch, any size.

    Raises `PreconditionError` where torch.export cannot.
    """
    inputs = tuple(_two_samples(x) for x in example_inputs)
    sizes: dict[int, Dim] = {0: Dim("batch", min=1, max=MAX_BATCH)}
    context = graph_info(gm).context_length
    if context is not None:
        # One below the context, as in qwt_fx.capture: a cut of a whole table would be a case of its
        # own. The graph is the same for the whole context, and the range says so below.
        sizes[1] = Dim("length", min=1, max=context - 1)
        inputs = tuple(x[:, : context - 1].contiguous() for x in inputs)
    gm.requires_grad_(False)
    try:
        with torch.no_grad():
            program = export(gm, inputs, dynamic_shapes=tuple(dict(sizes) for _ in inputs))
    except Exception as error:  # torch.export raises many kinds; each means "cannot export"
        raise PreconditionError(
            f"torch.export cannot export the quantized graph: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    for symbol, values in program.range_constraints.items():
        if context is not None and values.upper == context - 1:
            program.range_constraints[symbol] = ValueRanges(1, context)
    return program


def _two_samples(x: Tensor) -> Tensor:
    """Export treats sizes 0 and 1 as constants, so a single sample is repeated."""
    return x.repeat(2, *([1] * (x.dim() - 1))) if x.shape[0] == 1 else x


def save_pt2(quantized: GraphModule, path: Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Write a converted graph with `torch.export.save`, q/dq operators as they are.

    Loading needs torch alone, and its q/dq operators registered first:
    `import torch.ao.quantization.fx._decomposed`. A `.pt2` holds a pickle: load trusted files only.

    Args:
        quantized: a converted graph; it is not changed.
        path: the file to write, `.pt2`, not atomically: give a path in a folder of your own.
        example_inputs: one tensor an input, any batch size.

    Raises `PreconditionError` for a graph that is not converted or cannot be exported.
    """
    torch.export.save(_standard_program(quantized, example_inputs), path)


def save_aoti(quantized: GraphModule, path: Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Compile a converted graph with AOTInductor into a package for this kind of machine.

    It runs from Python (`torch._inductor.aoti_load_package`) and C++
    (`torch::inductor::AOTIModelPackageLoader`). The q/dq operators are compiled as they are: products
    are computed in floating point. A C++ compiler must be there.

    Arguments and errors as for `save_pt2`; `PreconditionError` too where Inductor cannot compile.
    """
    program = _standard_program(quantized, example_inputs)
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # Inductor raises many kinds
        raise PreconditionError(
            f"AOTInductor cannot compile the graph: {first_line(error)}"
        ) from error


def _standard_program(
    quantized: GraphModule, example_inputs: tuple[Tensor, ...]
) -> ExportedProgram:
    check_exportable(quantized, example_inputs)
    gm = copy.deepcopy(quantized)
    fold_constants(gm)
    write_out_token_quantizers(gm)
    _write_out_log_sqrt2(gm)
    return export_program(gm, example_inputs)


def _write_out_log_sqrt2(gm: GraphModule) -> None:
    """The log-sqrt2 quantizer in ATen operators, so that a reader needs no operator of ours."""
    call = gm.graph.call_function
    for node in list(gm.graph.nodes):
        if node.target not in (ops.QUANTIZE_LOG_SQRT2, ops.DEQUANTIZE_LOG_SQRT2):
            continue
        x, scale, bits = node.args
        with gm.graph.inserting_before(node):
            if node.target is ops.QUANTIZE_LOG_SQRT2:
                exponent = call(aten.log2.default, (call(aten.div.Tensor, (x, scale)),))
                halves = call(aten.round.default, (call(aten.mul.Tensor, (exponent, -2.0)),))
                limited = call(aten.clamp.default, (halves, 0, 2**bits - 1))
                new = call(aten.to.dtype, (limited, torch.uint8))
            else:
                every = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8)
                table = add_tensor(gm, "log_sqrt2_values", dequantize_log_sqrt2(every, scale, bits))
                index = call(aten.to.dtype, (x, torch.int64))
                new = call(aten.index.Tensor, (table, [index]))
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    recompile(gm)
