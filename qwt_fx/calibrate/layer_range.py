"""The range of one quantizer from all batches, and what can be moved into weights before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qwt_fx.calibrate.paired_walk import Lockstep
from qwt_fx.calibrate.position_scales import find_token_scale, histograms_apart, mass_apart
from qwt_fx.errors import DataError
from qwt_fx.graph.aten import MATMULS
from qwt_fx.graph.nodes import is_call, through_shape_ops
from qwt_fx.graph.sample_ids import sample_ids
from qwt_fx.numerics.histogram import LARGEST, Histogram
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.numerics.range_search import Range, search_range
from qwt_fx.numerics.rescale_search import Rescale, choose_rescale
from qwt_fx.numerics.split_histogram import Halves
from qwt_fx.quant.channel_map import NotMapped, ValueMap, value_map
from qwt_fx.quant.fake_quant import FakeQuant, is_fake_quant
from qwt_fx.quant.layer_groups import LayerGroup, weight_quantizer
from qwt_fx.quant.norms import NORMS, norm_readers, why_not_reparameterizable
from qwt_fx.quant.rescale import (
    divide_constants,
    divide_input,
    divide_norm,
    divide_rows,
    undo_in_columns,
    weight_and_bias,
)

aten = torch.ops.aten

# Positions get scales, or the input a product, where that leaves at most this share of the error.
_WORTH = 0.7
# At so many bits a product of what an activation function makes gains little, and kernels that fuse
# the function with the next quantizer cannot fuse across it.
_FINE_ENOUGH = 8

Histograms = Callable[[], Halves]
"""A group's histograms, counted when they are first asked for."""


def fit_range(walk: Lockstep, group: LayerGroup, quantizer: FakeQuant) -> str:
    """Rescale what can be, then set the quantizer's qparams.

    Returns what was done; the group's source has changed where its input got a product of its own.
    Raises `DataError` for values that are not finite.
    """
    # Counted when first asked for: before anything moves, and not at all where the journal knows.
    histograms = cache(partial(_histograms, walk, group, quantizer.name))
    spec = replace(quantizer.spec.per_tensor(), include_zero=True)
    linears = [n for n in group.layers if n.target is aten.linear.default]
    done, rescale = "one range", None
    if linears and len(linears) == len(group.layers) and not group.shared:
        rescale, done = _move_upstream(walk, group, histograms, spec)
        if rescale is None and walk.settings.input_scales and spec.bits < _FINE_ENOUGH:
            rescale = _multiply_input(walk, group, histograms, spec, quantizer.name)
            done = "one range" if rescale is None else "moved into a product of the input"
        if rescale is not None:
            done += f", strength {rescale.strength:g}"
    found, token_scale = walk.journal.once(
        f"range of {quantizer.name}", partial(_best_range, walk, group, histograms, spec, rescale)
    )
    if token_scale is not None:
        quantizer.token_scale = token_scale
        done += f", {int((token_scale != 1).sum())} positions with scales of their own"
    quantizer.spec = spec
    quantizer.set_qparams(found.scale, found.zero_point)
    return done


def _best_range(
    walk: Lockstep,
    group: LayerGroup,
    histograms: Histograms,
    spec: QuantSpec,
    rescale: Rescale | None,
) -> tuple[Range, Tensor | None]:
    """The range, and the positions' scales where these are worth it."""
    found = _search(walk, group, histograms, spec, rescale)
    if (apart := _search_apart(walk, group, spec)) is not None:
        token_scale, range_apart = apart
        if range_apart.error < _WORTH * found.error:
            return range_apart, token_scale
    return found, None


def _weights(walk: Lockstep, group: LayerGroup) -> list[Tensor]:
    linears = [n for n in group.layers if n.target is aten.linear.default]
    return [weight_and_bias(walk.gm, n)[0] for n in linears]


