"""Ranges of both operands of an attention's product, by what the product loses.

As for linears' inputs, differences between channels move first, where the function stays what it is:
from queries to keys and back, from values into the linear that reads the attention's output; keys and
values are centred. Then each range is the one that disturbs the product least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.calibrate.value_histogram import CountedValue, best_range, check_range, count_value
from qwt_fx.graph.nodes import layer_name
from qwt_fx.graph.pass_base import Change
from qwt_fx.numerics.product_search import (
    Balance,
    ProbabilityRange,
    balanced_ranges,
    choose_balance,
    least_error,
    probability_ranges,
    product_errors,
)
from qwt_fx.numerics.qparams import AFFINE, LOG_SQRT2, QuantSpec
from qwt_fx.numerics.range_search import Range
from qwt_fx.numerics.rescale_search import Rescale, choose_rescale
from qwt_fx.numerics.split_histogram import SplitHistogram
from qwt_fx.quant.attention_products import (
    AttentionProduct,
    Operand,
    OutputReaders,
    channels_of,
    readers_of,
)
from qwt_fx.quant.channel_map import OperandMap
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_of
from qwt_fx.quant.layer_groups import lowest_weight_bits
from qwt_fx.quant.rescale import divide_constants, divide_rows, undo_in_columns, weight_and_bias

# Probabilities that a search looks at in each batch: many candidates are tried on each.
_PROBABILITIES = 1 << 20


def calibrate_product(
    walk: PairedWalk, product: AttentionProduct, *, choose_softmax: bool
) -> Iterator[Change]:
    """Find both ranges and move what may be moved; the values held are brought up to date.

    choose_softmax: probabilities get log-sqrt2 or uniform codes, whichever disturb less; otherwise those
    that they have.
    """
    for operand in (product.first, product.second):
        walk.reach(operand.source)
    if product.of_probabilities:
        mapped = channels_of(walk.gm, product.second)
        readers = None if mapped is None else readers_of(walk.gm, product, mapped)
        yield from _values(walk, product, mapped, readers)
        yield _probabilities(walk, product, readers, choose_softmax=choose_softmax)
    else:
        yield from _scores(walk, product)


def _scores(walk: PairedWalk, product: AttentionProduct) -> Iterator[Change]:
    gm, (queries, keys) = walk.gm, (product.first, product.second)
    modules = [fake_quant_of(gm, o.quantizer) for o in (queries, keys)]
    maps = [channels_of(gm, o) for o in (queries, keys)]
    counted = (_counted(walk, queries), _counted(walk, keys))
    specs = (_spec(modules[0]), _spec(modules[1]))
    name = layer_name(product.node)
    balance = None
    if walk.settings.fold_values and maps[0] is not None and maps[1] is not None:

        def find() -> Balance:
            q, k = (count() for count in counted)
            return walk.batches.fitted(
                Balance, lambda: choose_balance(q, k, specs, walk.settings.strengths, shifts=True)
            )

        balance = walk.journal.once(f"balance of {name}", find)
        still = torch.zeros_like(balance.shift)
        _divide(walk, queries, maps[0], balance.scale, still)
        _divide(walk, keys, maps[1], balance.scale.reciprocal(), balance.shift)
        yield Change(name, f"queries balanced with keys, strength {balance.strength:g}")

    def ranges() -> tuple[Range, ...]:
        q, k = (count() for count in counted)
        both = walk.batches.ranks.from_first(
            lambda: tuple(map(vars, balanced_ranges(q, k, specs, balance)))
        )
        return tuple(Range(**found) for found in both)

    for module, found in zip(modules, walk.journal.once(f"ranges of {name}", ranges), strict=True):
        module.set_qparams(found.scale, found.zero_point)
        yield Change(module.name, "one range")


def _values(
    walk: PairedWalk,
    product: AttentionProduct,
    mapped: OperandMap | None,
    readers: OutputReaders | None,
) -> Iterator[Change]:
    """Move differences between the values' channels into their readers, then set their range."""
    gm, operand = walk.gm, product.second
    module = fake_quant_of(gm, operand.quantizer)
    counted, spec = _counted(walk, operand), _spec(module)
    rescale = None
    done = "one range"
    if walk.settings.fold_values and mapped is not None and readers is not None:
        weights = _columns(walk, readers)
        bits = lowest_weight_bits(gm, readers.linears)

        def find() -> Rescale:
            histogram, strengths = counted(), walk.settings.strengths
            return walk.batches.fitted(
                Rescale,
                lambda: choose_rescale(histogram, weights, spec, bits, strengths, shifts=True),
            )

        rescale = walk.journal.once(f"rescale of {mapped.producer.name} for {module.name}", find)
        _divide(walk, operand, mapped, rescale.scale, rescale.shift)
        scale, shift = (
            torch.empty_like(v).index_copy(0, readers.columns.to(v.device), v)
            for v in (rescale.scale, rescale.shift)
        )
        for linear in readers.linears:
            undo_in_columns(gm, linear, scale, shift)
        done = f"moved into the values, strength {rescale.strength:g}"
    importance = _importance(walk, operand, readers)

    def search() -> Range:
        return best_range(walk, counted(), importance, spec, rescale)

    found = walk.journal.once(f"range of {module.name}", search)
    module.spec = spec
    module.set_qparams(found.scale, found.zero_point)
    yield Change(module.name, done)


