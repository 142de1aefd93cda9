"""What the page shows, gathered by the command; a part that was not measured is an `Absent`."""

from __future__ import annotations

from dataclasses import dataclass

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.measure.layer_statistics import LevelHistogram

# Series of the blocks' chart, in order.
STAGES = ("before reparameterization", "after RepQ", "after QwT")


@dataclass(frozen=True)
class Absent:
    """Stands where a part of the page would: it was not measured.

    flags: those that would measure it. why: where no flag would.
    """

    flags: tuple[str, ...] = ()
    why: str = ""

    @property
    def text(self) -> str:
        """What to do, or why nothing can be done: the end of a sentence."""
        return self.why or f"give {' and '.join(self.flags)}"


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
        skips: see `qwt_fx.inspect.report.skip_rows`.
        weights: how often each level is used.
        values: histograms of the layers' inputs.
        ranges: of layers behind norms.
        stages: stage -> block -> SQNR in dB.
        latency: runtime -> median seconds of one sample.
    """

    name: str
    rows: list[JsonObject]
    blocks: list[JsonObject]
    skips: list[dict[str, str]]
    weights: dict[str, LevelHistogram]
    values: dict[str, LevelHistogram] | Absent
    ranges: list[ChannelRanges] | Absent
    stages: dict[str, dict[str, float | None]] | Absent
    latency: dict[str, float] | Absent

    @property
    def absent(self) -> list[Absent]:
        """The parts that were not measured."""
        parts = (self.values, self.ranges, self.stages, self.latency)
        return [part for part in parts if isinstance(part, Absent)]


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
    """

    title: str
    subtitle: str
    towers: list[TowerData]
    size: dict[str, float] | Absent
    config: JsonObject
    command: str | None
    samples: int
    machine: str
