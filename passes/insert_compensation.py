"""QwT: a residual linear behind each quantized block (arXiv 2411.13918, eq. 4 and 5).

    y = l_q(x) + x W + b,   W, b = least squares of l_fp(x) - l_q(x) on [x 1] over the tokens

Blocks are done in order, so x is the output of the quantized and compensated prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.errors import ConfigError, PreconditionError
from qwt_fx.fake_quant import Mode
from qwt_fx.graph import Block, add_tensor, find_node, graph_info
from qwt_fx.hold_out import held_out_samples
from qwt_fx.norms import fake_quant_of, is_fake_quant
from qwt_fx.pass_base import Change, Pass, Skip
from qwt_fx.regression import Fit, Moments, fit_held_out, fit_original
from qwt_fx.runner import BlockRunner, Subgraph, batch_size, check_batches, start
from qwt_fx.token_map import token_mask

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertCompensation(Pass):
    """Insert y + x W + b behind every transformer block where it helps.

    Attributes:
        reference: the floating-point graph the quantized one was made from; the target of each
            block is its block of the same name, run on the quantized path's input.
        batches: calibration batches, a list of tuples of tensors (or of tensors).
        kind: "qwt".
        hold_out: share of the samples, in [0, 0.5), that chooses the ridge and decides whether a
            block is compensated: only with a positive R^2 there. 0 fits and judges on every
            sample by minimum-norm least squares, as published.
        token_masks: leave out text positions that provably cannot matter.
        half: store W in half precision (it is read back as float32); a W that overflows half
            precision stays in float32.

    A block compensated before is skipped. Raises `ConfigError` for an unknown kind,
    `PreconditionError` when the graphs' blocks differ or a quantizer has not been observed.
    """

    reference: GraphModule
    batches: Any
    kind: str = "qwt"
    hold_out: float = 0.2
    token_masks: bool = True
    half: bool = True
    progress: Any = field(default=None, compare=False)

    preserves_fp: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind != "qwt":
            raise ConfigError(f"InsertCompensation.kind: got {self.kind!r}, wanted 'qwt'")
        if not 0.0 <= self.hold_out < 0.5:
            raise ConfigError(f"InsertCompensation.hold_out: got {self.hold_out}, wanted [0, 0.5)")
        check_batches(self.batches)

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
        batches = check_batches(self.batches)
        samples = sum(batch_size(b) for b in batches)
        if self.hold_out > 0.0 and samples < 2:
            yield Skip("graph", "one calibration sample: none can be held out")
            return
        masks = self._masks(gm, batches) if self.token_masks else [{} for _ in batches]
        with torch.no_grad():
            runner = BlockRunner(gm, batches)
            for index in range(len(info.blocks)):
                yield self._block(gm, index, runner, masks)
                if self.progress is not None:
                    self.progress(index + 1, len(info.blocks))

    def _masks(self, gm: GraphModule, batches: Sequence[Any]) -> list[dict[str, Tensor]]:
        boundary = [find_node(gm, b.input) for b in graph_info(gm).blocks]
        return [token_mask(gm, batch, boundary).rows for batch in batches]

    def _block(
        self, gm: GraphModule, index: int, runner: BlockRunner, masks: list[dict[str, Tensor]]
    ) -> Change | Skip:
        info = graph_info(gm)
        block, original = info.blocks[index], graph_info(self.reference).blocks[index]
        if block.name in info.compensations and info.compensations[block.name]["applied"]:
            return Skip(block.name, "compensated already")
        source, result = find_node(gm, block.input), find_node(gm, block.output)
        runner.advance(source)
        runner.advance(result, keep=(source,))
        first_x, first_y = runner.envs[0][source], runner.envs[0][result]
        if first_x.shape != first_y.shape:
            reason = f"its input {tuple(first_x.shape)} and output {tuple(first_y.shape)} differ"
            return Skip(block.name, reason)
        function = Subgraph(
            self.reference,
            find_node(self.reference, original.input),
            find_node(self.reference, original.output),
        )
        fit = self._fit(function, source, result, runner, [m.get(source.name) for m in masks])
        judged = fit.r2 if fit.r2_held_out is None else fit.r2_held_out
        applied = judged > 0.0
        info.compensations[block.name] = {
            "r2": fit.r2,
            "r2_held_out": fit.r2_held_out,
            "ridge": fit.ridge,
            "applied": applied,
            "parameters": fit.weight.numel() + fit.bias.numel() if applied else 0,
        }
        if not applied:
            return Skip(block.name, f"R^2 {judged:.4g} is not positive")
        output = self._insert(gm, block, source, result, fit)
        info.blocks[:] = [_moved(b, result.name, output.name) for b in info.blocks]
        runner.advance(output)
        return Change(block.name, f"R^2 {judged:.4g}")

    def _fit(
        self,
        function: Subgraph,
        source: Node,
        result: Node,
        runner: BlockRunner,
        rows: list[Tensor | None],
    ) -> Fit:
        width = runner.envs[0][source].shape[-1]
        device = runner.envs[0][source].device
        train, held_out = (Moments.empty(width, width, device) for _ in range(2))
        sizes = [batch_size(b) for b in self.batches]
        judges = torch.split(held_out_samples(sum(sizes), self.hold_out), sizes)
        for env, batch, mask, judged in zip(runner.envs, self.batches, rows, judges, strict=True):
            x, y = env[source], env[result]
            error = function(start(self.reference, batch), x) - y
            _add(train, x, error, mask, ~judged)
            _add(held_out, x, error, mask, judged)
        return fit_held_out(train, held_out) if self.hold_out > 0.0 else fit_original(train)

    def _insert(self, gm: GraphModule, block: Block, source: Node, result: Node, fit: Fit) -> Node:
        weight = fit.weight.float()  # (in, out)
        half = weight.half()
        use_half = self.half and bool(torch.isfinite(half).all())
        readers = list(result.users)
        name = f"{block.name}.compensation"
        following = result.next
        with gm.graph.inserting_before(following):
            matrix = add_tensor(gm, f"{name}_weight", half if use_half else weight)
            bias = add_tensor(gm, f"{name}_bias", fit.bias.float())
            if use_half:
                matrix = gm.graph.call_function(aten.to.dtype, (matrix, torch.float32))
            correction = gm.graph.call_function(aten.matmul.default, (source, matrix))
            partial = gm.graph.call_function(aten.add.Tensor, (result, correction))
            output = gm.graph.call_function(aten.add.Tensor, (partial, bias))
        correction.meta["layer"] = name
        for key in ("val", "nn_module_stack"):
            if key in result.meta:
                output.meta[key] = partial.meta[key] = correction.meta[key] = result.meta[key]
        for reader in readers:
            reader.replace_input_with(result, output)
        return output


def _moved(block: Block, old: str, new: str) -> Block:
    """The block record after its boundary value `old` became `new`."""
    return Block(
        block.name,
        new if block.input == old else block.input,
        new if block.output == old else block.output,
    )


def _add(moments: Moments, x: Tensor, error: Tensor, rows: Tensor | None, samples: Tensor) -> None:
    """Add the tokens of the chosen samples (first dimension) and rows."""
    width = x.shape[-1]
    keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    keep &= samples.to(x.device).reshape(-1, *([1] * (keep.dim() - 1)))
    if rows is not None:
        keep &= rows.reshape(keep.shape)
    flat = keep.reshape(-1)
    if bool(flat.any()):
        moments.add(x.reshape(-1, width)[flat], error.reshape(-1, width)[flat])
