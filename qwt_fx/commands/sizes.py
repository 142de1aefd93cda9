"""Bytes of a model and of an artifact: the `size` entry of report.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwt_fx.artifact.artifact import Artifact
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import REPORT
from qwt_fx.clip.clip import ClipModel
from qwt_fx.commands.quantize.run_identity import read_report
from qwt_fx.quant.quantizers import compensation_bytes


def fp32_bytes(model: ClipModel, tower: str) -> int:
    """Bytes of a tower's parameters and persistent buffers in float32."""
    return sum(value.numel() * 4 for value in model.towers[tower].state_dict().values())


def artifact_size(
    folder: Path, artifact: Artifact, towers: Sequence[str], floating: ClipModel | None
) -> JsonObject:
    """The `size` entry of report.json for these towers of an artifact: what its files take.

    floating: the model it was made of; without it, `fp32_bytes` is what the artifact's report says.
    """
    known = (read_report(folder / REPORT) or {}).get("size") or {}
    exact = None if floating is None else sum(fp32_bytes(floating, tower) for tower in towers)
    return {
        "fp32_bytes": known.get("fp32_bytes") if exact is None else exact,
        "quantized_bytes": sum((folder / f"{t}.safetensors").stat().st_size for t in towers),
        "compensation_bytes": sum(compensation_bytes(artifact.towers[t]) for t in towers),
    }
