"""Ranges and weights of every layer in one walk over the graph, from all calibration batches.

The floating-point graph and the quantized one advance in step, group by group of layers that read
one value. With x the value on the quantized path, x_fp on the floating-point path:

1. histograms of x; where a norm makes x, or attention's values become x, the differences between its
   channels move into the weights as far as that lowers the output's error;
2. the range of x that disturbs the layers' output least;
3. the layer's weight and bias move to least squares of what the output should be, W x_fp + b, on the
   QUANTIZED x, with a ridge that held-out samples choose (ERQ, arXiv 2407.06794; the target of
   GPTAQ, arXiv 2504.02692). A layer that adds to a residual stream repairs what the stream misses;
4. the weights are rounded by GPTQ on the same sums, and the bias takes the mean error.

The operands of a quantized attention's products are calibrated likewise, by what the product loses
(`calibrate.product_ranges`).

Behind a block whose layers are done, the block may be compensated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.process_memory import release_freed
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.calibrate.block_compensation import why_no_block
from qwt_fx.calibrate.channel_moves import apply_move, find_move
from qwt_fx.calibrate.layer_range import RangeSearch
from qwt_fx.calibrate.layer_sums import layer_sums
from qwt_fx.calibrate.observe_ranges import observe_on_first
from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.calibrate.product_ranges import calibrate_product
from qwt_fx.calibrate.value_histogram import check_range
from qwt_fx.checkpoint.journal import NO_JOURNAL, Journal
from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.config.layer_settings import LayerSettings
from qwt_fx.errors import DataError
from qwt_fx.graph.edits import add_module, described
from qwt_fx.graph.nodes import layer_name
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.numerics.layer_fit import FittedLayer, fit_layer
from qwt_fx.numerics.qparams import LOG_SQRT2
from qwt_fx.numerics.second_moments import LayerSums
from qwt_fx.quant.attention_products import (
    AttentionProduct,
    find_products,
    place_next_to_products,
)
from qwt_fx.quant.fake_quant import FakeQuant, Mode, fake_quant_of, is_fake_quant, set_mode
from qwt_fx.quant.layer_groups import LayerGroup, can_be_rows, find_groups, weight_quantizer
from qwt_fx.quant.rescale import set_layer, weight_and_bias


@dataclass(frozen=True)
class CalibrateLayers(Pass):
    """Find every range and round every weight of a graph with observers.

    Attributes:
        reference: the floating-point graph the observed one was made from.
        batches: calibration batches, a list of tuples of tensors (or of tensors).
        settings: what is done beside finding ranges.
        progress: called as progress(groups done, groups).
        journal: keeps what each group was found to need, and is committed after each.
        store: keeps the activations at the point reached.
        compensation: blocks are compensated by these settings as soon as their layers are done, so
            that the layers behind them are fitted on what they will read; `None`: not at all.
        compensating: entered around each compensation, which it may clock.
        choose_softmax: probabilities get log-sqrt2 or uniform codes, whichever disturb their product
            with the values less; needs ranges by the output's error.

    Afterwards every quantizer that is not dynamic has qparams, all are switched on, and per-channel
    quantizers behind norms are per-tensor, or per-token. Run again, it would round rounded weights:
    not idempotent. Raises `DataError` for values that are not finite.
    """

    reference: GraphModule
    batches: Batches
    settings: LayerSettings = field(default_factory=LayerSettings)
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)
    journal: Journal = field(default=NO_JOURNAL, compare=False)
    store: ValueStore = field(default_factory=ValueStore, compare=False)
    compensation: CompensationSettings | None = None
    compensating: Callable[[], AbstractContextManager[None]] = field(
        default=nullcontext, compare=False
    )
    choose_softmax: bool = False

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        set_mode(gm, Mode.ON)
        _weights_next_to_layers(gm)
        products: dict[Node, AttentionProduct] = {}
        if self.settings.ranges == "output":
            place_next_to_products(gm)
            products = find_products(gm)
        groups = find_groups(gm)
        batches, compensation = DistributedBatches.of(self.batches), self.compensation
        if compensation and (reason := why_no_block(gm, batches, compensation)):
            compensation = None
            yield Skip("graph", reason)
        walk = PairedWalk(
            gm, self.reference, batches, groups, self.settings, self.journal, self.store,
            compensation,
        )  # fmt: skip
        with torch.no_grad():
            for index, group in enumerate(groups):
                with self.compensating():
                    yield from walk.compensate(group)
                quantizer = group.quantizer
                product = None if quantizer is None else products.get(quantizer)
                if product is None:
                    yield from _calibrate(walk, group)
                elif quantizer is product.first.quantizer:
                    yield from calibrate_product(walk, product, choose_softmax=self.choose_softmax)
                self.journal.commit()
                if self.progress is not None:
                    self.progress(index + 1, len(groups))
            with self.compensating():
                yield from walk.compensate(None)
            self.journal.commit()
        walk.release()


def _weights_next_to_layers(gm: GraphModule) -> None:
    """Weights are quantized just before they are used, not all at the start of a run.

    Layers that share a weight get a quantizer each, as each will get a weight of its own.
    """
    for node in [n for n in gm.graph.nodes if is_fake_quant(gm, n)]:
        source = node.args[0]
        if isinstance(source, Node) and source.op == "get_attr" and node.users:
            first, *others = [n for n in gm.graph.nodes if n in node.users]
            first.prepend(node)
            for user in others:
                _own_quantizer(gm, node, user)


def _own_quantizer(gm: GraphModule, node: Node, user: Node) -> None:
    """A copy of the weight quantizer at `node` for one of its readers."""
    shared = fake_quant_of(gm, node)
    module = FakeQuant(shared.spec, f"{layer_name(user)}.weight")
    module.mode = shared.mode
    with gm.graph.inserting_before(user):
        call = gm.graph.call_module(add_module(gm, "fake_quant_0", module), node.args)
    call.meta = described(node)
    user.replace_input_with(node, call)


def _calibrate(walk: PairedWalk, group: LayerGroup) -> Iterator[Change | Skip]:
    """Find one group's range, then fit and round its layers.

    What is found on data goes through the journal; edits of the graph and of the values do not.
    """
    release_freed()  # what the last group's fit left
    walk.advance(group)
    release_freed()
    quantizer = None if group.quantizer is None else fake_quant_of(walk.gm, group.quantizer)
    if quantizer is not None and quantizer.spec.scheme == LOG_SQRT2:
        find = partial(_log_range, quantizer, walk, group.source)
        quantizer.set_qparams(*walk.journal.once(f"{quantizer.name}: log-sqrt2 range", find))
        yield Change(quantizer.name, "log-sqrt2 range")
        return
    layers = [n for n in group.layers if can_be_rows(n)]
    if quantizer is not None:
        yield _set_range(walk, group, quantizer)
    names = ", ".join(map(layer_name, layers))
    fits = walk.journal.once(f"fit of {names}", partial(_fits, walk, group, layers, quantizer))
    for layer, fitted in zip(layers, fits, strict=True):
        set_layer(walk.gm, layer, fitted.weight, fitted.bias, fitted.qparams)
        yield Change(layer_name(layer), _describe(fitted))
    for layer in group.layers:
        if layer not in layers:
            yield from _round_alone(walk, layer)


def _set_range(walk: PairedWalk, group: LayerGroup, quantizer: FakeQuant) -> Change:
    """Move differences between channels out of the value where that helps, then set its range."""
    search = RangeSearch(walk, group, quantizer)
    move = find_move(search)
    if move is not None:
        apply_move(walk, group, move)
    done = "a range of each token" if search.spec.dynamic else "one range"
    if move is not None:
        done = f"moved into {move.site.into}, strength {move.rescale.strength:g}"
    if search.spec.dynamic:
        quantizer.spec = search.spec
        if move is None:  # counting the values for a move has checked them
            _check_values(walk, group, quantizer)
        return Change(quantizer.name, done)
    best = search.best(None if move is None else move.rescale)
    quantizer.spec, quantizer.token_scale = search.spec, best.token_scale
    quantizer.set_qparams(best.range.scale, best.range.zero_point)
    if best.token_scale is not None:
        positions = int((best.token_scale != 1).sum())
        done += f", {positions} positions with scales of their own"
    return Change(quantizer.name, done)


def _check_values(walk: PairedWalk, group: LayerGroup, quantizer: FakeQuant) -> None:
    """Refuse what a range could not be counted of, though none is."""
    values = walk.values(group.source)

    def check(index: int) -> tuple[()]:
        check_range(values[index], quantizer.name)
        return ()

    list(walk.batches.in_order(check))


def _log_range(
    quantizer: FakeQuant, walk: PairedWalk, source: Node
) -> tuple[Tensor, Tensor | None]:
    first = walk.values(source)[0]
    observe_on_first(walk.batches.ranks, [quantizer], lambda: quantizer.observe(first))
    assert quantizer.scale is not None  # just observed
    return quantizer.scale, quantizer.zero_point


def _fits(
    walk: PairedWalk, group: LayerGroup, layers: list[Node], quantizer: FakeQuant | None
) -> tuple[FittedLayer, ...]:
    """What each layer becomes, in the layer's shape and dtype."""
    floating = {n: weight_and_bias(walk.reference, walk.twin(n)) for n in layers}
    sums = layer_sums(walk, group, layers, floating, quantizer)
    release_freed()
    return tuple(_fit(walk, layer, sums.pop(layer)) for layer in layers)


