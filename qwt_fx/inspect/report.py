"""`report.json`: every key of the contract, `null` where nothing was measured."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.settings import settings_of
from qwt_fx.evaluate.retrieval import CROSS_RECALLS, CROSS_SIDES, RECALLS, RETRIEVAL_COUNTS
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import compute_nodes, layer_name
from qwt_fx.measure.kernel_audit import LayerKernel
from qwt_fx.quant.quantizers import activations_of, operand_bits
from qwt_fx.version import __version__

SCHEMA = 1
SETTINGS = (
    "model", "pretrained", "recipe", "compat", "towers", "w_bits", "a_bits", "compensation",
    "attention", "activations", "seed",
)  # fmt: skip
CALIBRATION = (
    "samples", "batches", "skipped_samples", "shards", "shards_touched", "bytes_read",
)  # fmt: skip
PHASES = ("capture", "calibrate", "reparameterize", "compensate", "evaluate", "total")


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def layer_rows(
    gm: GraphModule, tower: str, kernels: Sequence[LayerKernel] | None = None
) -> list[JsonObject]:
    """One row per linear, convolution, matmul and attention: quantized how, or why not.

    `kernels`: the audit of the graph as a backend lowered it; `None` when none did, and then
    `integer_kernel` is `None`. A quantized layer that runs in floating point says why.
    """
    info = graph_info(gm)
    audit = {kernel.name: kernel for kernel in kernels or ()}
    reasons = {node: reason for record in info.passes for node, reason in record["skips"]}
    rows = []
    for node in compute_nodes(gm):
        name = layer_name(node)
        weight_bits, activation_bits = operand_bits(gm, node)
        reason = reasons.get(name)
        if weight_bits is None and activation_bits is None and reason is None:
            reason = "compensation, half precision" if ".compensation" in name else "not quantized"
        reason = reason if weight_bits is None or activation_bits is None else None
        kernel = audit.get(name)
        rows.append(
            {
                "name": name,
                "tower": tower,
                "w_bits": weight_bits,
                "a_bits": activation_bits,
                "activations": activations_of(gm, node),
                "sqnr_db": info.layers.get(name, {}).get("sqnr_db"),
                "integer_kernel": None if kernel is None else kernel.integer,
                "reason": reason or (None if kernel is None else kernel.reason),
            }
        )
    return rows


def block_rows(gm: GraphModule, tower: str) -> list[JsonObject]:
    """One row per transformer block; what its compensation stores, and its MACs per token."""
    info = graph_info(gm)
    rows = []
    for block in info.blocks:
        compensation = info.compensations.get(block.name, {})
        rows.append(
            {
                "name": block.name,
                "tower": tower,
                "r2": compensation.get("r2"),
                "r2_held_out": compensation.get("r2_held_out"),
                "applied": bool(compensation.get("applied", False)),
                "parameters": int(compensation.get("parameters", 0)),
                "macs": int(compensation.get("macs", 0)),
            }
        )
    return rows


def skip_rows(gm: GraphModule) -> list[dict[str, str]]:
    """One row per site a pass left as it was."""
    return [
        {"pass": record["pass"], "node": node, "reason": reason}
        for record in graph_info(gm).passes
        for node, reason in record["skips"]
    ]


def empty_report() -> JsonObject:
    """Every key, nothing measured."""
    return {
        "schema": SCHEMA,
        "qwt_fx": __version__,
        "torch": torch.__version__,
        **dict.fromkeys(SETTINGS),
        "calibration": dict.fromkeys(CALIBRATION),
        "metrics": {
            "fp32": _accuracies(),
            "quantized": _accuracies()
            | {
                "agreement": None,
                "acc1_drop_ci": None,
                "mcnemar": {"only_fp32": None, "only_quantized": None, "p": None},
                "embedding_sqnr_db": {"image": None, "text": None},
            },
            "cross_precision": {side: dict.fromkeys(CROSS_RECALLS) for side in CROSS_SIDES},
            "retrieval": dict.fromkeys(RETRIEVAL_COUNTS),
        },
        "size": {"fp32_bytes": None, "quantized_bytes": None, "compensation_bytes": None},
        "seconds": dict.fromkeys(PHASES),
        "peak_rss_bytes": None,
        "processes": {"count": None, "wire_bytes": None},
        "run": {"digest": None, "settings": None},
        "layers": [],
        "blocks": [],
        "skips": [],
    }


def _accuracies() -> JsonObject:
    """What is measured of each model alone."""
    keys = ("acc1", "acc1_ci", "acc5", "mean_per_class_recall", "n", *RECALLS)
    return dict.fromkeys(keys)


def build_report(
    graphs: Mapping[str, GraphModule],
    config: QuantConfig | None = None,
    kernels: Mapping[str, Sequence[LayerKernel]] | None = None,
    **known: Any,
) -> JsonObject:
    """The report of some quantized towers, by name; `known` fills or replaces top-level keys.

    `kernels`: by tower, what computes each layer as a backend lowered it.
    A mapping given for a key is merged into that key's mapping, so that no key ever disappears.
    """
    report = empty_report()
    report["peak_rss_bytes"] = peak_rss_bytes()
    report["towers"] = list(graphs)
    if config is not None:
        for key in ("recipe", "compat", "w_bits", "a_bits", "attention", "activations"):
            report[key] = getattr(config, key)
        compensation = settings_of(config).compensation
        report["compensation"] = "none" if compensation is None else compensation.kind
    for tower, gm in graphs.items():
        report["layers"] += layer_rows(gm, tower, (kernels or {}).get(tower))
        report["blocks"] += block_rows(gm, tower)
        report["skips"] += skip_rows(gm)
    for key, value in known.items():
        _merge(report, key, value)
    return report


def _merge(report: JsonObject, key: str, value: Any) -> None:
    if isinstance(value, Mapping) and isinstance(report.get(key), dict):
        for inner, item in value.items():
            _merge(report[key], inner, item)
    else:
        report[key] = value


def to_json(report: JsonObject) -> str:
    """The report as JSON text; numbers that JSON cannot say are refused by a ValueError."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"
