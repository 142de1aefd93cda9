"""The functions users call: prepare, calibrate, convert, lower, quantize, save, load, export, report.

No maths here: this module orders the passes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from qwt_fx.artifact.artifact import load_graph, save_graph
from qwt_fx.artifact.graph_json import why_not_storable
from qwt_fx.backends import audit_of, lower_to
from qwt_fx.backends.exports import export_graph
from qwt_fx.batches.batch import Batches
from qwt_fx.calibrate.observe_ranges import check_parameters, config_of, observe
from qwt_fx.capture.capture import adopt
from qwt_fx.capture.capture import capture as capture_graph
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.settings import settings_of
from qwt_fx.errors import NotCalibratedError
from qwt_fx.graph.conditions import plain_conditions
from qwt_fx.graph.graph_info import graph_info, has_graph_info
from qwt_fx.graph.graph_source import copy_sharing_tensors
from qwt_fx.graph.pass_base import Pass, PassManager
from qwt_fx.inspect.report import build_report
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.passes.convert_to_integers import ConvertToIntegers
from qwt_fx.passes.decompose_attention import DecomposeAttention
from qwt_fx.passes.insert_log_sqrt2_softmax import InsertLogSqrt2Softmax
from qwt_fx.passes.insert_observers import InsertObservers
from qwt_fx.passes.remove_observers import RemoveObservers
from qwt_fx.passes.reparameterize_layer_norm import ReparameterizeLayerNorm
from qwt_fx.quant.fake_quant import Mode, fake_quant_nodes, fake_quant_of, set_mode
from qwt_fx.quant.quantizers import compensation_bytes, compensation_tensors, qparams
from qwt_fx.steps import Progress, Seconds, calibrate, timed

__all__ = [
    "calibrate", "capture", "compensations", "convert", "export", "kernel_audit", "load", "lower",
    "observe", "prepare", "qparams", "quantize", "reparameterize", "report", "save", "simulate",
]  # fmt: skip


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[object, ...] | Tensor,
    kwargs: Mapping[str, object] | None = None,
    *,
    strict: bool = False,
) -> GraphModule:
    """Capture a model as a graph of ATen ops whose batch dimension is dynamic.

    Args:
        model: any module `torch.export` can trace; it is captured in evaluation mode, out of
            `DataParallel`, `torch.compile` and the like. Or what `torch.export.export` returned, or its
            `module()`, with a dynamic batch dimension.
        example_inputs: a tuple of tensors (or one tensor) whose first dimension is the batch; any
            batch size, 1 included. Every other size is fixed by it.
        kwargs: keyword inputs of `forward`.
        strict: capture with TorchDynamo instead of tracing.

    Returns a `GraphModule` called like the model and returning its output structure, with the
    transformer blocks recorded. A graph captured before is returned as it is. A model of one tensor of
    token ids (n, context) accepts shorter ids as well where nothing behind the end of a text matters.
    Called with inputs of another shape or type, it raises `DataError`.

    Warns where the graph could not be saved, once quantized. Raises `CaptureError` where the model
    cannot be exported with a dynamic batch; the message names the node or the reason of torch.export.
    """
    gm = capture_graph(model, example_inputs, kwargs, strict=strict)
    return gm if gm is model else _storable(gm)  # of a graph captured before it was said before


def _storable(gm: GraphModule) -> GraphModule:
    if (reason := why_not_storable(gm)) is not None:
        warnings.warn(reason, stacklevel=3)
    return gm


@plain_conditions()
def prepare(gm: GraphModule, config: QuantConfig) -> GraphModule:
    """A copy of a captured graph with observers inserted and switched off: it computes FP32.

    A graph made by `torch.export` (the program's `module()`) is taken as well, if its batch is dynamic.
    The copy shares the graph's tensors until calibration replaces them: do not change those in place
    before `convert`, whose result has tensors of its own.

    Raises `ConfigError` for an override that matches no layer.
    """
    prepared = copy_sharing_tensors(gm) if has_graph_info(gm) else _storable(adopt(gm))
    settings = settings_of(config)
    steps: list[Pass] = []
    if settings.decompose_attention:
        steps.append(DecomposeAttention())
    if settings.log_sqrt2:
        bits = partial(_activation_bits, config)
        steps.append(InsertLogSqrt2Softmax(bits, reserve_zero=settings.storable))
    PassManager((*steps, InsertObservers(config)))(prepared)
    return prepared


def _activation_bits(config: QuantConfig, layer: str) -> int | None:
    return config.bits_for(layer).activation


@plain_conditions()
def reparameterize(
    gm: GraphModule, batches: Batches, config: QuantConfig | None = None
) -> GraphModule:
    """A copy of a captured graph that computes the same in float and is easier to quantize.

    RepQ-ViT's scale reparameterization of every norm that can have it, for other toolkits:
    `qwt_fx.pt2e.QwTQuantizer`, or any that quantizes a float graph statically.

    Args:
        gm: a graph from `capture` or `torch.export`; it is not changed.
        batches: calibration batches as for `calibrate`; the first gives the channels' scales.
        config: its `a_bits`, `overrides` and `token_masks` decide the scales.
    """
    static = (config or QuantConfig()).replace(attention="none", activations="static")
    prepared = prepare(gm, static)
    check_parameters(prepared)
    observe(prepared, batches)
    PassManager((ReparameterizeLayerNorm(), RemoveObservers()))(prepared)
    return copy.deepcopy(prepared)  # which shares tensors with the graph


@plain_conditions()
def convert(prepared: GraphModule) -> GraphModule:
    """A copy of a calibrated graph with integer weights and q/dq operators; needs no data.

    Raises `NotCalibratedError` for a quantizer without a scale.
    """
    converted = copy_sharing_tensors(prepared)
    ConvertToIntegers()(converted)
    return copy.deepcopy(converted)  # what is left of the float tensors is shared until here


@plain_conditions()
def quantize(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] | Tensor,
    batches: Batches,
    config: QuantConfig | None = None,
    *,
    seconds: Seconds | None = None,
    progress: Progress | None = None,
    checkpoint: str | PathLike[str] | None = None,
    memory_budget: str | int | None = None,
) -> GraphModule:
    """Capture (unless captured), prepare, calibrate and convert in one call.

    Args:
        model: a module, or a graph from `capture` or `torch.export`; it is not changed.
        example_inputs: a tuple of tensors, any batch size.
        batches: calibration batches; see `calibrate`.
        config: how to quantize; default `QuantConfig()`.
        seconds, progress, checkpoint, memory_budget: see `calibrate`.

    Returns a `torch.fx.GraphModule` that is called like the model and returns its structure.
    """
    with timed(seconds, "capture"):
        graph = capture(model, example_inputs)
        prepared = prepare(graph, config or QuantConfig())
    calibrate(
        prepared, batches, seconds=seconds, progress=progress, checkpoint=checkpoint,
        memory_budget=memory_budget,
    )  # fmt: skip
    return convert(prepared)


@plain_conditions()
def lower(quantized: GraphModule, backend: str = "eager", **options: Any) -> GraphModule:
    """Lower a converted graph to a backend: "eager", "x86" or "cuda".

    See docs/x86.md and docs/backends.md for what they do and for options.

    Raises `ConfigError` for an unknown backend or option.
    """
    return lower_to(quantized, backend, **options)


def kernel_audit(lowered: GraphModule) -> list[LayerKernel]:
    """What computes each layer of a graph from `lower`: integer or not, by which kernel, why not.

    Raises `PreconditionError` for a graph that was not lowered.
    """
    return audit_of(lowered)


def simulate(calibrated: GraphModule, on: bool) -> GraphModule:
    """Switch a calibrated graph's quantizers on, or off for floating point, in place."""
    for node in fake_quant_nodes(calibrated):
        module = fake_quant_of(calibrated, node)
        if on and not module.calibrated:
            raise NotCalibratedError(f"{module.name} has no scale: calibrate first")
    set_mode(calibrated, Mode.ON if on else Mode.OFF)
    return calibrated


def compensations(quantized: GraphModule) -> dict[str, dict[str, Any]]:
    """The compensation of each compensated block.

    Returns `{block: {"W": (in, out), "b": (out,), "kind": str, "r2": float, "r2_held_out": float |
    None}}`; W and b float32 tensors. W acts on the block's input, for "int8" on the dequantized input
    of the block's first linears. W and b are `None` for "affine", which is folded into the block's
    last linear.
    """
    tensors = compensation_tensors(quantized)
    applied = {}
    for block, record in graph_info(quantized).compensations.items():
        if record["applied"]:
            weight, bias = tensors.get(block, (None, None))
            applied[block] = {"W": weight, "b": bias}
            applied[block] |= {key: record[key] for key in ("kind", "r2", "r2_held_out")}
    return applied


def report(quantized: GraphModule) -> dict[str, Any]:
    """The report of one quantized graph, every key of report.json, `None` where not measured."""
    config = config_of(quantized)
    size = {"compensation_bytes": compensation_bytes(quantized)}
    return build_report({"model": quantized}, config, size=size)


@plain_conditions()
def save(quantized: GraphModule, path: str | PathLike[str], *, force: bool = False) -> None:
    """Save one converted graph as an artifact directory, atomically.

    Raises `ArtifactError` for a graph that cannot be stored, `OutputError` for a target that must
    not be replaced.
    """
    save_graph(quantized, Path(path), force=force)


@plain_conditions()
def load(path: str | PathLike[str]) -> GraphModule:
    """Load a graph saved by `save`; its results are bit-identical.

    Raises `ArtifactError` for a damaged artifact, or one of the CLI, which `clip.load` reads.
    """
    return load_graph(Path(path))


@plain_conditions()
def export(
    quantized: GraphModule,
    path: str | PathLike[str],
    example_inputs: tuple[Any, ...] | Tensor,
    *,
    format: str = "onnx",
    pack: str = "auto",
    input_names: tuple[str, ...] | None = None,
    output_names: tuple[str, ...] | None = None,
) -> None:
    """Write one converted graph for another runtime, atomically; batch and text length stay dynamic.

    The file is opened once by what checks its format before it gets its name. An ONNX file computes in
    float32, reads and returns float32, whatever the graph's precision.

    Args:
        quantized: a converted graph on the CPU.
        path: the file: `.onnx`, or `.pt2` for the formats pt2 and aoti.
        example_inputs: one tensor an input, any batch size.
        format: "onnx" (extra `onnx`); "pt2", torch.export's own; "aoti", an AOTInductor package.
        pack: how ONNX weights are stored. "auto": int8, or uint8 where int8 products could overflow
            on CPUs without VNNI; "int8": int8 with zero point 0, for OpenVINO; "int4": weights of
            at most 4 bits in 4 bits, which ONNX Runtime's CPU multiplies in floating point.
        input_names, output_names: names in the ONNX model, one each; by default the graph's own, and the
            fields' names where it returns a model output or a dict.

    Raises `ConfigError` for an unknown format or pack or another number of names, `MissingExtraError`
    without the extra, `PreconditionError` for a graph that is not converted or cannot be exported,
    `OutputError` when writing fails.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    export_graph(
        quantized, Path(path), inputs, format=format, pack=pack, input_names=input_names,
        output_names=output_names,
    )  # fmt: skip
