"""Captures a model into a canonical ATen graph with a dynamic batch dimension.

A graph that `torch.export` made already is taken as it is, if its batch dimension is dynamic.

A text tower of which it is proved that nothing behind the end of a text matters gets a dynamic
length as well (`text.end_of_text`). `torch.export` does the capture; `capture.canonicalize`
then removes what it adds for its own checks and what computes nothing, and leaves no literal device
in the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Node

from qwt_fx.capture.batch_norm import fold_batch_norms
from qwt_fx.capture.blocks import find_blocks, module_path
from qwt_fx.capture.canonicalize import canonicalize
from qwt_fx.capture.contexts import refuse_autocast
from qwt_fx.capture.example_inputs import (
    argument_names,
    batch_size,
    require_dtype,
    with_two_samples,
)
from qwt_fx.capture.export_conditions import export_conditions
from qwt_fx.capture.wrappers import unwrapped
from qwt_fx.errors import CaptureError
from qwt_fx.graph.aten import SDPA
from qwt_fx.graph.graph_info import GraphInfo, graph_info, has_graph_info, set_graph_info
from qwt_fx.graph.input_check import MAX_BATCH, inputs_of
from qwt_fx.graph.nodes import argument, compute_nodes, strip_weight
from qwt_fx.text.end_of_text import find_end_of_text
from qwt_fx.text.text_length import record_full_length, text_ids
from qwt_fx.text.token_ids import NotProved


def _export(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    names: Sequence[str],
    strict: bool,
    length: object = None,
) -> ExportedProgram:
    batch = Dim("batch", min=1, max=MAX_BATCH)
    values = dict(zip(names, (*args, *kwargs.values()), strict=True))
    sizes = {0: batch} if length is None else {0: batch, 1: length}
    dynamic = {
        name: sizes if isinstance(value, Tensor) and value.dim() > 0 else None
        for name, value in values.items()
    }
    try:
        return export(model, args, kwargs, dynamic_shapes=dynamic, strict=strict)
    except Exception as error:  # torch.export raises many kinds; each means "cannot capture"
        first = str(error).strip().splitlines() or [type(error).__name__]
        if "spatial_shapes" in names:
            raise CaptureError(
                f"{type(model).__name__} takes spatial_shapes, the shape of each image, which decides "
                "what is computed: capture it for one shape, by the module FixedShape of "
                "docs/howto/hugging-face.md"
            ) from error
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__} with a dynamic batch "
            f"dimension{'' if length is None else ' and length'}: {type(error).__name__}: {first[0]}"
        ) from error


def _name_layers(gm: GraphModule) -> None:
    """Name every multiplying node by its parameter, or by the module that made it."""
    used: dict[str, int] = {}
    for node in compute_nodes(gm):
        weight = argument(node, 1, "weight")
        if getattr(weight, "op", None) == "get_attr":
            name = strip_weight(str(weight.target))
        elif node.target is SDPA:
            name = module_path(node) or node.name
        else:
            name = f"{module_path(node)}.{node.name}".lstrip(".")
        count = used.get(name, 0)
        used[name] = count + 1
        # A module that is called twice gives two layers of one name.
        node.meta["layer"] = name if count == 0 else f"{name}@{count}"


def _is_exported(model: object) -> bool:
    """Whether this is a program of `torch.export`, or the module of one."""
    if isinstance(model, ExportedProgram):
        return True
    return isinstance(model, GraphModule) and all(
        "val" in node.meta for node in model.graph.nodes if node.op == "placeholder"
    )


def adopt(exported: ExportedProgram | GraphModule) -> GraphModule:
    """A graph made by `torch.export` as a captured graph; the graph given is not changed.

    Raises `CaptureError` for a graph that `torch.export` did not make, one of a fixed batch size, or one
    that writes to its inputs' memory.
    """
    if not _is_exported(exported):
        raise CaptureError(
            f"got a {type(exported).__name__} that torch.export did not make (its inputs have no "
            "recorded values); call qwt_fx.capture(model, example_inputs) on the model itself"
        )
    _require_dynamic_batch(exported)
    if isinstance(exported, ExportedProgram):
        gm = _captured(exported)
    else:
        if written := [node.name for node in exported.graph.nodes if _mutates(node)]:
            raise CaptureError(
                f"{written[0]} writes to its input: give the ExportedProgram instead of its module()"
            )
        gm = _canonical(copy.deepcopy(exported))
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if text_ids(tuple(node.meta["val"] for node in inputs)) is not None:
        graph_info(gm).fixed_length = "the graph was exported before qwt-fx saw the model"
    return gm


def _require_dynamic_batch(exported: ExportedProgram | GraphModule) -> None:
    given = exported.graph.nodes
    if isinstance(exported, ExportedProgram):  # its parameters are placeholders, too
        names = set(exported.graph_signature.user_inputs)
        given = [node for node in given if node.name in names]
    for node in given:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if isinstance(value.shape[0], int):
            raise CaptureError(
                f"input {node.name!r} was exported for a batch of {value.shape[0]} alone; export it "
                "with dynamic_shapes={'"
                + node.name
                + "': {0: torch.export.Dim('batch')}}, or call "
                "qwt_fx.capture(model, example_inputs) on the model itself"
            )


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[object, ...] | Tensor,
    kwargs: Mapping[str, object] | None = None,
    *,
    strict: bool = False,
) -> GraphModule:
    """See `qwt_fx.capture`, which tells as well whether the graph could be stored.

    Where a graph takes shorter ids, `GraphInfo.end_of_text` is set; otherwise `GraphInfo.fixed_length`
    says why not. `GraphInfo.inputs` says what else it may be called with.
    """
    if isinstance(model, GraphModule) and has_graph_info(model):
        return model
    if isinstance(model, ExportedProgram) or (
        isinstance(model, GraphModule) and _is_exported(model)
    ):
        return adopt(model)
    model = unwrapped(model)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple):
        raise CaptureError(
            f"example_inputs: got {type(example_inputs).__name__}, wanted a tuple of tensors"
        )
    named = dict(kwargs or {})
    names = argument_names(model, example_inputs, named)
    batch = batch_size(dict(zip(names, (*example_inputs, *named.values()), strict=True)))
    args = tuple(with_two_samples(value, batch) for value in example_inputs)
    named = {name: with_two_samples(value, batch) for name, value in named.items()}
    with export_conditions(model) as model:
        require_dtype(model, args, named)
        ids = text_ids((*args, *named.values()))
        if ids is None:
            return _captured(_export(model, args, named, names, strict))
        try:
            return _of_any_length(model, ids, next(iter(named), None), names, strict)
        except (CaptureError, NotProved) as failure:
            gm = _captured(_export(model, args, named, names, strict))
            graph_info(gm).fixed_length = str(failure)
            return gm


def _captured(program: ExportedProgram, full: Tensor | None = None) -> GraphModule:
    """The canonical graph; `full`, ids of full length, where the length is dynamic."""
    parts = [m for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    if any(_mutates(node) for part in parts for node in part.graph.nodes):
        refuse_autocast(program.graph_module)  # it would become casts
        program = program.run_decompositions({})  # functionalizes in-place ops, nothing else
    gm = program.module()
    if not isinstance(gm, GraphModule):
        raise CaptureError(f"torch.export returned {type(gm).__name__}, wanted a GraphModule")
    return _canonical(gm, full)


def _canonical(gm: GraphModule, full: Tensor | None = None) -> GraphModule:
    canonicalize(gm)
    if full is not None:
        record_full_length(gm, full)
    _name_layers(gm)
    gm._forward_pre_hooks.clear()  # export's own checks, which no copy of the graph keeps, ...
    gm._forward_hooks.clear()  # ... and what ends them
    fold_batch_norms(gm)
    set_graph_info(gm, GraphInfo(blocks=find_blocks(gm), inputs=inputs_of(gm)))
    return gm


def _of_any_length(
    model: nn.Module, full: Tensor, keyword: str | None, names: Sequence[str], strict: bool
) -> GraphModule:
    """Capture with a dynamic length. Raises where it fails, or where nothing proves its use.

    full: ids of full length; keyword: the input they are, where it is not the first positional one.
    """

    def inputs(ids: Tensor) -> tuple[tuple[object, ...], dict[str, object]]:
        return ((ids,), {}) if keyword is None else ((), {keyword: ids})

    def run(ids: Tensor) -> object:
        args, kwargs = inputs(ids)
        return model(*args, **kwargs)

    shorter = inputs(full[:, :-1].contiguous())
    # One below the context: export refuses a range that holds a size it took for another case,
    # and a cut of a whole table is one. Its guards are not kept, and full length is tried out.
    length = Dim("length", min=1, max=full.shape[1] - 1)
    gm = _captured(_export(model, *shorter, names, strict, length), full)
    end = find_end_of_text(gm, run, full)
    info = graph_info(gm)
    info.end_of_text, info.context_length = end.name, int(full.shape[1])
    return gm


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)