def _probabilities(
    walk: PairedWalk,
    product: AttentionProduct,
    readers: OutputReaders | None,
    *,
    choose_softmax: bool,
) -> Change:
    module = fake_quant_of(walk.gm, product.first.quantizer)
    schemes = (LOG_SQRT2, AFFINE) if choose_softmax else (module.spec.scheme,)

    def find() -> tuple[str, Tensor, float]:
        batches, spec = walk.batches, module.spec
        samples = _samples(walk, product, readers)
        largest = list(batches.in_order(lambda k: [_largest(samples[k][0])]))
        reach = batches.ranks.from_first(lambda: max(map(float, largest)))
        candidates = probability_ranges(reach, spec, schemes)
        errors = list(batches.in_order(lambda k: [product_errors(*samples[k], candidates, spec)]))
        best = batches.fitted(
            ProbabilityRange, lambda: least_error(candidates, torch.stack(errors).sum(0))
        )
        return tuple(vars(best).values())

    scheme, scale, error = walk.journal.once(f"range of {module.name}", find)
    module.spec = replace(module.spec, scheme=scheme)
    zero = torch.zeros_like(scale) if scheme == AFFINE else None
    module.set_qparams(scale, zero)
    return Change(module.name, f"{scheme}: squared error of the product {error:.4g}")


def _largest(p: Tensor) -> Tensor:
    return p.amax() if p.numel() else p.new_zeros(())


def _samples(
    walk: PairedWalk, product: AttentionProduct, readers: OutputReaders | None
) -> list[tuple[Tensor, Tensor]]:
    """Probabilities of some queries and the values they weigh, of this rank's batches."""
    queries, values = product.first, product.second
    size = _importance(walk, values, readers).sqrt()
    samples = []
    for index, p in enumerate(walk.values(queries.source)):
        number = walk.batches.numbers[index]  # the same rows however the batches are shared
        check_range(p, fake_quant_of(walk.gm, queries.quantizer).name)
        v = walk.values(values.source)[index].float()
        v = v * values.spread(size.to(v.dtype), v.shape)
        mask = walk.mask(queries.source, index, behind_end=walk.settings.token_masks != "none")
        p = p.float()
        if mask is not None:
            p = p * mask.reshape(p.shape[:-1])[..., None].to(p.device)
        step = max(1, p.numel() // _PROBABILITIES)
        some = p.reshape(*v.shape[:-2], *p.shape[-2:])[..., number % step :: step, :]
        samples.append((some, v))
    return samples


def _columns(walk: PairedWalk, readers: OutputReaders) -> list[Tensor]:
    """The readers' weights, (o, channels), in the order of the values' channels."""
    weights = [weight_and_bias(walk.gm, n)[0] for n in readers.linears]
    return [w[:, readers.columns.to(w.device)] for w in weights]


def _importance(walk: PairedWalk, operand: Operand, readers: OutputReaders | None) -> Tensor:
    """What a squared error of each of the values' channels counts, (channels,) float64."""
    if readers is not None:
        return torch.stack([w.double().square().sum(0) for w in _columns(walk, readers)]).sum(0)
    first = walk.values(operand.source)[0][:1]
    return torch.ones(operand.rows(first).shape[1], dtype=torch.float64, device=first.device)


def _spec(module: FakeQuant) -> QuantSpec:
    return replace(module.spec.per_tensor(), include_zero=True)


def _counted(walk: PairedWalk, operand: Operand) -> Callable[[], SplitHistogram]:
    """The operand's histogram, counted when first asked for.

    Before anything moves, and not at all where the journal knows what comes of it.
    """
    name = fake_quant_of(walk.gm, operand.quantizer).name
    # Keys and values of position 0 are read by all others, constants or not; its query is by nobody's.
    first = operand.index == 1
    counted = CountedValue(
        name, operand.source, operand.tokens, True, first, operand.rows, operand.flags
    )
    return cache(partial(count_value, walk, counted))


def _divide(
    walk: PairedWalk, operand: Operand, mapped: OperandMap, scale: Tensor, shift: Tensor
) -> None:
    """The operand is x / scale - shift from now on."""
    divide_rows(walk.gm, mapped.producer, mapped.rows, scale, shift)
    divide_constants(walk.gm, mapped.constants, mapped.rows, scale, shift)

    def change(value: Tensor) -> Tensor:
        over, off = (operand.spread(v.to(value.dtype), value.shape) for v in (scale, shift))
        return value / over - off

    walk.revise(operand.source, change)
