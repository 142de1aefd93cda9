"""QwT and its cheaper kin: repair each quantized block's error by closed-form regression.

    y = l_q(x) + f(...),   f = least squares of target - l_q(x) over the calibration tokens

f is a linear of the block's input as published (QwT, arXiv 2411.13918, eq. 4 and 5), or one of the
cheaper kinds of `qwt_fx.compensators`. Blocks are done in order, so x is the output of the quantized
and compensated prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx.channel_affine import AffineFit
from qwt_fx.compensation_kind import parse_compensation
from qwt_fx.compensation_sites import NoSite
from qwt_fx.compensators import Compensator, Site, compensator
from qwt_fx.errors import ConfigError, DataError, PreconditionError
from qwt_fx.fake_quant import Mode
from qwt_fx.graph import Block, find_node, graph_info
from qwt_fx.heap import release_freed
from qwt_fx.hold_out import held_out_samples
from qwt_fx.journal import NO_JOURNAL, Journal
from qwt_fx.norms import fake_quant_of, is_fake_quant
from qwt_fx.pass_base import Change, Pass, Skip
from qwt_fx.precision import wide
from qwt_fx.regression import Fit
from qwt_fx.runner import BlockRunner, Subgraph, start
from qwt_fx.sample_ids import sample_ids
from qwt_fx.share import Share
from qwt_fx.token_map import token_masks
from qwt_fx.value_store import ValueStore

TARGETS = ("local", "fp")


@dataclass(frozen=True)
class InsertCompensation(Pass):
    """Compensate every transformer block where it helps.

    Attributes:
        reference: the floating-point graph the quantized one was made from.
        batches: calibration batches, a list of tuples of tensors (or of tensors).
        kind: "qwt", "affine", "lowrank:R" (R at least 1; at most the width is used) or "int8".
        target: what a block's output should be: "local", the floating-point block on the quantized
            path's input, as published; "fp", the floating-point path's own output, so that errors
            from before the block are repaired, too.
        hold_out: share of the samples, in [0, 0.5), that chooses the ridge and decides whether a
            block is compensated: only with a positive R^2 there. 0 fits and judges on every
            sample by minimum-norm least squares, as published.
        token_masks: leave out text positions that provably cannot matter.
        half: store weights in half precision (they are read back as float32); one that overflows
            half precision stays in float32.
        progress: called as progress(blocks done, blocks).
        journal: keeps the fit of each block, and is committed after each.
        store: keeps the activations at the block reached.

    A block compensated before is skipped. Raises `DataError` naming the block for values that are not
    finite, `ConfigError` for an unknown kind or target,
    `PreconditionError` when the graphs' blocks differ or a quantizer has not been observed.
    """

    reference: GraphModule
    batches: Any
    kind: str = "qwt"
    target: str = "local"
    hold_out: float = 0.2
    token_masks: bool = True
    half: bool = True
    progress: Any = field(default=None, compare=False)
    journal: Journal = field(default=NO_JOURNAL, compare=False)
    store: ValueStore = field(default_factory=ValueStore, compare=False)

    preserves_fp: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if parse_compensation(self.kind).name == "none":
            raise ConfigError("InsertCompensation.kind: got 'none': leave the pass out instead")
        if self.target not in TARGETS:
            raise ConfigError(
                f"InsertCompensation.target: got {self.target!r}, wanted one of "
                f"{', '.join(TARGETS)}"
            )
        if not 0.0 <= self.hold_out < 0.5:
            raise ConfigError(f"InsertCompensation.hold_out: got {self.hold_out}, wanted [0, 0.5)")
        Share.of(self.batches)

    def requires(self, gm: GraphModule) -> None:
        """The graphs must hold the same blocks, and every quantizer must be ready."""
        super().requires(gm)
        ours = [b.name for b in graph_info(gm).blocks]
        theirs = [b.name for b in graph_info(self.reference).blocks]
        if ours != theirs:
            raise PreconditionError(
                f"the quantized graph has blocks {ours}, the reference has {theirs}: "
                "give the graph that the quantized one was made from"
            )
        for node in gm.graph.nodes:
            if is_fake_quant(gm, node):
                module = fake_quant_of(gm, node)
                if not module.calibrated:
                    raise PreconditionError(f"{module.name} has not been observed")
                if module.mode is not Mode.ON:
                    raise PreconditionError(f"{module.name} is switched {module.mode.value}")

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        info = graph_info(gm)
        if not info.blocks:
            yield Skip("graph", "no transformer block was found")
            return
        if self.hold_out > 0.0 and Share.of(self.batches).samples < 2:
            yield Skip("graph", "one calibration sample: none can be held out")
            return
        with torch.no_grad():
            walk = _Walk(self, gm)
            for index in range(len(info.blocks)):
                yield walk.block(index)
                release_freed()
                self.journal.commit()
                if self.progress is not None:
                    self.progress(index + 1, len(info.blocks))
            walk.quantized.release()
            walk.floating.release()


class _Walk:
    """Both graphs at the block reached."""

    def __init__(self, compensation: InsertCompensation, gm: GraphModule) -> None:
        self.gm = gm
        self.settings = compensation
        self.reference = compensation.reference
        self.kind = parse_compensation(compensation.kind)
        self.compensator: Compensator = compensator(self.kind, compensation.half)
        self.share = Share.of(compensation.batches)
        self.batches = self.share.batches
        self.sizes = self.share.of_mine(self.share.sizes)
        self.quantized = BlockRunner(gm, self.batches, compensation.store)
        self.floating = BlockRunner(self.reference, self.batches, compensation.store)
        held_out = held_out_samples(self.share.samples, compensation.hold_out)
        self.judges = self.share.of_mine(torch.split(held_out, self.share.sizes))
        # Block by block: compensating a block renames the next one's input.
        boundary = [find_node(gm, b.input) for b in graph_info(gm).blocks]
        constant = graph_info(gm).constant_token is not None
        masked = compensation.token_masks
        proofs = token_masks(gm, self.batches, boundary) if masked or constant else []
        self.masks: list[list[Tensor | None]] = [
            [p.counting(source.name, behind_end=masked, first=not constant) for p in proofs]
            or [None] * len(self.batches)
            for source in boundary
        ]

    def block(self, index: int) -> Change | Skip:
        """Compensate one block where it helps."""
        gm, info = self.gm, graph_info(self.gm)
        block = info.blocks[index]
        if info.compensations.get(block.name, {}).get("applied"):
            return Skip(block.name, "compensated already")
        source, result = find_node(gm, block.input), find_node(gm, block.output)
        try:
            site = self.compensator.site(gm, block.name, source, result)
        except NoSite as error:
            return Skip(block.name, str(error))
        self.quantized.advance(source)
        self.quantized.advance(result, keep=(source, site.regressor))
        first = self.quantized.envs[0]
        x, y = site.regressor_value(first[site.regressor]), first[result]
        if x.shape != y.shape:
            reason = f"its input {tuple(x.shape)} and output {tuple(y.shape)} differ"
            return Skip(block.name, reason)
        rows = [self._rows(site, i, mask) for i, mask in enumerate(self.masks[index])]
        if any(r is None for r in rows):
            return Skip(block.name, "which sample each of its tokens belongs to is not known")
        original = graph_info(self.reference).blocks[index]
        fit = self.settings.journal.once(
            f"compensation of {block.name}", lambda: self._fit(site, original, rows)
        )
        judged = fit.r2 if fit.r2_held_out is None else fit.r2_held_out
        record = info.compensations[block.name] = {
            "kind": str(self.kind),
            "target": self.settings.target,
            "r2": fit.r2,
            "r2_held_out": fit.r2_held_out,
            "ridge": fit.ridge,
            "applied": judged > 0.0,
            "parameters": 0,
            "macs": 0,
        }
        if not record["applied"]:
            return Skip(block.name, f"R^2 {judged:.4g} is not positive")
        inserted = self.compensator.insert(gm, site, fit)
        record |= {"parameters": inserted.parameters, "macs": inserted.macs}
        if inserted.output is result:  # folded away: the values at hand are from before
            assert isinstance(fit, AffineFit)
            for env in self.quantized.envs:
                env[result] = env[result] + fit.correction(env[site.regressor])
        else:
            info.blocks[:] = [_moved(b, result.name, inserted.output.name) for b in info.blocks]
            self.quantized.advance(inserted.output)
        return Change(block.name, f"{self.kind}, R^2 {judged:.4g}")

    def _fit(self, site: Site, original: Block, rows: list[Any]) -> Any:
        """Fit the error of a block; `original` is its record in the reference."""
        envs = self.quantized.envs
        width, outputs = envs[0][site.regressor].shape[-1], envs[0][site.result].shape[-1]
        device = envs[0][site.result].device
        both = [self.compensator.empty(width, outputs, device) for _ in range(2)]
        targets = self._targets(site, original)

        def parts(index: int) -> Iterator[tuple[int, list[Tensor]]]:
            env, target = envs[index], next(targets)
            x = site.regressor_value(env[site.regressor]).reshape(-1, width)
            error = (wide(target) - wide(env[site.result])).reshape(-1, outputs)
            if not bool(torch.isfinite(x).all() and torch.isfinite(error).all()):
                raise DataError(
                    f"{site.name}: NaN or infinite values in this block's input or output; check the "
                    "weights and the calibration inputs"
                )
            for which, chosen in enumerate(rows[index]):  # those that fit, those that judge
                if bool(chosen.any()):
                    yield which, both[which].part(x[chosen], error[chosen])

        for which, part in self.share.in_order(parts):
            both[which].merge(part)
        train, judge = both
        held_out = judge if self.settings.hold_out > 0.0 else None
        fitted = self.share.ranks.from_first(lambda: vars(self.compensator.fit(train, held_out)))
        return (AffineFit if self.kind.name == "affine" else Fit)(**fitted)

    def _targets(self, site: Site, original: Block) -> Iterator[Tensor]:
        """What the block's output should be, batch by batch."""
        end = find_node(self.reference, original.output)
        if self.settings.target == "fp":
            self.floating.advance(end)
            yield from (env[end] for env in self.floating.envs)
            return
        function = Subgraph(self.reference, find_node(self.reference, original.input), end)
        for env, batch in zip(self.quantized.envs, self.batches, strict=True):
            yield function(start(self.reference, batch), env[site.source])

    def _rows(self, site: Site, index: int, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Which rows of a batch fit and which judge, bool (rows,) each; `None` if it is not known."""
        y = self.quantized.envs[index][site.result]
        keep = torch.ones(y.shape[:-1].numel(), dtype=torch.bool, device=y.device)
        if mask is not None:
            keep &= mask.reshape(-1)
        if self.settings.hold_out == 0.0:
            return keep, torch.zeros_like(keep)
        samples = sample_ids(site.result, y.shape, self.sizes[index])
        if samples is None:
            return None
        judged = self.judges[index][samples].to(y.device)
        return keep & ~judged, keep & judged


def _moved(block: Block, old: str, new: str) -> Block:
    """The block record after its boundary value `old` became `new`."""
    return Block(
        block.name,
        new if block.input == old else block.input,
        new if block.output == old else block.output,
    )
