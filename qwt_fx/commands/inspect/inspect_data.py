"""What `qwt-fx inspect` looks at, and everything it measures of it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.artifact.artifact import read_artifact
from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import REPORT
from qwt_fx.clip import clip
from qwt_fx.clip.clip import TOWERS, ClipModel
from qwt_fx.commands.arguments import quant_config, towers_of
from qwt_fx.commands.inputs import load_batches, load_model, require_same_inputs
from qwt_fx.commands.inspect.inspect_measure import kernels_of, latency_of, moved_ranges
from qwt_fx.commands.quantize.pipeline import capture_towers, config_of_tower, quantize_towers
from qwt_fx.commands.quantize.quantize import save_clip
from qwt_fx.commands.quantize.run_identity import read_report, run_identity
from qwt_fx.commands.reproduce import command_line
from qwt_fx.commands.screen import Screen
from qwt_fx.commands.sizes import artifact_size
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import compute_nodes, layer_name, weight_layers
from qwt_fx.inspect.inspection import inspect_rows, own_errors
from qwt_fx.inspect.page.data import STAGES, Absent, ChannelRanges, PageData, TowerData
from qwt_fx.inspect.report import block_rows, skip_rows
from qwt_fx.measure.layer_statistics import (
    LayerStatistics,
    contributions,
    layer_statistics,
    weight_histograms,
)
from qwt_fx.measure.machine import processor
from qwt_fx.measure.measure import block_sqnr

SAMPLES = 16  # of the first batch: statistics of values and contributions of layers
_NO_DATA, _ON_SCREEN = Absent(("--train-data",)), Absent(("--html",))
_NOT_QUANTIZED = Absent(why="this tower is not quantized")


@dataclass
class Subject:
    """What is inspected.

    Attributes:
        towers: quantized graphs by name; a model without calibration data is left in floating point.
        chosen: names of those that are to be quantized.
        floating: captured graphs of the floating-point model, when it is known.
        model: transform and examples; `None` for an artifact of one graph.
        batches: calibration batches; empty when none were given.
        captioned: these have captions.
        config: how the towers were quantized.
        folder: of the artifact.
        size: bytes of the quantized towers.
        settings: of the run that made the artifact, or of this one.
    """

    towers: dict[str, GraphModule]
    chosen: tuple[str, ...]
    floating: dict[str, GraphModule]
    model: ClipModel | None
    batches: Sequence[tuple[Tensor, Tensor]]
    config: QuantConfig
    folder: Path | None
    size: dict[str, float] | Absent
    settings: JsonObject | None = None
    captioned: bool = True

    def measured(self, tower: str) -> bool:
        """Whether there are inputs to measure a tower on."""
        return bool(self.batches) and (tower != "text" or self.captioned)

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the towers that hold quantizers."""
        return self.chosen if self.folder is not None or self.batches else ()

    def order(self, tower: str) -> list[str]:
        """Names of a tower's layers as they run."""
        return [layer_name(node) for node in compute_nodes(self.towers[tower])]

    def inputs(self, tower: str, index: int) -> tuple[Tensor]:
        """One calibration batch of one tower."""
        return (self.batches[index][TOWERS.index(tower)],)

    def first(self, tower: str) -> tuple[Tensor]:
        """The samples of one tower that layers are measured on."""
        return (self.inputs(tower, 0)[0][:SAMPLES],)


def open_subject(args: argparse.Namespace, screen: Screen) -> Subject:
    """The artifact, or the model, quantized here when calibration data are given."""
    if args.artifact is not None:
        return _of_artifact(args, screen)
    model = load_model(args)
    graphs = capture_towers(model, {})
    config, towers = quant_config(args), towers_of(args)
    size: dict[str, float] | Absent = _NO_DATA
    if args.train_data is None:
        return Subject(graphs, towers, graphs, model, [], config, None, size)
    data = load_batches(args, model, screen, 0, None, captioned="text" in towers)
    batches = data.batches
    result = quantize_towers(model, graphs, batches, config, towers, screen)
    settings = run_identity(args)["settings"]
    if config.compat == "original":
        size = Absent(why="a model of --compat original is not stored")
    elif not towers:
        size = Absent(why="no tower is quantized")
    elif args.html is not None:
        with tempfile.TemporaryDirectory() as folder:
            size = _size(save_clip(Path(folder), model, result, config, screen))
    return Subject(
        result.towers, towers, graphs, model, batches, config, None, size, settings, data.captioned
    )


def _of_artifact(args: argparse.Namespace, screen: Screen) -> Subject:
    folder = Path(args.artifact)
    artifact = read_artifact(folder)
    model = clip.from_artifact(artifact) if set(artifact.towers) == set(TOWERS) else None
    if model is None and (args.train_data is not None or args.model is not None):
        raise ConfigError(
            f"{folder} holds one graph, not a CLIP: --model and --train-data do not go with it"
        )
    floating: dict[str, GraphModule] = {}
    source = model
    if args.model is not None and model is not None:
        source = load_model(args)
        require_same_inputs(model, source)
        floating = capture_towers(source, {})
        _require_same_layers(args.model, artifact.towers, floating)
    quantized = tuple(artifact.extra.get("quantized_towers", list(artifact.towers)))
    batches: Sequence[tuple[Tensor, Tensor]] = []
    captioned = True
    if args.train_data is not None and source is not None:
        data = load_batches(args, source, screen, 0, None, captioned="text" in quantized)
        batches, captioned = data.batches, data.captioned
    size = _size(artifact_size(folder, artifact, quantized, source if floating else None))
    settings = ((read_report(folder / REPORT) or {}).get("run") or {}).get("settings")
    config = QuantConfig.from_dict(artifact.config)
    return Subject(
        dict(artifact.towers), quantized, floating, model, batches, config, folder, size, settings,
        captioned,
    )  # fmt: skip


