"""The range of one quantizer from all batches, and what can be moved into weights before it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from qwt_fx.channel_map import NotMapped, value_map
from qwt_fx.errors import DataError
from qwt_fx.fake_quant import FakeQuant
from qwt_fx.graph import MATMULS, is_call, through_shape_ops
from qwt_fx.histogram import LARGEST, Histogram, Mass, gather_mass
from qwt_fx.layer_groups import LayerGroup, weight_quantizer
from qwt_fx.lockstep import Lockstep
from qwt_fx.norms import NORMS, is_fake_quant, norm_readers, why_not_reparameterizable
from qwt_fx.qparams import QuantSpec
from qwt_fx.range_search import search_range
from qwt_fx.rescale import (
    divide_constants,
    divide_norm,
    divide_rows,
    undo_in_columns,
    weight_and_bias,
)
from qwt_fx.rescale_search import Rescale, choose_rescale
from qwt_fx.sample_ids import batch_axis

aten = torch.ops.aten

_APART = 4.0  # a position this many times larger than the median one may get its own scale ...
_WORTH = 0.7  # ... where that leaves at most this share of the error


def fit_range(walk: Lockstep, group: LayerGroup, quantizer: FakeQuant) -> str:
    """Rescale what can be, then set the quantizer's qparams; says what was done.

    Raises `DataError` for values that are not finite.
    """
    remedies = walk.remedies
    histogram = _histogram(walk, group, quantizer.name)
    linears = [n for n in group.layers if n.target is aten.linear.default]
    weights = [weight_and_bias(walk.gm, n)[0] for n in linears]
    spec = replace(quantizer.spec.per_tensor(), include_zero=True)
    done, scale, shift = "one range", None, None
    if weights and len(linears) == len(group.layers) and not group.shared:
        rescale, what = _rescale(walk, group, histogram, weights, spec)
        if rescale is not None:
            scale, shift = rescale.scale, rescale.shift
            done = f"{what}, strength {rescale.strength:g}"
            weights = [weight_and_bias(walk.gm, n)[0] for n in linears]
    importance = torch.ones_like(histogram.total)
    if remedies.output_ranges and weights and len(importance) == weights[0].shape[1]:
        importance = torch.stack([w.double().square().sum(dim=0) for w in weights]).sum(dim=0)
    found = search_range(gather_mass(histogram.entries(), importance, scale, shift), spec)
    token_scale = _token_scale(walk, group) if remedies.token_scales else None
    if token_scale is not None:
        apart = search_range(_mass_apart(walk, group, token_scale, importance), spec)
        if apart.error < _WORTH * found.error:
            found = apart
            quantizer.token_scale = token_scale
            done += f", {int((token_scale != 1).sum())} positions with scales of their own"
    quantizer.spec = spec
    quantizer.set_qparams(found.scale, found.zero_point)
    return done


def _histogram(walk: Lockstep, group: LayerGroup, name: str) -> Histogram:
    source = group.source
    per_channel = bool(group.layers) and all(n.target is aten.linear.default for n in group.layers)
    values = walk.values(source)
    histogram = Histogram(values[0].shape[-1] if per_channel else 1, values[0].device)
    for index, x in enumerate(values):
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                f"{name}: NaN or infinite values in the tensor to quantize; "
                "check the weights and the calibration inputs"
            )
        if float(x.abs().amax()) > LARGEST:
            raise DataError(
                f"{name}: values up to {float(x.abs().amax()):g} in the tensor to quantize, wanted at "
                f"most 2^24; check the weights and the calibration inputs, or use "
                "--recipe repq-vit"
            )
        flat = x.reshape(-1, x.shape[-1])
        mask = walk.mask(source, index, behind_end=walk.remedies.mask_ranges)
        flat = flat if mask is None else flat[mask]
        histogram.add(flat if per_channel else flat.reshape(-1, 1))
    return histogram


def _rescale(
    walk: Lockstep, group: LayerGroup, histogram: Histogram, weights: list[Tensor], spec: QuantSpec
) -> tuple[Rescale | None, str]:
    """Move differences between channels upstream and into the weights, where that is possible."""
    gm, remedies = walk.gm, walk.remedies
    bits = [m.spec.bits for n in group.layers if (m := weight_quantizer(gm, n)) is not None]

    def choose(shifts: bool) -> Rescale:
        width = min(bits, default=None)
        return choose_rescale(histogram, weights, spec, width, remedies.strengths, shifts=shifts)

    origin = through_shape_ops(group.source)
    if is_call(origin, NORMS):
        readers = norm_readers(gm, origin)
        if why_not_reparameterizable(gm, origin) is not None or len(readers.fake_quants) != 1:
            return None, ""
        chosen = choose(origin.target is aten.layer_norm.default)
        divide_norm(gm, origin, chosen.scale, chosen.shift)
        _undo(walk, readers.linears, origin, chosen)
        return chosen, "moved into the norm"
    if not remedies.fold_values:
        return None, ""
    try:
        mapped = value_map(gm, group.source)
    except NotMapped:
        return None, ""
    # Rows of a softmax sum to 1, which carries a shift through; those of its quantized copy do not.
    fused = not is_call(mapped.attention, MATMULS)
    chosen = choose(fused or not is_fake_quant(gm, mapped.attention.args[0]))
    divide_rows(gm, mapped.producer, mapped.rows, chosen.scale, chosen.shift)
    divide_constants(gm, mapped.constants, mapped.rows, chosen.scale, chosen.shift)
    _undo(walk, group.layers, group.source, chosen)
    return chosen, "moved into the values"


def _undo(walk: Lockstep, linears: tuple[Node, ...], origin: Node, rescale: Rescale) -> None:
    for linear in linears:
        undo_in_columns(walk.gm, linear, rescale.scale, rescale.shift)
    walk.transform(origin, rescale)


def _token_scale(walk: Lockstep, group: LayerGroup) -> Tensor | None:
    """Powers of two that bring the few far larger positions down to the others.

    (length, 1) for values (samples, length, channels), (length, 1, 1) for (length, samples, channels);
    `None` where no position stands out, or too many do.
    """
    values = walk.values(group.source)
    batch = batch_axis(group.source)
    if values[0].dim() != 3 or batch not in (0, 1):
        return None
    largest = torch.stack([v.abs().amax(dim=(batch, 2)) for v in values]).amax(dim=0)
    if walk.first_is_constant:
        largest[0] = largest.median()
    ratio = largest / largest.median().clamp_min(torch.finfo(torch.float32).tiny)
    apart = ratio >= _APART
    if not bool(apart.any()) or int(apart.sum()) > max(1, len(ratio) // 8):
        return None
    factor = torch.where(apart, ratio.log2().ceil(), 0.0).exp2()
    return factor[:, None] if batch == 0 else factor[:, None, None]


def _mass_apart(walk: Lockstep, group: LayerGroup, token_scale: Tensor, importance: Tensor) -> Mass:
    """The values with every position divided by its scale, which multiplies its error again."""
    parts = []
    for factor in sorted(set(token_scale.flatten().tolist())):
        histogram = Histogram(len(importance), importance.device)
        chosen = token_scale.flatten() == factor
        if walk.first_is_constant:
            chosen[0] = False
        for x in walk.values(group.source):
            picked = x[:, chosen] if token_scale.dim() == 2 else x[chosen]
            histogram.add(picked.reshape(-1, len(importance)) / factor)
        parts.append(gather_mass(histogram.entries(), importance * factor**2))
    joined = (torch.cat([getattr(p, f) for p in parts]) for f in ("value", "half", "weight"))
    return Mass(*joined)
