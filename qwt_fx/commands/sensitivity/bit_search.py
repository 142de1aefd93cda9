"""The work of `qwt-fx sensitivity`: losses of every layer, trials of whole choices, kept on the way."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx import api
from qwt_fx.artifact.artifact import write_artifact
from qwt_fx.artifact.json_values import Json, JsonObject
from qwt_fx.checkpoint.resume_folder import ResumeFolder
from qwt_fx.clip.clip import TOWERS
from qwt_fx.commands.quantize.pipeline import config_of_tower
from qwt_fx.commands.screen import Screen
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.layer_bits import FLOAT_BITS
from qwt_fx.config.settings import settings_of
from qwt_fx.errors import ConfigError, OutputError
from qwt_fx.evaluate.metrics import NearestCaption
from qwt_fx.graph.nodes import weight_layers
from qwt_fx.measure.bit_losses import INPUT, WEIGHT, BitLoss, measure_bits
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.measure.mixed_precision import Choice, narrowest, overrides, weight_bytes

Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trial:
    """A whole model, quantized by plain RepQ-ViT, judged on calibration pairs.

    Attributes:
        bits: name of layer -> "wNaM".
        weight_bytes: packed codes of the weights searched.
        agreement: share of the images that keep their nearest caption.
        sqnr_db: of the embeddings, by tower.
    """

    bits: dict[str, str]
    weight_bytes: float
    agreement: float
    sqnr_db: dict[str, float]


class SearchState:
    """Losses and trials found so far, in a folder beside the output; `resume` goes on with them.

    Raises `OutputError` where `resume` finds a folder of other settings or data.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Json], *, resume: bool) -> None:
        self.losses: list[BitLoss] = []
        self.trials: list[Trial] = []
        self._folder: ResumeFolder | None = None
        if path is None:
            return
        other = OutputError(
            f"--resume: {path} is of other settings or data; leave --resume out to start anew"
        )
        self._folder = ResumeFolder.open(path, settings, lambda _: other, resume=resume)
        try:
            self.losses = [BitLoss.from_dict(row) for row in self._kept("losses")]
            self.trials = [Trial(**row) for row in self._kept("trials")]
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"--resume: {path} is damaged; remove it to start anew") from None

    def _kept(self, series: str) -> list[JsonObject]:
        assert self._folder is not None
        whole, rest = self._folder.records(series)
        if rest:
            raise ValueError
        return [json.loads(path.read_bytes()) for path in whole]

    def add_loss(self, loss: BitLoss) -> None:
        """Keep a loss."""
        self._keep("losses", len(self.losses), loss.to_dict())
        self.losses.append(loss)

    def add_trial(self, trial: Trial) -> None:
        """Keep a trial."""
        self._keep("trials", len(self.trials), asdict(trial))
        self.trials.append(trial)

    def _keep(self, series: str, number: int, row: JsonObject) -> None:
        if self._folder is not None:
            self._folder.write(number, json.dumps(row).encode(), series, ".json")

    def remove(self) -> None:
        """The search is over."""
        if self._folder is not None:
            self._folder.remove()