def _importance(walk: Lockstep, group: LayerGroup, channels: int) -> Tensor:
    """What a squared error of each channel counts, (channels,) float64."""
    weights = _weights(walk, group)
    if walk.settings.ranges == "output" and weights and channels == weights[0].shape[1]:
        return torch.stack([w.double().square().sum(dim=0) for w in weights]).sum(dim=0)
    device = walk.values(group.source)[0].device
    return torch.ones(channels, dtype=torch.float64, device=device)


def _search(
    walk: Lockstep,
    group: LayerGroup,
    histograms: Histograms,
    spec: QuantSpec,
    rescale: Rescale | None = None,
) -> Range:
    known = histograms()
    importance = _importance(walk, group, len(known.first.total))
    moves = () if rescale is None else rescale.apart

    def search() -> dict[str, Any]:
        weights = [importance] * max(len(moves), 1)
        return vars(search_range(known.mass(weights, moves), spec))

    return Range(**walk.share.ranks.from_first(search))


def _search_apart(
    walk: Lockstep, group: LayerGroup, spec: QuantSpec
) -> tuple[Tensor, Range] | None:
    """Scales of positions, and the range beside them; `None` where no position stands out."""
    token_scale = find_token_scale(walk, group) if walk.settings.token_scales else None
    if token_scale is None:
        return None
    channels = walk.values(group.source)[0].shape[-1] if _per_channel(group) else 1
    importance = _importance(walk, group, channels)
    histograms = histograms_apart(walk, group, token_scale, channels)

    def search() -> dict[str, Any]:
        return vars(search_range(mass_apart(histograms, importance), spec))

    return token_scale, Range(**walk.share.ranks.from_first(search))


def _per_channel(group: LayerGroup) -> bool:
    """Whether the channels' histograms are kept apart: linears read them with different weights."""
    return bool(group.layers) and all(n.target is aten.linear.default for n in group.layers)


def _histograms(walk: Lockstep, group: LayerGroup, name: str) -> Halves:
    """The values of all batches on the first rank, of none on the others."""
    source = group.source
    per_channel = _per_channel(group)
    values = walk.values(source)
    channels = values[0].shape[-1] if per_channel else 1
    halves = Halves(Histogram(channels, values[0].device), Histogram(channels, values[0].device))

    def parts(index: int) -> Iterator[tuple[int, list[Tensor]]]:
        x = values[index]
        low, high = torch.aminmax(x)  # NaN where any value is
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            raise DataError(
                f"{name}: NaN or infinite values in the tensor to quantize; "
                "check the weights and the calibration inputs"
            )
        if largest > LARGEST:
            raise DataError(
                f"{name}: values up to {largest:g} in the tensor to quantize, wanted at "
                "most 2^24; check the weights and the calibration inputs, or use "
                "--recipe repq-vit"
            )
        flat = x.reshape(-1, x.shape[-1])
        mask = walk.mask(source, index, behind_end=walk.settings.token_masks == "all")
        for half, chosen in _rows_of_halves(walk, source, x.shape, index):
            keep = mask if chosen is None else chosen
            if mask is not None and chosen is not None:
                keep = mask & chosen.to(mask.device)
            rows = flat if keep is None else flat[keep]
            yield half, Histogram.part(rows if per_channel else rows.reshape(-1, 1))

    for half, part in walk.share.in_order(parts):
        (halves.first, halves.second)[half].merge(part)
    return halves


def _rows_of_halves(
    walk: Lockstep, source: Node, shape: Sequence[int], index: int
) -> Iterator[tuple[int, Tensor | None]]:
    """Which half of the samples a batch belongs to, or, of the only batch, which of its rows do."""
    number, sizes = walk.share.numbers[index], walk.share.sizes
    ids = sample_ids(source, shape, sizes[0]) if len(sizes) == 1 else None
    if ids is None:
        yield number % 2, None
    else:
        for half in (0, 1):
            yield half, ids % 2 == half


