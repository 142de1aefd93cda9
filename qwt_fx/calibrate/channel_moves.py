"""Differences between a value's channels that move out of it, into what makes it and into what reads it.

With scale r and shift t per channel, the quantizer reads x / r - t from now on: a norm or the linear
behind an attention's values makes that, or a product of its own, and the layers that read it take it
back. `find_move` only looks; `apply_move` edits the graph and what the walk holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.fx import Node

from qwt_fx.calibrate.layer_range import WORTH, RangeSearch
from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.graph.aten import LAYER_NORM, LINEAR, MATMULS
from qwt_fx.graph.nodes import is_call, through_shape_ops
from qwt_fx.numerics.rescale_search import Rescale
from qwt_fx.quant.channel_map import NotMapped, ValueMap, value_map
from qwt_fx.quant.fake_quant import is_fake_quant
from qwt_fx.quant.layer_groups import LayerGroup
from qwt_fx.quant.norms import NORMS, norm_readers, why_not_reparameterizable
from qwt_fx.quant.rescale import (
    divide_constants,
    divide_input,
    divide_norm,
    divide_rows,
    undo_in_columns,
)

# At so many bits a product of what an activation function makes gains little, and kernels that fuse
# the function with the next quantizer cannot fuse across it.
_FINE_ENOUGH = 8


@dataclass(frozen=True)
class MoveSite:
    """Where a value's channels can be divided, and who takes it back.

    Attributes:
        into: what divides them, as a report says it.
        name: of the node that does, as a journal has it.
        shifts: whether they may be shifted too.
        linears: read the divided value.
        divide: edits the graph, given scale and shift.
        origin: the node whose value is another one from then on; `None` where one is inserted.
    """

    into: str
    name: str
    shifts: bool
    linears: tuple[Node, ...]
    divide: Callable[[Tensor, Tensor], object]
    origin: Node | None


@dataclass(frozen=True)
class ChannelMove:
    """A rescale found on the calibration batches, and where it goes."""

    site: MoveSite
    rescale: Rescale


def find_move(search: RangeSearch) -> ChannelMove | None:
    """What to move out of a group's value; `None` where it stays as it is."""
    walk, group = search.walk, search.group
    if group.shared or not group.layers or any(n.target is not LINEAR for n in group.layers):
        return None
    if (site := _upstream(walk, group)) is not None:
        find = partial(search.rescale, shifts=site.shifts)
        return ChannelMove(site, walk.journal.once(f"rescale of {site.name}", find))
    if not walk.settings.input_scales or search.spec.bits >= _FINE_ENOUGH:
        return None
    rescale = walk.journal.once(f"product of the input of {search.name}", partial(_worth, search))
    return None if rescale is None else ChannelMove(_product(walk, group), rescale)


def apply_move(walk: PairedWalk, group: LayerGroup, move: ChannelMove) -> None:
    """Divide the value, undo that in its readers; the group's source changes where a node is new."""
    site, rescale = move.site, move.rescale
    site.divide(rescale.scale, rescale.shift)
    for linear in site.linears:
        undo_in_columns(walk.gm, linear, rescale.scale, rescale.shift)
    if site.origin is None:
        walk.reach(group.source)
    else:
        walk.rescaled(site.origin, rescale)


def _upstream(walk: PairedWalk, group: LayerGroup) -> MoveSite | None:
    """The norm or the attention's values that can make the divided value at no cost."""
    gm, origin = walk.gm, through_shape_ops(group.source)
    if is_call(origin, NORMS):
        readers = norm_readers(gm, origin)
        if why_not_reparameterizable(gm, origin) or len(readers.fake_quants) != 1:
            return None
        divide = partial(divide_norm, gm, origin)
        shifts = origin.target is LAYER_NORM
        return MoveSite("the norm", origin.name, shifts, readers.linears, divide, origin)
    if not walk.settings.fold_values:
        return None
    try:
        mapped = value_map(gm, group.source)
    except NotMapped:
        return None
    # Rows of a softmax sum to 1, which carries a shift through; those of its quantized copy do not.
    fused = not is_call(mapped.attention, MATMULS)
    return MoveSite(
        into="the values",
        name=mapped.producer.name,
        shifts=fused or not is_fake_quant(gm, mapped.attention.args[0]),
        linears=group.layers,
        divide=partial(_divide_values, walk, mapped),
        origin=group.source,
    )


def _divide_values(walk: PairedWalk, mapped: ValueMap, scale: Tensor, shift: Tensor) -> None:
    divide_rows(walk.gm, mapped.producer, mapped.rows, scale, shift)
    divide_constants(walk.gm, mapped.constants, mapped.rows, scale, shift)


def _product(walk: PairedWalk, group: LayerGroup) -> MoveSite:
    assert group.quantizer is not None  # a range is searched for one
    return MoveSite(
        into="a product of the input",
        name=group.quantizer.name,
        shifts=True,
        linears=group.layers,
        divide=partial(divide_input, walk.gm, group.quantizer),
        origin=None,
    )


def _worth(search: RangeSearch) -> Rescale | None:
    """A rescale by a product of its own, where that leaves far less error than none."""
    rescale = search.rescale(shifts=True)
    plain = search.rescale(shifts=False, strengths=(0.0,)).error
    if (apart := search.apart()) is not None:
        gained = search.whole().error - apart.range.error
        plain -= max(gained, 0.0)
    return None if rescale.error >= WORTH * plain else rescale
