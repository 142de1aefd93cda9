"""Every layer of a quantized graph in one row, the one that hurts most first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.inspect.report import layer_rows
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.measure.layer_statistics import LayerStatistics
from qwt_fx.measure.measure import mean_scales
from qwt_fx.quant.quantizers import qparams

CHANGED = 1.01  # a scale this factor away from the one calibration found was changed since


def scale_changes(gm: GraphModule) -> dict[str, float]:
    """By how much the scales of a layer differ from those calibration recorded, as a factor >= 1.

    The larger of input and weight; layers whose scales are as recorded, or unrecorded, are left out.
    """
    factors = {}
    for layer in weight_layers(gm):
        recorded = graph_info(gm).layers.get(layer_name(layer), {}).get("scales") or {}
        now = mean_scales(gm, layer)
        ratios = [
            now[side] / recorded[side]
            for side in now.keys() & recorded.keys()
            if now[side] > 0.0 and recorded[side] > 0.0
        ]
        factor = max((max(r, 1.0 / r) for r in ratios), default=1.0)
        if factor > CHANGED:
            factors[layer_name(layer)] = factor
    return factors


def own_errors(
    gm: GraphModule, statistics: Mapping[str, LayerStatistics] | None = None
) -> dict[str, float]:
    """Squared error of each quantized layer's output relative to its energy, by layer name.

    As calibration recorded it; a quantizer's error is proportional to its squared scale, so a scale
    changed since counts. Where data show more than that, what they show.
    """
    changes = scale_changes(gm)
    errors: dict[str, float] = {}
    for name, record in graph_info(gm).layers.items():
        if record.get("sqnr_db") is not None:
            errors[name] = 10.0 ** (-record["sqnr_db"] / 10.0) * changes.get(name, 1.0) ** 2
    for name, seen in (statistics or {}).items():
        if seen.error is not None:
            errors[name] = max(errors.get(name, 0.0), seen.error)
    return errors


def inspect_rows(
    gm: GraphModule,
    tower: str,
    *,
    kernels: Sequence[LayerKernel] | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    contributed: Mapping[str, float] | None = None,
) -> list[JsonObject]:
    """One row per layer: those whose scales were changed first, then by the error contributed.

    Beside the keys of report.json's `layers`: `input` and `weight`, (scale, zero point) as floats,
    means over channels, or `None`; `clipped`, a share; `contributed`, relative squared error of the
    model's output, `None` where there were no data; `scale_change`, a factor, or `None`; `kernel`.
    """
    changes, errors = scale_changes(gm), own_errors(gm, statistics)
    scales = qparams(gm)
    audit = {kernel.name: kernel for kernel in kernels or ()}
    rows = []
    for row in layer_rows(gm, tower, kernels):
        name = row["name"]
        seen = (statistics or {}).get(name)
        recorded = graph_info(gm).layers.get(name, {}).get("clipped")
        entry = scales.get(name, {})
        error = errors.get(name)
        kernel = audit.get(name)
        rows.append(
            row
            | {
                "sqnr_db": None if not error else -10.0 * math.log10(error),
                "input": _means(entry.get("input")),
                "weight": _means(entry.get("weight")),
                "clipped": recorded if seen is None or seen.clipped is None else seen.clipped,
                "contributed": (contributed or {}).get(name),
                "scale_change": changes.get(name),
                "kernel": None if kernel is None else kernel.kernel,
            }
        )

    def order(row: JsonObject) -> tuple[bool, float]:
        weight = row["contributed"]
        if weight is None:
            weight = errors.get(row["name"], -1.0)
        return row["scale_change"] is not None, weight

    return sorted(rows, key=order, reverse=True)


def _means(entry: tuple[Tensor, Tensor] | None) -> tuple[float, float] | None:
    if entry is None:
        return None
    scale, zero_point = entry
    return float(scale.double().mean()), float(zero_point.double().mean())