def _move_upstream(
    walk: Lockstep, group: LayerGroup, histograms: Histograms, spec: QuantSpec
) -> tuple[Rescale | None, str]:
    """Move differences between channels into what makes the value, where that is possible."""
    gm = walk.gm
    origin = through_shape_ops(group.source)
    if is_call(origin, NORMS):
        readers = norm_readers(gm, origin)
        if why_not_reparameterizable(gm, origin) is None and len(readers.fake_quants) == 1:
            shifts = origin.target is aten.layer_norm.default
            find = partial(_choose, walk, group, histograms, spec, shifts=shifts)
            chosen = walk.journal.once(f"rescale of {origin.name}", find)
            divide_norm(gm, origin, chosen.scale, chosen.shift)
            _undo(walk, readers.linears, origin, chosen)
            return chosen, "moved into the norm"
    elif walk.settings.fold_values and (mapped := _value_map(walk, group)) is not None:
        # Rows of a softmax sum to 1, which carries a shift through; those of its quantized copy
        # do not.
        fused = not is_call(mapped.attention, MATMULS)
        shifts = fused or not is_fake_quant(gm, mapped.attention.args[0])
        find = partial(_choose, walk, group, histograms, spec, shifts=shifts)
        chosen = walk.journal.once(f"rescale of {mapped.producer.name}", find)
        divide_rows(gm, mapped.producer, mapped.rows, chosen.scale, chosen.shift)
        divide_constants(gm, mapped.constants, mapped.rows, chosen.scale, chosen.shift)
        _undo(walk, group.layers, group.source, chosen)
        return chosen, "moved into the values"
    return None, "one range"


def _multiply_input(
    walk: Lockstep, group: LayerGroup, histograms: Histograms, spec: QuantSpec, name: str
) -> Rescale | None:
    """Multiply the input by a constant per channel, where that leaves far less error."""

    def find() -> Rescale | None:
        chosen = _choose(walk, group, histograms, spec, shifts=True)
        plain = _choose(walk, group, histograms, spec, shifts=False, strengths=(0.0,)).error
        if (apart := _search_apart(walk, group, spec)) is not None:
            gained = _search(walk, group, histograms, spec).error - apart[1].error
            plain -= max(gained, 0.0)
        return None if chosen.error >= _WORTH * plain else chosen

    chosen: Rescale | None = walk.journal.once(f"product of the input of {name}", find)
    if chosen is None:
        return None
    assert group.quantizer is not None  # fit_range has one
    source = group.source
    divide_input(walk.gm, group.quantizer, chosen.scale, chosen.shift)
    for linear in group.layers:
        undo_in_columns(walk.gm, linear, chosen.scale, chosen.shift)
    walk.follow(source, group.source)
    return chosen


def _choose(
    walk: Lockstep,
    group: LayerGroup,
    histograms: Histograms,
    spec: QuantSpec,
    *,
    shifts: bool,
    strengths: tuple[float, ...] | None = None,
) -> Rescale:
    strengths = strengths or walk.settings.strengths
    modules = [weight_quantizer(walk.gm, n) for n in group.layers]
    bits = min((m.spec.bits for m in modules if m is not None), default=None)
    weights = _weights(walk, group)
    known = histograms()  # every rank has a part in it

    def choose() -> dict[str, Any]:
        return vars(choose_rescale(known, weights, spec, bits, strengths, shifts=shifts))

    return Rescale(**walk.share.ranks.from_first(choose))


def _value_map(walk: Lockstep, group: LayerGroup) -> ValueMap | None:
    try:
        return value_map(walk.gm, group.source)
    except NotMapped:
        return None


def _undo(walk: Lockstep, linears: tuple[Node, ...], origin: Node, rescale: Rescale) -> None:
    for linear in linears:
        undo_in_columns(walk.gm, linear, rescale.scale, rescale.shift)
    walk.transform(origin, rescale)
