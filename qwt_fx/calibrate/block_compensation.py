"""Repairs each quantized block's error by closed-form regression, where both graphs have been brought.

    y = l_q(x) + f(...),   f = least squares of target - l_q(x) over the calibration tokens

f is a linear of the block's input as published (QwT, arXiv 2411.13918, eq. 4 and 5), or one of the
cheaper kinds of `qwt_fx.calibrate.compensators`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.precision import wide
from qwt_fx.calibrate.compensation_sites import NoSite
from qwt_fx.calibrate.compensators import Site, compensator
from qwt_fx.checkpoint.journal import Journal
from qwt_fx.config.compensation_kind import CompensationSettings, parse_compensation
from qwt_fx.errors import DataError
from qwt_fx.graph.channel_axis import channel_axes
from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.graph.graph_info import Block, graph_info
from qwt_fx.graph.nodes import find_node, shape_of
from qwt_fx.graph.pass_base import Change, Skip
from qwt_fx.graph.runner import BlockRunner, Subgraph, start
from qwt_fx.graph.sample_ids import sample_ids
from qwt_fx.numerics.channel_affine import AffineFit
from qwt_fx.numerics.hold_out import held_out_samples
from qwt_fx.numerics.regression import Fit
from qwt_fx.text.token_ids import TokenMask

Rows = tuple[Tensor, Tensor]
"""Which rows of a batch fit and which judge, bool (rows,) each."""


class BlockCompensation:
    """Compensates block after block of a graph that a runner takes over the calibration batches.

    Each block's input is held until the block is done; what else is needed is run when it is.

    Args:
        settings: what is fitted.
        quantized: runs the quantized graph; its blocks up to the next one are calibrated.
        floating: runs the floating-point graph, and is not beyond the next block's output.
        batches: what both run.
        journal: keeps the fit of each block; the caller commits it.
        proofs: which rows count, of each batch, for every block's input; empty: all of them.
    """

    def __init__(
        self,
        settings: CompensationSettings,
        quantized: BlockRunner,
        floating: BlockRunner,
        batches: DistributedBatches,
        journal: Journal,
        proofs: Sequence[TokenMask],
    ) -> None:
        self.gm, self.reference = quantized.gm, floating.gm
        self._settings = settings
        self._quantized, self._floating = quantized, floating
        self._batches, self._journal, self._proofs = batches, journal, proofs
        self._kind = parse_compensation(settings.kind)
        self._compensator = compensator(self._kind, settings.half)
        self._sizes = batches.of_mine(batches.sizes)
        held_out = held_out_samples(batches.samples, settings.hold_out)
        self._judges = batches.of_mine(torch.split(held_out, batches.sizes))
        self._axes = channel_axes(self.reference)
        self._done = 0
        self._pin_inputs()

    def up_to(self, node: Node | None) -> Iterator[Change | Skip]:
        """Compensate the blocks whose output is `node` or computed before it; `None`: all that are left.

        The quantized graph goes on to the output of each.
        """
        blocks = graph_info(self.gm).blocks  # moved in place
        while self._done < len(blocks):
            output = find_node(self.gm, blocks[self._done].output)
            if node is not None and not self._precedes(output, node):
                return
            yield self._block(self._done)
            self._done += 1
            self._pin_inputs()

    def _precedes(self, output: Node, node: Node) -> bool:
        return next(n for n in self.gm.graph.nodes if n in (output, node)) is output

    def _pin_inputs(self) -> None:
        blocks = graph_info(self.gm).blocks[self._done :]
        self._quantized.pinned = {find_node(self.gm, b.input) for b in blocks}

    def _block(self, index: int) -> Change | Skip:
        gm, info = self.gm, graph_info(self.gm)
        block = info.blocks[index]
        if info.compensations.get(block.name, {}).get("applied"):
            return Skip(block.name, "compensated already")
        source, result = find_node(gm, block.input), find_node(gm, block.output)
        original = graph_info(self.reference).blocks[index]
        try:
            channels = self._channels(original)
            site = self._compensator.site(gm, block.name, source, result, channels)
        except NoSite as error:
            return Skip(block.name, str(error))
        self._quantized.advance(result, keep=(site.regressor,))
        self._hold_regressor(site)
        first = self._quantized.envs[0]
        x = site.regressor_value(first[site.regressor])
        y = site.output_value(first[result])
        if x.shape != y.shape:
            reason = f"its input {tuple(x.shape)} and output {tuple(y.shape)} differ"
            return Skip(block.name, reason)
        every = (self._rows(site, i) for i in range(len(self._sizes)))
        rows = [split for split in every if split is not None]
        if len(rows) < len(self._sizes):
            return Skip(block.name, "which sample each of its tokens belongs to is not known")
        fit = self._journal.once(
            f"compensation of {block.name}", lambda: self._fit(site, original, rows)
        )
        judged = fit.r2 if fit.r2_held_out is None else fit.r2_held_out
        record = info.compensations[block.name] = {
            "kind": str(self._kind),
            "target": self._settings.target,
            "r2": fit.r2,
            "r2_held_out": fit.r2_held_out,
            "ridge": fit.ridge,
            "applied": judged > 0.0,
            "parameters": 0,
            "macs": 0,
        }
        if not record["applied"]:
            return Skip(block.name, f"R^2 {judged:.4g} is not positive")
        inserted = self._compensator.insert(gm, site, fit)
        record |= {"parameters": inserted.parameters, "macs": inserted.macs}
        if inserted.output is result:  # folded away: the values at hand are from before
            assert isinstance(fit, AffineFit)
            for env in self._quantized.envs:
                env[result] = env[result] + fit.correction(env[site.regressor])
        else:
            Correspondence.replaced(gm, result, inserted.output)
            self._quantized.advance(inserted.output)
        return Change(block.name, f"{self._kind}, R^2 {judged:.4g}")

    def _channels(self, original: Block) -> int:
        """The dimension of the channels of a block's values, -1 for the last."""
        source, result = (find_node(self.reference, n) for n in (original.input, original.output))
        last = len(shape_of(result) or ()) - 1
        axis = self._axes.get(result, last)
        if self._axes.get(source, axis) != axis:
            at = self._axes[source]
            raise NoSite(f"its input has its channels in dimension {at}, its output in {axis}")
        return -1 if axis == last else axis

    def _hold_regressor(self, site: Site) -> None:
        """What the error is regressed on, made of the block's input again where it was dropped."""
        function = Subgraph(self.gm, site.source, site.regressor)
        for env, batch in zip(self._quantized.envs, self._batches.batches, strict=True):
            if site.regressor not in env:
                env[site.regressor] = function(start(self.gm, batch), env[site.source])

    def _fit(self, site: Site, original: Block, rows: list[Rows]) -> Fit | AffineFit:
        """Fit the error of a block; `original` is its record in the reference."""
        envs = self._quantized.envs
        result = site.output_value(envs[0][site.result])
        width, outputs = site.regressor_value(envs[0][site.regressor]).shape[-1], result.shape[-1]
        device = result.device
        both = [self._compensator.empty(width, outputs, device) for _ in range(2)]
        targets = self._targets(site, original)

        def parts(index: int) -> Iterator[tuple[int, list[Tensor]]]:
            env, target = envs[index], next(targets)
            x = site.regressor_value(env[site.regressor]).reshape(-1, width)
            error = site.output_value(wide(target) - wide(env[site.result])).reshape(-1, outputs)
            if not bool(torch.isfinite(x).all() and torch.isfinite(error).all()):
                raise DataError(
                    f"{site.name}: NaN or infinite values in this block's input or output; check the "
                    "weights and the calibration inputs"
                )
            for which, chosen in enumerate(rows[index]):  # those that fit, those that judge
                if bool(chosen.any()):
                    yield which, both[which].part(x[chosen], error[chosen])

        for which, part in self._batches.in_order(parts):
            both[which].merge(part)
        train, judge = both
        held_out = judge if self._settings.hold_out > 0.0 else None
        kind = AffineFit if self._kind.name == "affine" else Fit
        fitted: Fit | AffineFit = self._batches.fitted(
            kind, lambda: self._compensator.fit(train, held_out)
        )
        return fitted

    def _targets(self, site: Site, original: Block) -> Iterator[Tensor]:
        """What the block's output should be, batch by batch."""
        end = find_node(self.reference, original.output)
        if self._settings.target == "fp":
            self._floating.advance(end)
            yield from (env[end] for env in self._floating.envs)
            return
        function = Subgraph(self.reference, find_node(self.reference, original.input), end)
        for env, batch in zip(self._quantized.envs, self._batches.batches, strict=True):
            yield function(start(self.reference, batch), env[site.source])

    def _rows(self, site: Site, index: int) -> Rows | None:
        """Those of a batch; `None` if it is not known."""
        y = self._quantized.envs[index][site.result]
        count = y.numel() // y.shape[site.channels]
        keep = torch.ones(count, dtype=torch.bool, device=y.device)
        if self._proofs:
            constant = graph_info(self.gm).constant_token is not None
            masked = self._settings.token_masks
            mask = self._proofs[index].counting(
                Correspondence.name_of(site.source), behind_end=masked, first=not constant
            )
            keep = keep if mask is None else keep & mask.reshape(-1)
        if self._settings.hold_out == 0.0:
            return keep, torch.zeros_like(keep)
        samples = sample_ids(site.result, y.shape, self._sizes[index], site.channels)
        if samples is None:
            return None
        judged = self._judges[index][samples].to(y.device)
        return keep & ~judged, keep & judged


def why_no_block(
    gm: GraphModule, batches: DistributedBatches, settings: CompensationSettings
) -> str | None:
    """Why no block of a graph can be compensated; `None` where some may be."""
    if not graph_info(gm).blocks:
        return (
            "no block was found (residual sums of at least two linears or convolutions that keep a "
            "value's shape)"
        )
    if settings.hold_out > 0.0 and batches.samples < 2:
        return "one calibration sample: none can be held out"
    return None


def why_none_compensated(gm: GraphModule, kind: str) -> str | None:
    """One line on a calibrated graph none of whose blocks got the compensation; `None` where one did."""
    info = graph_info(gm)
    if any(record["applied"] for record in info.compensations.values()):
        return None
    names = {"graph", *(b.name for b in info.blocks)}
    passes = [r for r in info.passes if r["pass"] in ("InsertCompensation", "CalibrateLayers")]
    skips = [why for record in passes for name, why in record["skips"] if name in names]
    if info.compensations:
        skips = ["none would help (R^2 on held-out samples is not positive)"]
    why = "; ".join(
        f"{reason} ({count})" if count > 1 else reason for reason, count in Counter(skips).items()
    )
    return f"compensation {kind!r} was asked for, but no block has one: {why}"
