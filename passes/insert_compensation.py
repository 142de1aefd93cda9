"""QwT and its cheaper kin: repair each quantized block's error by closed-form regression.

Blocks are done in order, so a block's input is the output of the quantized and compensated prefix;
see `qwt_fx.calibrate.block_compensation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule

from qwt_fx.batches.batch import Batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.process_memory import release_freed
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.calibrate.block_compensation import BlockCompensation, why_no_block
from qwt_fx.checkpoint.journal import NO_JOURNAL, Journal
from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.graph.runner import BlockRunner
from qwt_fx.quant.fake_quant import Mode, fake_quant_of, is_fake_quant
from qwt_fx.text.token_map import token_masks


@dataclass(frozen=True)
class InsertCompensation(Pass):
    """Compensate every transformer block where it helps.

    Attributes:
        reference: the floating-point graph the quantized one was made from.
        batches: calibration batches, a list of tuples of tensors (or of tensors).
        kind, target, hold_out, token_masks, half: see
            `qwt_fx.config.compensation_kind.CompensationSettings`.
        progress: called as progress(blocks done, blocks).
        journal: keeps the fit of each block, and is committed after each.
        store: keeps the activations at the block reached.

    A block compensated before is skipped. Raises `DataError` naming the block for values that are not
    finite, `ConfigError` for an unknown kind or target,
    `PreconditionError` when the graphs' blocks differ or a quantizer has not been observed.
    """

    reference: GraphModule
    batches: Batches
    kind: str = "qwt"
    target: str = "local"
    hold_out: float = 0.2
    token_masks: bool = True
    half: bool = True
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)
    journal: Journal = field(default=NO_JOURNAL, compare=False)
    store: ValueStore = field(default_factory=ValueStore, compare=False)

    def __post_init__(self) -> None:
        self.settings()
        DistributedBatches.of(self.batches)

    def settings(self) -> CompensationSettings:
        """What is fitted to what. Raises `ConfigError` where that is not known."""
        return CompensationSettings(
            self.kind, self.target, self.hold_out, self.token_masks, self.half
        )

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
        settings, batches = self.settings(), DistributedBatches.of(self.batches)
        if reason := why_no_block(gm, batches, settings):
            yield Skip("graph", reason)
            return
        info = graph_info(gm)
        quantized = BlockRunner(gm, batches.batches, self.store)
        floating = BlockRunner(self.reference, batches.batches, self.store)
        inputs = [find_node(gm, b.input) for b in info.blocks]
        proved = settings.token_masks or info.constant_token is not None
        proofs = token_masks(gm, batches.batches, inputs) if proved else []
        with torch.no_grad():
            blocks = BlockCompensation(settings, quantized, floating, batches, self.journal, proofs)
            for index, done in enumerate(blocks.up_to(None)):
                yield done
                release_freed()
                self.journal.commit()
                if self.progress is not None:
                    self.progress(index + 1, len(info.blocks))
        quantized.release()
        floating.release()
