"""What `qwt-fx inspect` looks at, and everything it measures of it."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from qwt_fx.commands.inputs import load_batches, load_model
from qwt_fx.commands.inspect.inspect_measure import kernels_of, latency_of, moved_ranges
from qwt_fx.commands.quantize.pipeline import capture_towers, config_of_tower, quantize_towers
from qwt_fx.commands.quantize.quantize import save_clip
from qwt_fx.commands.quantize.run_identity import run_identity
from qwt_fx.commands.reproduce import command_line
from qwt_fx.commands.screen import Screen
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ConfigError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import compute_nodes, layer_name
from qwt_fx.inspect.inspection import inspect_rows, own_errors
from qwt_fx.inspect.page.data import STAGES, PageData, TowerData
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


@dataclass
class Subject:
    """What is inspected.

    Attributes:
        towers: quantized graphs by name; a model without calibration data is left in floating point.
        quantized: names of those that hold quantizers.
        floating: captured graphs of the floating-point model, when it is known.
        model: transform and examples; `None` for an artifact of one graph.
        batches: calibration batches; empty when none were given.
        config: how the towers were quantized.
        folder: of the artifact.
    """

    towers: dict[str, GraphModule]
    quantized: tuple[str, ...]
    floating: dict[str, GraphModule]
    model: ClipModel | None
    batches: Sequence[tuple[Tensor, Tensor]]
    config: QuantConfig
    folder: Path | None
    settings: JsonObject | None = None
    size: dict[str, float] = field(default_factory=dict)

    def order(self, tower: str) -> list[str]:
        """Names of a tower's layers as they run."""
        return [layer_name(node) for node in compute_nodes(self.towers[tower])]

    def inputs(self, tower: str, index: int) -> tuple[Tensor]:
        """One calibration batch of one tower."""
        return (self.batches[index][TOWERS.index(tower)],)


def open_subject(args: argparse.Namespace, screen: Screen) -> Subject:
    """The artifact, or the model, quantized here when calibration data are given."""
    if args.artifact is not None:
        return _of_artifact(args, screen)
    model = load_model(args)
    graphs = capture_towers(model, {})
    config, towers = quant_config(args), towers_of(args)
    if args.train_data is None:
        return Subject(graphs, (), graphs, model, [], config, None)
    batches = load_batches(args, model, screen, 0, None).batches
    result = quantize_towers(model, graphs, batches, config, towers, screen)
    settings = run_identity(args)["settings"]
    size = {}
    if args.html is not None and config.compat != "original":
        with tempfile.TemporaryDirectory() as folder:
            size = _size(save_clip(Path(folder), model, result, config, screen))
    return Subject(result.towers, towers, graphs, model, batches, config, None, settings, size)


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
    if args.model is not None:
        source = load_model(args)
        floating = capture_towers(source, {})
    batches: Sequence[tuple[Tensor, Tensor]] = []
    if args.train_data is not None and source is not None:
        batches = load_batches(args, source, screen, 0, None).batches
    default = list(artifact.towers)
    quantized = tuple(artifact.extra.get("quantized_towers", default))
    report = _report(folder)
    size = _size((report or {}).get("size") or {})
    settings = ((report or {}).get("run") or {}).get("settings")
    config = QuantConfig.from_dict(artifact.config)
    return Subject(
        dict(artifact.towers), quantized, floating, model, batches, config, folder, settings, size
    )


def _report(folder: Path) -> JsonObject | None:
    """The artifact's report; `None` where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def _size(known: JsonObject) -> dict[str, float]:
    """Bytes of the quantized towers, of report.json's `size`; empty where they are not known."""
    if known.get("quantized_bytes") is None:
        return {}
    size = {"FP32": float(known["fp32_bytes"])} if known.get("fp32_bytes") else {}
    return size | {"quantized": float(known["quantized_bytes"])}


def gather(args: argparse.Namespace, subject: Subject, screen: Screen) -> PageData:
    """Everything the tables and the page show; what only the page shows is left out without it."""
    paged = args.html is not None
    needs = _needs(args, subject)
    towers = []
    for name, gm in subject.towers.items():
        towers.append(_tower(args, subject, name, gm, screen, paged))
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
        needs=needs,
    )


def _needs(args: argparse.Namespace, subject: Subject) -> dict[str, str]:
    """By section, the flags that measure what is missing."""
    needs = {}
    data = [] if subject.batches else ["--train-data"]
    floating = [] if subject.floating else ["--model"]
    if data:
        needs["values"] = "--train-data"
    if data or floating:
        needs["ranges"] = needs["stages"] = " and ".join([*floating, *data])
    elif args.no_stages:
        needs["stages"] = "no --no-stages"
    if not subject.size.get("quantized"):
        needs["size"] = "--artifact with its report.json"
    if subject.model is None:
        needs["latency"] = "the artifact of a CLIP"
    return needs


def _tower(
    args: argparse.Namespace,
    subject: Subject,
    name: str,
    gm: GraphModule,
    screen: Screen,
    paged: bool,
) -> TowerData:
    quantized = name in subject.quantized
    statistics: dict[str, LayerStatistics] | None = None
    contributed: dict[str, float] | None = None
    if subject.batches:
        batch = (subject.inputs(name, 0)[0][:SAMPLES],)
        with screen.phase(f"{name} tower: measure layers"):
            statistics = layer_statistics(gm, batch)
            contributed = contributions(gm, batch, own_errors(gm, statistics))
    kernels = kernels_of(gm, screen, name) if quantized else None
    tower = TowerData(
        name,
        inspect_rows(gm, name, kernels=kernels, statistics=statistics, contributed=contributed),
        block_rows(gm, name),
        skips=skip_rows(gm),
        weights=weight_histograms(gm),
    )
    if statistics is not None:
        tower.values = {layer: seen.values for layer, seen in statistics.items()}
    if not paged or not quantized:
        return tower
    if statistics is not None and subject.floating:
        batch = (subject.inputs(name, 0)[0][:SAMPLES],)
        before = layer_statistics(subject.floating[name], batch)
        tower.ranges = moved_ranges(subject.floating[name], before, statistics)
        if not args.no_stages:
            tower.stages = _stages(subject, name, gm, screen)
    if subject.model is not None:
        tower.latency = latency_of(subject.model, name, gm, subject.floating.get(name), screen)
    return tower


def _stages(
    subject: Subject, name: str, final: GraphModule, screen: Screen
) -> dict[str, dict[str, float | None]]:
    """SQNR of every block at each stage; what the subject is not is quantized for it."""
    floating = subject.floating[name]
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
                graph = api.convert(api.calibrate(api.prepare(floating, own), inputs))
        sqnr[stage] = block_sqnr(floating, graph, inputs[:1])
    return sqnr
