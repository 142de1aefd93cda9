"""Ranges and weights of every layer in one walk over the graph, from all calibration batches.

The floating-point graph and the quantized one advance in step, group by group of layers that read
one value. With x the value on the quantized path, x_fp on the floating-point path:

1. histograms of x; where a norm makes x, or attention's values become x, the differences between its
   channels move into the weights as far as that lowers the output's error (W5, W8);
2. the range of x that disturbs the layers' output least (W6);
3. the layer's weight and bias move to least squares of what the output should be, W x_fp + b, on the
   QUANTIZED x, with a ridge that held-out samples choose (ERQ, arXiv 2407.06794; the target of
   GPTAQ, arXiv 2504.02692). A layer that adds to a residual stream repairs what the stream misses;
4. the weights are rounded by GPTQ on the same sums (W7), and the bias takes the mean error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.channel_map import NotMapped, value_map
from qwt_fx.errors import DataError
from qwt_fx.fake_quant import FakeQuant, Mode
from qwt_fx.gram import LayerSums
from qwt_fx.graph import MATMULS, find_node, graph_info, is_call, layer_name, through_shape_ops
from qwt_fx.histogram import Histogram, Mass, gather_mass
from qwt_fx.hold_out import held_out_samples
from qwt_fx.layer_fit import FittedLayer, fit_layer
from qwt_fx.layer_groups import (
    LayerGroup,
    can_be_rows,
    find_groups,
    rows_of,
    weight_quantizer,
)
from qwt_fx.norms import (
    NORMS,
    fake_quant_of,
    is_fake_quant,
    norm_readers,
    why_not_reparameterizable,
)
from qwt_fx.observe import set_mode
from qwt_fx.pass_base import Change, Pass, Skip
from qwt_fx.qparams import LOG_SQRT2
from qwt_fx.range_search import search_range
from qwt_fx.remedies import LayerRemedies
from qwt_fx.rescale import divide_constants, divide_norm, divide_rows, set_layer, undo_in_columns, weight_and_bias
from qwt_fx.rescale_search import Rescale, choose_rescale
from qwt_fx.runner import BlockRunner, batch_size, check_batches
from qwt_fx.sample_ids import batch_axis, sample_ids
from qwt_fx.token_map import token_mask

aten = torch.ops.aten

_APART = 4.0  # a position this many times larger than the median one may get its own scale ...
_WORTH = 0.7  # ... where that leaves at most this share of the error


@dataclass(frozen=True)
class CalibrateLayers(Pass):
    """Find every range and round every weight of a graph with observers, best first things first.

    Attributes:
        reference: the floating-point graph the observed one was made from.
        batches: calibration batches, a list of tuples of tensors (or of tensors).
        remedies: what is done beside finding ranges.
        progress: called as progress(groups done, groups).

    Afterwards every quantizer has qparams and is switched on, and per-channel quantizers behind
    norms are per-tensor. Run again, it would calibrate the calibrated weights: not idempotent.
    Raises `DataError` for values that are not finite.
    """

    reference: GraphModule
    batches: Any
    remedies: LayerRemedies = field(default_factory=LayerRemedies)
    progress: Any = field(default=None, compare=False)

    preserves_fp: ClassVar[bool] = False

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        set_mode(gm, Mode.ON)
        _weights_next_to_layers(gm)
        groups = find_groups(gm)
        walk = _Walk(self, gm, groups)
        with torch.no_grad():
            for index, group in enumerate(groups):
                yield from walk.group(group)
                if self.progress is not None:
                    self.progress(index + 1, len(groups))


def _weights_next_to_layers(gm: GraphModule) -> None:
    """Weights are quantized just before they are used, not all at the start of a run."""
    for node in [n for n in gm.graph.nodes if is_fake_quant(gm, n)]:
        source = node.args[0]
        if isinstance(source, Node) and source.op == "get_attr" and node.users:
            first = next(n for n in gm.graph.nodes if n in node.users)
            first.prepend(node)


class _Walk:
    """Both graphs at the point reached, and what the samples are used for."""

    def __init__(self, calibration: CalibrateLayers, gm: GraphModule, groups: Sequence[LayerGroup]):
        self.gm = gm
        self.reference = calibration.reference
        self.remedies = calibration.remedies
        batches = check_batches(calibration.batches)
        self.sizes = [batch_size(b) for b in batches]
        self.quantized = BlockRunner(gm, batches)
        self.floating = BlockRunner(self.reference, batches)
        self.judges = torch.split(
            held_out_samples(sum(self.sizes), self.remedies.hold_out), self.sizes
        )
        sources = [g.source for g in groups]
        self.tokens = [token_mask(gm, batch, sources) for batch in batches]

    def group(self, group: LayerGroup) -> Iterator[Change | Skip]:
        """Calibrate one group."""
        gm, source = self.gm, group.source
        self.quantized.advance(source)
        self.floating.advance(self._twin(source))
        quantizer = None if group.quantizer is None else fake_quant_of(gm, group.quantizer)
        if quantizer is not None and quantizer.spec.scheme == LOG_SQRT2:
            quantizer.observe(self.quantized.envs[0][source])
            yield Change(quantizer.name, "log-sqrt2 range")
            return
        rows = [layer for layer in group.layers if can_be_rows(layer)]
        targets = {layer: weight_and_bias(self.reference, self._twin(layer)) for layer in rows}
        if quantizer is not None:
            yield self._range(group, quantizer)
        sums = self._sums(group, rows, targets, quantizer) if rows else {}
        for layer in group.layers:
            fitted = self._round(layer, sums[layer]) if layer in sums else self._nearest(layer)
            if fitted is not None:
                yield Change(layer_name(layer), _describe(fitted))

    def _twin(self, node: Node) -> Node:
        return find_node(self.reference, node.name)

    # Ranges

    def _range(self, group: LayerGroup, quantizer: FakeQuant) -> Change:
        histogram = self._histogram(group)
        weights = [
            weight_and_bias(self.gm, layer)[0]
            for layer in group.layers
            if can_be_rows(layer) and layer.target is aten.linear.default
        ]
        done = "one range"
        spec = replace(quantizer.spec.per_tensor(), include_zero=True)
        scale = shift = None
        if weights and not group.shared:
            rescale, what = self._rescale(group, histogram, weights, spec)
            if rescale is not None:
                scale, shift = rescale.scale, rescale.shift
                done = f"{what}, strength {rescale.strength:g}"
                weights = [weight_and_bias(self.gm, layer)[0] for layer in group.layers]
        importance = torch.ones_like(histogram.total)
        if self.remedies.output_ranges and weights and len(histogram.total) == weights[0].shape[1]:
            importance = torch.stack([w.double().square().sum(dim=0) for w in weights]).sum(dim=0)
        found = search_range(gather_mass(histogram.entries(), importance, scale, shift), spec)
        token_scale = self._token_scale(group) if self.remedies.token_scales else None
        if token_scale is not None:
            apart = search_range(self._mass_apart(group, token_scale, importance), spec)
            if apart.error < _WORTH * found.error:
                found = apart
                quantizer.token_scale = token_scale
                done += f", {int((token_scale != 1).sum())} positions with scales of their own"
        quantizer.spec = spec
        quantizer.set_qparams(found.scale, found.zero_point)
        return Change(quantizer.name, done)

    def _token_scale(self, group: LayerGroup) -> Tensor | None:
        """Powers of two, (length, 1) or (length, 1, 1), that bring the few far larger positions down to the others."""
        values = [env[group.source] for env in self.quantized.envs]
        batch = batch_axis(group.source)
        if values[0].dim() != 3 or batch not in (0, 1):
            return None
        largest = torch.stack([v.abs().amax(dim=(batch, 2)) for v in values]).amax(dim=0)
        ratio = largest / largest.median().clamp_min(torch.finfo(torch.float32).tiny)
        apart = ratio >= _APART
        if not bool(apart.any()) or int(apart.sum()) > max(1, len(ratio) // 8):
            return None
        factor = torch.where(apart, ratio.log2().ceil(), 0.0).exp2()
        return factor[:, None] if batch == 0 else factor[:, None, None]

    def _mass_apart(self, group: LayerGroup, token_scale: Tensor, importance: Tensor) -> Mass:
        """The values with every position divided by its scale, which multiplies its error again."""
        parts = []
        for factor in token_scale.unique().tolist():
            histogram = Histogram(len(importance), importance.device)
            chosen = token_scale.flatten() == factor
            for env in self.quantized.envs:
                x = env[group.source]
                x = x[:, chosen] if token_scale.dim() == 2 else x[chosen]
                histogram.add(x.reshape(-1, len(importance)) / factor)
            parts.append(gather_mass(histogram.entries(), importance * factor**2))
        return Mass(*(torch.cat([getattr(p, f) for p in parts]) for f in ("value", "half", "weight")))

    def _histogram(self, group: LayerGroup) -> Histogram:
        source = group.source
        per_channel = bool(group.layers) and all(
            n.target is aten.linear.default for n in group.layers
        )
        first = self.quantized.envs[0][source]
        histogram = Histogram(first.shape[-1] if per_channel else 1, first.device)
        for index, env in enumerate(self.quantized.envs):
            x = env[source]
            if not bool(torch.isfinite(x).all()):
                raise DataError(
                    f"{source.name}: NaN or infinite values in the tensor to quantize; "
                    "check the weights and the calibration inputs"
                )
            flat = x.reshape(-1, x.shape[-1])
            mask = self._mask(index, source, behind_end=self.remedies.mask_ranges)
            flat = flat if mask is None else flat[mask]
            histogram.add(flat if per_channel else flat.reshape(-1, 1))
        return histogram

    def _mask(self, index: int, source: Node, *, behind_end: bool) -> Tensor | None:
        """Which rows of a batch count, (rows,) bool; `None` for all of them."""
        proof = self.tokens[index]
        mask = proof.rows.get(source.name) if behind_end else None
        if graph_info(self.gm).constant_token is None or source.name not in proof.positions:
            return mask
        # Nothing reads position 0 but attention, and there it was replaced by constants.
        moving = proof.positions[source.name] != 0
        return moving if mask is None else mask & moving

    def _rescale(self, group: LayerGroup, histogram: Histogram, weights: list[Tensor], spec: Any):
        """Move differences between channels upstream and into the weights, where that is possible."""
        origin = through_shape_ops(group.source)
        bits = [m.spec.bits for layer in group.layers if (m := weight_quantizer(self.gm, layer))]
        width = min(bits) if bits else None
        if is_call(origin, NORMS):
            if why_not_reparameterizable(self.gm, origin) is not None:
                return None, ""
            readers = norm_readers(self.gm, origin)
            if len(readers.fake_quants) != 1:
                return None, ""
            shifts = origin.target is aten.layer_norm.default
            chosen = choose_rescale(
                histogram, weights, spec, width, self.remedies.strengths, shifts=shifts
            )
            divide_norm(self.gm, origin, chosen.scale, chosen.shift)
            for linear in readers.linears:
                undo_in_columns(self.gm, linear, chosen.scale, chosen.shift)
            self._transform(origin, chosen)
            return chosen, "moved into the norm"
        if not self.remedies.fold_values:
            return None, ""
        try:
            mapped = value_map(self.gm, group.source)
        except NotMapped:
            return None, ""
        fused = not is_call(mapped.attention, MATMULS)
        shifts = fused or not is_fake_quant(self.gm, mapped.attention.args[0])
        chosen = choose_rescale(
            histogram, weights, spec, width, self.remedies.strengths, shifts=shifts
        )
        divide_rows(self.gm, mapped.producer, mapped.rows, chosen.scale, chosen.shift)
        divide_constants(self.gm, mapped.constants, mapped.rows, chosen.scale, chosen.shift)
        for linear in group.layers:
            undo_in_columns(self.gm, linear, chosen.scale, chosen.shift)
        self._transform(group.source, chosen)
        return chosen, "moved into the values"

    def _transform(self, origin: Node, rescale: Rescale) -> None:
        """Bring the values already computed from `origin` on the quantized path up to date."""
        pending, moved = [origin], {origin}
        while pending:
            for user in pending.pop().users:
                if user in self.quantized.envs[0] and user not in moved:
                    moved.add(user)
                    pending.append(user)
        for env in self.quantized.envs:
            for node in moved & set(env):
                scale, shift = (v.to(env[node].dtype) for v in (rescale.scale, rescale.shift))
                env[node] = env[node] / scale - shift

    # Weights

    def _sums(
        self,
        group: LayerGroup,
        layers: list[Node],
        targets: dict[Node, tuple[Tensor, Tensor | None]],
        quantizer: FakeQuant | None,
    ) -> dict[Node, tuple[LayerSums, LayerSums]]:
        """What each layer's output misses, for tokens that fit and tokens that judge."""
        current = {layer: weight_and_bias(self.gm, layer) for layer in layers}
        device = current[layers[0]][0].device
        shapes = {n: (w.flatten(1).shape[1], len(w)) for n, (w, _) in current.items()}
        sums = {
            n: (LayerSums.empty(*shapes[n], device), LayerSums.empty(*shapes[n], device))
            for n in layers
        }
        for index, env in enumerate(self.quantized.envs):
            x = env[group.source]
            x_hat = x if quantizer is None else quantizer.fake_quantize(x)
            exact = self.floating.envs[index][self._twin(group.source)]
            for layer in layers:
                weight, bias = current[layer]
                keep, judged = self._rows(group.source, layer, index, weight, x)
                rows = rows_of(layer, weight, x_hat)[keep]
                wanted = self._wanted(layer, targets[layer], x, exact, index)[keep]
                missing = wanted - F.linear(rows, weight.flatten(1), bias)
                train, judge = sums[layer]
                train.add(rows[~judged], missing[~judged])
                judge.add(rows[judged], missing[judged])
        return sums

    def _wanted(
        self,
        layer: Node,
        target: tuple[Tensor, Tensor | None],
        x: Tensor,
        exact: Tensor,
        index: int,
    ) -> Tensor:
        """What the layer's output should be, (rows, outputs)."""
        weight, bias = target
        if not self.remedies.fp_target:
            current, own = weight_and_bias(self.gm, layer)
            return F.linear(rows_of(layer, current, x), current.flatten(1), own)
        wanted = F.linear(rows_of(layer, weight, exact), weight.flatten(1), bias)
        residual = _residual(layer)
        if residual is not None:
            ours = self.quantized.envs[index].get(residual)
            theirs = self.floating.envs[index].get(self._twin(residual))
            if ours is not None and theirs is not None:
                wanted = wanted + (theirs - ours).reshape(wanted.shape)
        return wanted

    def _rows(
        self, source: Node, layer: Node, index: int, weight: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Indices of the rows of a batch that are summed, and which of them judge."""
        batch = self.sizes[index]
        judges = self.judges[index]
        if layer.target is aten.linear.default:
            count = x.numel() // x.shape[-1]
            samples = sample_ids(source, x.shape, batch)
            if samples is None:
                samples = torch.arange(count) * batch // count
        else:
            count = rows_of(layer, weight, x).shape[0]
            samples = torch.arange(count) * batch // count
        keep = torch.arange(count)
        mask = self._mask(index, source, behind_end=self.remedies.mask_sums)
        if mask is not None and len(mask) == count:
            keep = keep[mask.cpu()]
        inputs, outputs = weight.flatten(1).shape[1], len(weight)
        wanted = self.remedies.tokens_per_input * inputs
        total = len(keep) * len(self.sizes)
        if inputs > outputs and wanted < total:
            generator = torch.Generator().manual_seed(index)
            chosen = torch.randperm(len(keep), generator=generator)[: -(-wanted // len(self.sizes))]
            keep = keep[chosen.sort().values]
        return keep.to(x.device), judges[samples[keep]].to(x.device)

    def _round(self, layer: Node, sums: tuple[LayerSums, LayerSums]) -> FittedLayer:
        weight, bias = weight_and_bias(self.gm, layer)
        module = weight_quantizer(self.gm, layer)
        spec = None if module is None else module.spec
        fitted = fit_layer(weight.flatten(1), bias, spec, *sums, self.remedies)
        set_layer(self.gm, layer, fitted.weight.reshape(weight.shape), fitted.bias, fitted.qparams)
        return fitted

    def _nearest(self, layer: Node) -> None:
        """A layer that is no matrix product of rows: its weight's own range, nearest codes."""
        module = weight_quantizer(self.gm, layer)
        if module is not None and not module.calibrated:
            module.observe(weight_and_bias(self.gm, layer)[0])


def _residual(layer: Node) -> Node | None:
    """The value that a layer's output is added to, where it does nothing else."""
    if len(layer.users) != 1:
        return None
    (user,) = layer.users
    if not is_call(user, {aten.add.Tensor}) or user.kwargs:
        return None
    others = [a for a in user.args if a is not layer]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    ours, theirs = layer.meta.get("val"), others[0].meta.get("val")
    same = isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape
    return others[0] if same else None


def _describe(fitted: FittedLayer) -> str:
    ridge = "no refit" if fitted.ridge is None else f"ridge {fitted.ridge:g}"
    return f"{ridge}, squared error {fitted.before:.4g} -> {fitted.after:.4g}"
