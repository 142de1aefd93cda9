"""Exports a converted graph to ONNX: QDQ nodes, integer initializers, a dynamic batch, float32 between.

What ONNX Runtime does with the file is read back by `qwt_fx.backends.onnx.onnx_runtime.audit`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import GraphModule

from qwt_fx.backends.exported_program import check_exportable, export_program
from qwt_fx.backends.onnx import names
from qwt_fx.backends.onnx.integer_product import MATMUL_INTEGER
from qwt_fx.backends.onnx.layout import Layout, WeightStorage, lay_out
from qwt_fx.backends.onnx.onnx_runtime import LAYERS_KEY, import_extra
from qwt_fx.backends.widening import as_float32
from qwt_fx.errors import PreconditionError, first_line
from qwt_fx.graph.aten import SDPA
from qwt_fx.graph.nodes import compute_nodes, layer_name
from qwt_fx.version import __version__

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

# A protobuf message holds less than 2 GiB; larger weights go to a file beside it.
_LARGEST_FILE = 1_900_000_000


def export_onnx(
    quantized: GraphModule,
    path: Path,
    example_inputs: tuple[Tensor, ...],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    storage: WeightStorage | None = None,
) -> None:
    """Write a converted graph as an ONNX model; the graph is not changed.

    Args:
        quantized: a graph on the CPU that reads and returns tensors.
        path: the file to write, not atomically: give a path in a folder of your own. Weights of
            more than 1.9 GB go to `<path>.data`.
        example_inputs: one tensor an input, any batch size; floating-point ones are float32 in the file.
        input_names, output_names: names in the model, one each; by default the graph's own, and the
            fields' names where it returns a model output or a dict.
        storage: how weights are stored.

    Raises `ConfigError` for another number of names, `MissingExtraError` without the extra `onnx`,
    `PreconditionError` for a graph that is not converted, cannot be stored, or that the exporter
    cannot translate.
    """
    for package in ("onnx_ir", "onnxscript"):
        import_extra(package, "onnx", "ONNX export")
    from qwt_fx.backends.onnx.model import drop_traces, name_products, store_weights

    check_exportable(quantized, example_inputs)
    input_names = names.input_names(quantized, input_names)
    output_names = names.output_names(quantized, output_names)
    storage = storage or WeightStorage()
    layout = lay_out(quantized, example_inputs, storage)
    program = _translate(layout, storage, example_inputs, input_names, output_names)
    model = program.model
    store_weights(model, layout.packed)
    name_products(model, _product_names(layout), layout.layer_of)
    drop_traces(model)
    model.metadata_props[LAYERS_KEY] = json.dumps(layout.reasons)
    model.producer_name, model.producer_version = "qwt-fx", __version__
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    program.save(str(path), external_data=size > _LARGEST_FILE)


def _translate(
    layout: Layout,
    storage: WeightStorage,
    example_inputs: tuple[Tensor, ...],
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ONNXProgram:
    import torch.onnx

    from qwt_fx.backends.onnx.operators import OPSET, OPSET_INT4, translations

    exported = export_program(layout.graph_module, tuple(as_float32(x) for x in example_inputs))
    opset = OPSET_INT4 if storage.int4 else OPSET
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the exporter says about itself
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=translations(opset),
            )
            assert program is not None  # of dynamo=True
            return program
    except Exception as error:  # the exporter raises many kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise PreconditionError(
            f"torch.onnx cannot translate the quantized graph: {first_line(cause)}"
        ) from error
    finally:
        log.setLevel(level)


def _product_names(layout: Layout) -> list[str]:
    """The layer of every product, in the order of the graph."""
    names: list[str] = []
    products = set(compute_nodes(layout.graph_module))
    for node in layout.graph_module.graph.nodes:
        if node not in products and node.target is not MATMUL_INTEGER:
            continue
        # Attention that could not be written out becomes two products.
        names += [layer_name(node)] * (2 if node.target is SDPA else 1)
    return names