def _fit(walk: PairedWalk, layer: Node, sums: tuple[LayerSums, LayerSums]) -> FittedLayer:
    weight, bias = weight_and_bias(walk.gm, layer)
    module = weight_quantizer(walk.gm, layer)
    spec = None if module is None else module.spec

    def fit() -> FittedLayer:
        if not all(part.finite for part in sums):
            raise DataError(
                f"{layer_name(layer)}: its input or output is so large, or not finite, that sums of "
                "squares overflow; check the weights and the calibration inputs"
            )
        fitted = fit_layer(weight.flatten(1), bias, spec, *sums, walk.settings)
        # In the layer's own shape and precision, as it is kept: half of what would travel.
        new_bias = None if fitted.bias is None else fitted.bias.to(weight.dtype)
        shaped = fitted.weight.reshape(weight.shape).to(weight.dtype)
        return replace(fitted, weight=shaped, bias=new_bias)

    return walk.batches.fitted(FittedLayer, fit)


def _round_alone(walk: PairedWalk, layer: Node) -> Iterator[Change]:
    """A layer that is no product of rows and a matrix (a grouped convolution): nearest codes."""
    module = weight_quantizer(walk.gm, layer)
    if module is not None and not module.calibrated:
        module.observe(weight_and_bias(walk.gm, layer)[0])
        yield Change(layer_name(layer), "weight rounded to nearest: no rows to fit it on")


def _describe(fitted: FittedLayer) -> str:
    ridge = "no refit" if fitted.ridge is None else f"ridge {fitted.ridge:g}"
    return f"{ridge}, squared error {fitted.before:.4g} -> {fitted.after:.4g}"