def _require_same_layers(
    name: str, stored: Mapping[str, GraphModule], floating: Mapping[str, GraphModule]
) -> None:
    for tower, gm in floating.items():
        here, there = ({layer_name(n) for n in weight_layers(g)} for g in (gm, stored[tower]))
        if lacking := here - there:
            raise ConfigError(
                f"--model {name} is not what the artifact was made of: its {tower} tower has "
                f"{len(lacking)} layers that the artifact's lacks, such as {min(lacking)}"
            )


def _size(known: JsonObject) -> dict[str, float]:
    """Bytes of the quantized towers, of report.json's `size`."""
    size = {"FP32": float(known["fp32_bytes"])} if known["fp32_bytes"] else {}
    return size | {"quantized": float(known["quantized_bytes"])}


def gather(args: argparse.Namespace, subject: Subject, screen: Screen) -> PageData:
    """Everything the tables and the page show; what only the page shows is left out without it."""
    towers = [_tower(args, subject, name, gm, screen) for name, gm in subject.towers.items()]
    bits = f"W{subject.config.w_bits}/A{subject.config.a_bits}"
    title = str(subject.folder or "") if subject.model is None else subject.model.name
    mixed = ", mixed bits" if subject.config.overrides else ""
    state = f"{bits}{mixed}, recipe {subject.config.recipe}" if subject.quantized else "FP32"
    samples = len(subject.batches[0][0][:SAMPLES]) if subject.batches else 0
    return PageData(
        title=title,
        subtitle=state if subject.folder is None else f"{state}, artifact {subject.folder.name}",
        towers=towers,
        size=subject.size,
        config=subject.config.to_dict(),
        command=command_line(subject.settings),
        samples=samples,
        machine=f"{torch.get_num_threads()} threads of {processor()['name']}",
    )


def _lacks(subject: Subject, tower: str, *, compared: bool) -> Absent | None:
    """Why a part of a tower is not measured; `compared`: with the tower in floating point."""
    if subject.model is None:
        return Absent(why="an artifact of one graph takes no --model and no --train-data")
    if compared and tower not in subject.chosen:
        return _NOT_QUANTIZED
    floating = ("--model",) if compared and not subject.floating else ()
    if subject.batches and not subject.measured(tower):
        return Absent(why="the calibration data have no captions")
    data = () if subject.batches else _NO_DATA.flags
    return Absent((*floating, *data)) if floating or data else None


def _tower(
    args: argparse.Namespace, subject: Subject, name: str, gm: GraphModule, screen: Screen
) -> TowerData:
    statistics: dict[str, LayerStatistics] | None = None
    contributed: dict[str, float] | None = None
    if subject.measured(name):
        with screen.phase(f"{name} tower: measure layers"):
            statistics = layer_statistics(gm, subject.first(name))
            contributed = contributions(gm, subject.first(name), own_errors(gm, statistics))
    kernels = kernels_of(gm, screen, name) if name in subject.quantized else None
    seen = statistics or {}
    values = _lacks(subject, name, compared=False)
    compared = _ON_SCREEN if args.html is None else _lacks(subject, name, compared=True)
    return TowerData(
        name,
        inspect_rows(gm, name, kernels=kernels, statistics=statistics, contributed=contributed),
        block_rows(gm, name),
        skips=skip_rows(gm),
        weights=weight_histograms(gm),
        values=values or {layer: one.values for layer, one in seen.items()},
        ranges=compared or _ranges(subject, name, seen),
        stages=compared or _stages(args, subject, name, screen),
        latency=_ON_SCREEN if args.html is None else _latency(subject, name, screen),
    )


def _ranges(subject: Subject, name: str, after: dict[str, LayerStatistics]) -> list[ChannelRanges]:
    floating = subject.floating[name]
    return moved_ranges(floating, layer_statistics(floating, subject.first(name)), after)


def _latency(subject: Subject, name: str, screen: Screen) -> dict[str, float] | Absent:
    if subject.model is None:
        return Absent(why="an artifact of one graph holds no example of its input")
    if name not in subject.quantized:
        return _lacks(subject, name, compared=True) or _NOT_QUANTIZED
    graph, floating = subject.towers[name], subject.floating.get(name)
    return latency_of(subject.model, name, graph, floating, screen)


def _stages(
    args: argparse.Namespace, subject: Subject, name: str, screen: Screen
) -> dict[str, dict[str, float | None]] | Absent:
    """SQNR of every block at each stage; what the subject is not is quantized for it."""
    if args.no_stages:
        return Absent(why="left out by --no-stages")
    final, floating = subject.towers[name], subject.floating[name]
    inputs = [subject.inputs(name, index) for index in range(len(subject.batches))]
    plain = subject.config.replace(compat="none", compensation="none")
    compensated = any(record["applied"] for record in graph_info(final).compensations.values())
    configs = {
        STAGES[0]: plain.replace(reparameterization=0.0),
        STAGES[1]: plain if compensated else None,
        STAGES[2]: None if compensated else plain.replace(compensation="qwt"),
    }
    sqnr = {}
    for stage, config in configs.items():
        graph = final
        if config is not None:
            own = config_of_tower(config, subject.floating, name)
            with screen.phase(f"{name} tower: {stage}"):
                graph = api.quantize(floating, inputs[0], inputs, own)
        sqnr[stage] = block_sqnr(floating, graph, inputs[:1])
    return sqnr
