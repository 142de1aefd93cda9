"""What the page shows, gathered by the command; a part that is `None` says why it is missing."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.measure.layer_statistics import LevelHistogram

# Series of the blocks' chart, in order.
STAGES = ("before reparameterization", "after RepQ", "after QwT")


@dataclass(frozen=True)
class ChannelRanges:
    """Extremes of each channel of one layer's input, before and after reparameterization."""

    layer: str
    before_low: tuple[float, ...]
    before_high: tuple[float, ...]
    after_low: tuple[float, ...]
    after_high: tuple[float, ...]

    @property
    def unevenness(self) -> float:
        """How much wider the widest channel is than the mean one, before; what RepQ evens out."""
        widths = [b - a for a, b in zip(self.before_low, self.before_high, strict=True)]
        mean = sum(widths) / len(widths)
        return max(widths) / mean if mean > 0.0 else 1.0


@dataclass
class TowerData:
    """One tower.

    Attributes:
        name: "image", "text", or "model".
        rows: see `qwt_fx.inspect.inspection.inspect_rows`.
        blocks: see `qwt_fx.inspect.report.block_rows`.
        stages: stage -> block -> SQNR in dB; `None` when it was not measured.
        values: histograms of the layers' inputs; `None` when they were not measured.
        weights: how often each level is used.
        ranges: of layers behind norms; `None` when they were not measured.
        skips: see `qwt_fx.inspect.report.skip_rows`.
        latency: runtime -> median seconds of one sample; `None` when it was not measured.
    """

    name: str
    rows: list[JsonObject]
    blocks: list[JsonObject]
    stages: dict[str, dict[str, float | None]] | None = None
    values: dict[str, LevelHistogram] | None = None
    weights: dict[str, LevelHistogram] = field(default_factory=dict)
    ranges: list[ChannelRanges] | None = None
    skips: list[dict[str, str]] = field(default_factory=list)
    latency: dict[str, float] | None = None


@dataclass
class PageData:
    """The whole page.

    Attributes:
        title: of the model.
        subtitle: one line under it.
        towers: in the order shown.
        size: bytes by what takes them.
        config: the resolved configuration.
        command: reproduces the model; `None` when it is not known.
        samples: calibration pairs measured on; 0 when there were none.
        machine: where latencies were taken.
        needs: what flag would measure what is missing, by section.
    """

    title: str
    subtitle: str
    towers: list[TowerData]
    size: dict[str, float]
    config: JsonObject
    command: str | None
    samples: int
    machine: str
    needs: dict[str, str]
