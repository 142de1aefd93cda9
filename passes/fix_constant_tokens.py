"""Keeps keys and values of the start token in floating point.

Under a causal mask position 0 sees only itself, and every text begins with the same start token. Its
keys and values are then constants of each layer, often extreme ones: they are put into the graph, and
no quantizer's range has to make room for that position. The function stays exactly as it was for
texts that begin with the calibrated token, and is left alone, test by test, for any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batch, Batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.graph.edits import add_tensor, described
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import is_call, layer_name
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.graph.runner import placeholders, run_all, start
from qwt_fx.graph.sample_ids import batch_axis
from qwt_fx.quant.channel_map import feeds_attention
from qwt_fx.quant.fake_quant import Mode, set_mode
from qwt_fx.text.text_length import cut_to_length
from qwt_fx.text.token_ids import TokenMask
from qwt_fx.text.token_map import token_mask

aten = torch.ops.aten

_SAME = 1e-5  # relative difference between samples that rounding explains


@dataclass(frozen=True)
class FixConstantTokens(Pass):
    """Replace keys and values of position 0 by constants wherever the graph proves them constant.

    Attributes:
        batches: calibration batches, a list of tuples of tensors (or of tensors); the first is run
            in floating point, and every text of all batches must begin with the same id.

    A graph whose causality is not proved, or whose texts begin differently, is skipped with the
    reason. Run again, it finds the start token fixed and changes nothing.
    """

    batches: Batches

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        info = graph_info(gm)
        if info.constant_token is not None:
            yield Skip("graph", "its start token is fixed already")
            return
        batches = DistributedBatches.of(self.batches)
        first_batch = batches.batches[0]
        linears = [n for n in gm.graph.nodes if is_call(n, {LINEAR}) and feeds_attention(gm, n)]
        proof = token_mask(gm, first_batch, linears)
        reason = batches.ranks.from_first(lambda: proof.reason)
        if reason is not None:
            yield Skip("graph", reason)
            return
        starts = batches.in_order(lambda index: [_ids(gm, batches.batches[index])[:, 0].cpu()])
        found = list(starts)
        token = batches.ranks.from_first(lambda: _only(torch.cat(found)))
        if token is None:
            yield Skip("graph", "its texts begin with different tokens")
            return
        set_mode(gm, Mode.OFF)
        constants = batches.ranks.from_first(lambda: _constants(gm, first_batch, linears, proof))
        first: Node | None = None
        for linear, (why_not, is_first, row) in zip(linears, constants, strict=True):
            if why_not is not None:
                yield Skip(layer_name(linear), why_not)
                continue
            if first is None:
                first = _begins_with(gm, token)
            _replace(gm, linear, is_first, row, first)
            info.constant_token = token
            yield Change(layer_name(linear), "position 0 is a constant")


def _only(starts: Tensor) -> int | None:
    return int(starts[0]) if bool((starts == starts[0]).all()) else None


def _constants(
    gm: GraphModule, batch: Batch, linears: list[Node], proof: TokenMask
) -> list[tuple[str | None, Tensor | None, Tensor | None]]:
    """For each linear: why not, or which index of the axis of positions is position 0, bool
    (length,), and the output there, (outputs,).
    """
    values = _values(gm, batch, {n: proof.positions.get(n.name) for n in linears})
    found: list[tuple[str | None, Tensor | None, Tensor | None]] = []
    for linear in linears:
        if linear.name not in proof.positions:
            found.append(("its rows mix positions", None, None))
            continue
        (whole, rows), positions = values[linear], proof.positions[linear.name]
        spread = float((rows - rows[0]).abs().max())
        if spread > _SAME * float(rows.abs().max().clamp_min(1e-30)):
            found.append(("position 0 differs between samples", None, None))
            continue
        shape, samples = whole[:-1], batch_axis(linear)
        assert samples is not None and len(shape) == 2  # (samples, positions) in either order
        is_first = (positions.reshape(shape).select(samples, 0) == 0).cpu()
        found.append((None, is_first, rows[0].clone()))
    return found


def _ids(gm: GraphModule, batch: Batch) -> Tensor:
    ids: Tensor
    (ids,) = start(gm, batch).values()  # one input: the proof says so
    return ids


def _values(
    gm: GraphModule, batch: Batch, positions: dict[Node, Tensor | None]
) -> dict[Node, tuple[torch.Size, Tensor]]:
    """The shape of each linear's output, and its rows at position 0, in floating point.

    positions: of each linear's rows; one without them is left out.
    """
    found: dict[Node, tuple[torch.Size, Tensor]] = {}
    wanted = {user: linear for linear in positions for user in linear.users}

    def visit(node: Node, env: dict[Node, Any]) -> None:
        linear = wanted.get(node)
        if linear is None or linear not in env or (where := positions[linear]) is None:
            return
        value = env[linear]
        found[linear] = (value.shape, value.reshape(-1, value.shape[-1])[where == 0])

    run_all(gm, batch, visit)
    return found


def _begins_with(gm: GraphModule, token: int) -> Node:
    """A node: whether each sample begins with the token, bool (n,)."""
    (ids,) = placeholders(gm)
    last = max(placeholders(gm), key=lambda n: list(gm.graph.nodes).index(n))
    with gm.graph.inserting_after(last):
        chosen = gm.graph.call_function(aten.select.int, (ids, 1, 0))
    with gm.graph.inserting_after(chosen):
        equal = gm.graph.call_function(aten.eq.Scalar, (chosen, token))
    for node in (chosen, equal):
        value = ids.meta.get("val")
        if isinstance(value, Tensor):
            node.meta["val"] = value[:, 0] if node is chosen else value[:, 0] == token
    return equal


def _replace(gm: GraphModule, linear: Node, is_first: Tensor, row: Tensor, first: Node) -> None:
    """Put where(position 0 and a calibrated start, row, linear) behind the linear."""
    batch = batch_axis(linear)
    assert batch is not None  # `_constants` found it
    axis = 1 - batch
    mask_shape = [1, 1, 1]
    mask_shape[axis] = len(is_first)
    sample_shape = [1, 1]
    sample_shape[batch] = -1
    name = f"{layer_name(linear)}.start"
    readers = list(linear.users)
    with gm.graph.inserting_after(linear):
        constant = add_tensor(gm, f"{name}_value", row.detach().clone())
    with gm.graph.inserting_after(constant):
        every = add_tensor(gm, f"{name}_position", is_first.reshape(mask_shape).to(row.device))
    with gm.graph.inserting_after(every):
        position = cut_to_length(gm, every, axis)
    call = gm.graph.call_function
    with gm.graph.inserting_after(position):
        starts = call(aten.reshape.default, (first, [*sample_shape, 1]))
    with gm.graph.inserting_after(starts):
        mask = call(aten.logical_and.default, (position, starts))
    with gm.graph.inserting_after(mask):
        output = call(aten.where.self, (mask, constant, linear))
    output.meta |= described(linear)
    Correspondence.inserted(output, behind=linear)
    for reader in readers:
        reader.replace_input_with(linear, output)