@dataclass
class BitSearch:
    """Captured towers, calibration pairs, and what is asked of them.

    Attributes:
        graphs: captured towers, image and text.
        towers: those that are quantized.
        config: the user's configuration; its overrides stay.
        widths: candidates, by operand; one in floating point has none.
        statistics: pairs that each layer is measured on, and that trials take their ranges from.
        judges: pairs that judge trials.
    """

    graphs: dict[str, GraphModule]
    towers: tuple[str, ...]
    config: QuantConfig
    widths: dict[str, list[int]]
    statistics: Pairs
    judges: Pairs
    state: SearchState
    screen: Screen
    _exact: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def base(self) -> QuantConfig:
        """The narrowest candidates everywhere, the user's overrides included."""
        bits = {WEIGHT: self.config.w_bits, INPUT: self.config.a_bits}
        bits |= {operand: min(widths) for operand, widths in self.widths.items() if widths}
        return self.config.replace(w_bits=bits[WEIGHT], a_bits=bits[INPUT])

    def measure(self) -> list[BitLoss]:
        """The losses of every tower; each is kept as soon as it is known."""
        images, texts = self._embed(self.statistics, "FP32")
        nearest = NearestCaption(images, texts, self.statistics[1])
        judges: dict[str, Callable[[Tensor], float]] = {
            "image": nearest.of_images,
            "text": nearest.of_texts,
        }
        known = list(self.state.losses)
        for tower in self.towers:
            prepared = api.prepare(
                self.graphs[tower], config_of_tower(self.base, self.graphs, tower)
            )
            total = len(list(weight_layers(prepared))) * sum(len(w) for w in self.widths.values())
            with self.screen.phase(f"{tower} tower: measure layers") as update:
                measured = measure_bits(
                    prepared,
                    (self.statistics[TOWERS.index(tower)],),
                    self.widths,
                    fixed=self.config.overridden,
                    judge=judges[tower],
                    known=known,
                )
                for done, loss in enumerate(measured):
                    if loss not in known:
                        self.state.add_loss(loss)
                    update(done + 1, total)
        if not self.state.losses:
            raise ConfigError("no layer is left to search: every one is skipped or overridden")
        return self.state.losses

    def config_for(self, choice: Choice) -> QuantConfig:
        """The configuration of a choice: one override a layer, the user's behind them."""
        return self.config.replace(
            w_bits=self.base.w_bits,
            a_bits=self._kept[INPUT],
            overrides=overrides(choice, self._kept) | dict(self.config.overrides),
        )

    @property
    def _kept(self) -> dict[str, int]:
        """Bits of what is not searched: floating point, or the widest candidate."""
        kept = {WEIGHT: self.config.w_bits, INPUT: self.config.a_bits}
        return kept | {operand: max(w) for operand, w in self.widths.items() if w}

    def try_out(self, choice: Choice) -> Trial:
        """The whole model at these widths, by plain RepQ-ViT, on the judging pairs."""
        bits = overrides(choice, self._kept)
        for trial in self.state.trials:
            if trial.bits == bits:
                return trial
        exact = self._exact = self._exact or self._embed(self.judges, "FP32")
        quantized = dict(self.graphs) | self._quantized(choice)
        embeddings = self._embed(self.judges, "trial", quantized)
        nearest = NearestCaption(*exact, self.judges[1])
        sqnr = {
            t: sqnr_db(exact[i], embeddings[i]) for i, t in enumerate(TOWERS) if t in self.towers
        }
        size = weight_bytes(self.state.losses, choice)
        trial = Trial(bits, size, nearest.of_both(*embeddings), sqnr)
        self.state.add_trial(trial)
        return trial

    def other_bytes(self) -> float:
        """Bytes of the towers' files beside the codes searched, from a plain trial that is stored."""
        choice = narrowest(self.state.losses)
        converted = {tower: api.convert(gm) for tower, gm in self._quantized(choice).items()}
        with tempfile.TemporaryDirectory() as folder:
            sizes = write_artifact(Path(folder), converted, config={}, extra={})
        return sum(sizes.towers.values()) - weight_bytes(self.state.losses, choice)

    def _quantized(self, choice: Choice) -> dict[str, GraphModule]:
        """The towers as the plain RepQ-ViT procedure makes them at these widths."""
        config = self.config_for(choice)
        plain = QuantConfig(
            w_bits=config.w_bits,
            a_bits=config.a_bits,
            recipe="repq-vit",
            compensation="none",
            attention=config.attention,
            activations=config.activations,
            overrides=config.overrides,
            embedding_bits=settings_of(config).embedding_bits,
        )
        calibrated = {}
        for tower in self.towers:
            prepared = api.prepare(self.graphs[tower], config_of_tower(plain, self.graphs, tower))
            calibrated[tower] = api.calibrate(prepared, [(self.statistics[TOWERS.index(tower)],)])
        return calibrated

    def _embed(
        self, pairs: Pairs, name: str, towers: Mapping[str, GraphModule] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (n, e) of both sides of the pairs."""
        chunks: list[list[Tensor]] = [[], []]
        size = len(self.statistics[0])
        count = -(-len(pairs[0]) // size)
        with self.screen.phase(f"{name}: embed") as update, torch.no_grad():
            for number in range(count):
                part = slice(number * size, (number + 1) * size)
                for index, tower in enumerate(TOWERS):
                    gm = (towers or self.graphs)[tower]
                    chunks[index].append(gm(pairs[index][part]))
                update(number + 1, count)
        return torch.cat(chunks[0]), torch.cat(chunks[1])


def candidates(
    config: QuantConfig, weights: Sequence[int], inputs: Sequence[int]
) -> dict[str, list[int]]:
    """Widths to try by operand; a side that the configuration leaves in floating point has none."""
    return {
        WEIGHT: [] if config.w_bits in FLOAT_BITS else sorted(set(weights)),
        INPUT: [] if config.a_bits in FLOAT_BITS else sorted(set(inputs)),
    }
